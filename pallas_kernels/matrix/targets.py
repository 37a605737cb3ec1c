"""Targets: accelerators that kernels are compiled for, whether or not one is there.

Peak rates, bandwidths and memory per core are facts of the chips: for TPU from `jax`'s
table (jax/_src/tpu_info.py) and Google's public pages, where the clock follows from
peak = clock x flops of the matrix units per cycle; for GPU from NVIDIA's data sheets
and CUDA's table of compute capabilities. libtpu and XLA's CUDA compiler run anywhere.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
from typing import Any, Callable

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import (
    AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
)


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A TPU chip. cores: TensorCores that share the work of one device; peak: bf16
    flops a second and bandwidth: bytes a second, both of the device; cycle: bf16 flops
    a cycle of one core's matrix units."""

    name: str
    topology: str
    kind: str
    cores: int
    peak: float
    bandwidth: float
    cycle: int
    platform = "tpu"
    layout = "auto"  # of arguments and results: the compiler's choice
    backends = ("tpu",)
    named = ()
    needs = "libtpu"

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak / self.cores / self.cycle

    def described(self) -> Any:
        """The topology that is compiled for."""
        return topologies.get_topology_desc(
            platform="tpu", topology_name=self.topology)

    def flags(self, dump: str) -> dict[str, str]:
        """What libtpu reads when it loads; only final programs are dumped."""
        words = (f"--xla_jf_dump_to={dump}", "--xla_jf_dump_llo_text=true",
                 "--xla_jf_dump_llo_pass_label_regex=final_")
        return {"TPU_ACCELERATOR_TYPE": "v5litepod-16", "TPU_SKIP_MDS_QUERY": "1",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                "TPU_WORKER_HOSTNAMES": "localhost",
                "LIBTPU_INIT_ARGS": " ".join(words)}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU. capability: of CUDA; cores: multiprocessors; shared: bytes of shared
    memory of one, block: of which a block of threads may ask for; peak: bf16 flops a
    second, bandwidth: bytes a second, ghz: clock, memory and cache: bytes of the main
    memory and of the second-level cache; backends: the forms that are compiled; named:
    those of exact attention that are, too, but that nobody gets unasked."""

    name: str
    kind: str
    capability: tuple[int, int]
    cores: int
    shared: int
    block: int
    peak: float
    bandwidth: float
    ghz: float
    memory: float
    cache: int
    backends: tuple[str, ...] = ("triton",)
    named: tuple[str, ...] = ()
    platform = "cuda"
    layout = "rows"  # the default
    needs = "jax_cuda13_plugin"

    def described(self) -> Any:
        """The topology that is compiled for, from the text form of XLA's description
        of a device."""
        device = {
            "threads_per_block_limit": 1024, "threads_per_warp": 32,
            "shared_memory_per_block": 49152, "shared_memory_per_core": self.shared,
            "threads_per_core_limit": 2048, "core_count": self.cores,
            "fpus_per_core": 128, "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
            "memory_bandwidth": int(self.bandwidth), "l2_cache_size": self.cache,
            "clock_rate_ghz": self.ghz, "device_memory_size": int(self.memory),
            "shared_memory_per_block_optin": self.block,
            "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
        }
        major, minor = self.capability
        words = " ".join(f"{name}: {value}" for name, value in device.items())
        words += f" cuda_compute_capability {{ major: {major} minor: {minor} }}"
        text = (f'gpu_device_info {{ {words} }} platform_name: "CUDA" '
                f'dnn_version_info {{ major: 9 minor: 10 }} '
                f'device_description_str: "{self.kind}"')
        return topologies.get_topology_desc(
            self.name, "cuda", target_config=text, topology="1x1x1")

    def flags(self, dump: str) -> dict[str, str]:
        """What XLA's CUDA compiler reads when it loads."""
        return {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
                "XLA_FLAGS": f"--xla_dump_to={dump}",
                "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": dump}


MXU128 = 4 * 2 * 128 * 128  # four units of 128 x 128
MXU256 = 4 * 2 * 256 * 256
KIB, GIB = 2**10, 2**30
TARGETS: dict[str, Tpu | Gpu] = {
    t.name: t for t in (
        Tpu("v4", "v4:2x2x1", "TPU v4", 2, 275e12, 1.23e12, MXU128),
        Tpu("v5e", "v5e:2x2", "TPU v5 lite", 1, 197e12, 0.82e12, MXU128),
        Tpu("v5p", "v5p:2x2x1", "TPU v5", 2, 459e12, 2.46e12, MXU128),
        Tpu("v6e", "v6e:2x2", "TPU v6 lite", 1, 920e12, 1.64e12, MXU256),
        Tpu("tpu7x", "tpu7x:2x2x1", "TPU7x", 1, 1155e12, 3.7e12, MXU256),
        Gpu("sm80", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 164 * KIB, 163 * KIB,
            312e12, 2.04e12, 1.41, 80 * GIB, 40 * KIB**2),
        Gpu("sm89", "NVIDIA L4", (8, 9), 58, 100 * KIB, 99 * KIB, 121e12, 0.3e12, 2.04,
            24 * GIB, 48 * KIB**2),
        Gpu("sm90a", "NVIDIA H200", (9, 0), 132, 228 * KIB, 227 * KIB, 989e12, 4.8e12,
            1.98, 141e9, 60 * KIB**2, ("mosaic", "triton")),
        Gpu("sm100", "NVIDIA B200", (10, 0), 148, 228 * KIB, 227 * KIB, 2250e12, 8e12,
            1.96, 180e9, 126 * KIB**2, named=("blackwell",)),
    )
}


def environment(target: Tpu | Gpu, dump: str) -> dict[str, str]:
    """What has to be in the environment before a compiler loads; programs go to `dump`.
    """
    return os.environ | {"JAX_PLATFORMS": "cpu"} | target.flags(dump)


def missing(target: Tpu | Gpu) -> str | None:
    """What is not installed that the target needs, in a sentence."""
    import importlib.util

    ask = "pip install -e '.[aot]'"
    if importlib.util.find_spec(target.needs) is None:
        name = target.needs.replace("_", "-")
        return f"{target.name} needs {name}, which is not installed: {ask}"
    if isinstance(target, Gpu) and ptxas() is None:
        return f"{target.name} needs ptxas, which is not there: {ask}"
    return None


def ptxas() -> str | None:
    """NVIDIA's assembler: that of the package nvidia-cuda-nvcc, else one on the path.
    """
    packages = pathlib.Path(sysconfig.get_paths()["purelib"])
    found = sorted(packages.glob("nvidia/*/bin/ptxas"))
    return str(found[-1]) if found else shutil.which("ptxas")


def abstract(target: Tpu | Gpu) -> AbstractMesh:
    """One device of the target, as kernels see it while they are traced."""
    device = AbstractDevice(
        device_kind=target.kind, num_cores=target.cores, platform=target.platform)
    return AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)


def compiled(target: Tpu | Gpu, f: Callable, *args: Any) -> Any:
    """f compiled for one device of the target; args: trees of ShapeDtypeStructs. On TPU
    the compiler chooses the layout of arguments and results, as it does inside a
    larger program, so that no time is lost in rearranging them."""
    devices = target.described().devices
    mesh = Mesh(np.array(devices[:1]), ("x",))
    whole = NamedSharding(mesh, PartitionSpec())
    place: Any = Format(Layout.AUTO, whole) if target.layout == "auto" else whole
    with jax.sharding.use_abstract_mesh(abstract(target)):
        lowered = jax.jit(f, in_shardings=place, out_shardings=place).lower(*args)
        return lowered.compile()


def worker(module: str, name: str, folder: str, *more: str, **options: Any) -> Any:
    """Starts `python -m module --targets NAME --worker FOLDER`, where a compiler can
    still read its environment: a Popen with `options`."""
    words = [sys.executable, "-m", module, "--targets", name, "--worker", folder, *more]
    environ = environment(TARGETS[name], folder)
    return subprocess.Popen(words, env=environ, **options)
