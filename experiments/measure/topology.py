"""Topology: the chips of a pod, as they are joined, whether or not they are there.

A TPU pod is a torus: a chip is joined to its neighbours along two or three dimensions,
by links that carry as much one way as the other. Names are libtpu's: "v5e:16x16" is 256
chips of TPU v5e, "v5p:2x2x2" eight of v5p. "cpu" is this machine's devices, of which no
speed is known.

Bandwidth of a link in one direction: "How to Scale Your Model" (Austin et al., 2025,
jax-ml.github.io/scaling-book), from Google's data sheets; memory of a device: Google
Cloud's pages on each TPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from typing import Any, Sequence

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from experiments.training import mesh
from experiments.training.mesh import Sizes
from pallas_kernels.matrix.targets import TARGETS, Tpu

GIB = 2**30
LINK = {"v4": 45e9, "v5e": 45e9, "v5p": 90e9, "v6e": 90e9, "tpu7x": 90e9}
MEMORY = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB,
          "tpu7x": 96 * GIB}
WHOLE = {"v5e": 16, "v6e": 16}  # a dimension of so many chips closes to a ring


@dataclasses.dataclass(frozen=True)
class Pod:
    """Devices of one kind. peak: bf16 flops a second and memory: bytes, of a device;
    link: bytes a second of one link one way; None where nobody knows."""

    name: str
    devices: tuple[Any, ...]
    target: Tpu | None = None

    @property
    def peak(self) -> float | None:
        return None if self.target is None else self.target.peak

    @property
    def link(self) -> float | None:
        return None if self.target is None else LINK[self.target.name]

    @property
    def memory(self) -> int | None:
        return None if self.target is None else MEMORY[self.target.name]

    def mesh(self, sizes: Sizes) -> Mesh:
        """The devices along data, seq and model, neighbours near each other.
        ValueError unless the sizes use all of them."""
        if np.prod(sizes) != len(self.devices):
            raise ValueError(
                f"mesh={sizes} has {np.prod(sizes)} devices: expected the "
                f"{len(self.devices)} of {self.name}"
            )
        return mesh.arranged(sizes, self.devices)

    @functools.cached_property
    def extent(self) -> np.ndarray:
        """Chips along each dimension."""
        return np.max([self._coords(d) for d in self.devices], 0) + 1

    def distance(self, pairs: Sequence[tuple[Any, Any]]) -> float:
        """Links between the chips of each pair, in the mean."""
        a, b = (np.array([self._coords(d) for d in side]) for side in zip(*pairs))
        apart = np.abs(a - b)
        whole = WHOLE.get(self.target.name if self.target else "", 0)
        closed = self.extent % 4 == 0 if not whole else self.extent >= whole
        around = np.where(closed, self.extent - apart, apart)
        return float(np.minimum(apart, around).sum(1).mean())

    def spread(self, members: Sequence[Any]) -> int:
        """Along how many dimensions the chips of a group lie, at least 1."""
        coords = np.array([self._coords(d) for d in members])
        return max(int((np.ptp(coords, axis=0) > 0).sum()), 1)

    def _coords(self, device: Any) -> tuple[int, ...]:
        return tuple(getattr(device, "coords", (device.id,)))


def pod(name: str) -> Pod:
    """The pod of that name. ValueError if there is none, or libtpu is missing."""
    if name == "cpu":
        return Pod(name, tuple(jax.devices()))
    target = TARGETS.get(name.partition(":")[0])
    if not isinstance(target, Tpu) or ":" not in name:
        kinds = ", ".join(LINK)
        raise ValueError(
            f"topology={name!r}: expected 'cpu', or one of {kinds} with its chips, "
            "such as 'v5e:16x16' or 'v5p:2x2x2'"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology={name!r} needs libtpu to compile: pip install -e '.[aot]', or "
            "'cpu' for the devices that are here"
        )
    for key, value in target.flags("").items():
        if key != "LIBTPU_INIT_ARGS":
            os.environ.setdefault(key, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # whatever libtpu says is the finding
        text = (str(error).strip() or "no reason given").splitlines()[0]
        raise ValueError(f"topology={name!r}: {text[:160]}") from None
    return Pod(name, tuple(found.devices), target)
