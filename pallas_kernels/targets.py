"""Targets: accelerators that kernels are compiled for, whether or not one is there.

Peak rates, bandwidths and memory per core are facts of the chips, from `jax`'s table
(jax/_src/tpu_info.py) and Google's public pages; the clock follows from peak = clock x
flops of the matrix units per cycle. libtpu compiles for each topology on any machine.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any, Callable

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A chip. cores: TensorCores that share the work of one device; peak: bf16 flops a
    second and bandwidth: bytes a second, both of the device; cycle: bf16 flops a cycle
    of one core's matrix units."""

    name: str
    topology: str
    kind: str
    cores: int
    peak: float
    bandwidth: float
    cycle: int

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak / self.cores / self.cycle


MXU128 = 4 * 2 * 128 * 128  # four units of 128 x 128
MXU256 = 4 * 2 * 256 * 256
TARGETS = {
    t.name: t for t in (
        Target("v4", "v4:2x2x1", "TPU v4", 2, 275e12, 1.23e12, MXU128),
        Target("v5e", "v5e:2x2", "TPU v5 lite", 1, 197e12, 0.82e12, MXU128),
        Target("v5p", "v5p:2x2x1", "TPU v5", 2, 459e12, 2.46e12, MXU128),
        Target("v6e", "v6e:2x2", "TPU v6 lite", 1, 920e12, 1.64e12, MXU256),
        Target("tpu7x", "tpu7x:2x2x1", "TPU7x", 1, 1155e12, 3.7e12, MXU256),
    )
}


def environment(dump: str) -> dict[str, str]:
    """What has to be in the environment before libtpu loads; programs go to `dump`."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1",
        "LIBTPU_INIT_ARGS":
            f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
    }


def compiled(target: Target, f: Callable, *args: Any) -> Any:
    """f compiled for one device of the target; args: trees of ShapeDtypeStructs."""
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=target.topology)
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    whole = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), args)
    device = AbstractDevice(
        device_kind=target.kind, num_cores=target.cores, platform="tpu")
    abstract = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(abstract):
        lowered = jax.jit(f).lower(*args)
    return lowered.compile()


def in_process(module: str, name: str, folder: str, *more: str) -> int:
    """Runs `python -m module --targets NAME --worker FOLDER`, where libtpu can still
    read its environment; the exit status."""
    words = [sys.executable, "-m", module, "--targets", name, "--worker", folder, *more]
    return subprocess.run(words, env=environment(folder)).returncode
