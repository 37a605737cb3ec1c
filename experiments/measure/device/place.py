"""Where cases run: the device, what it can be asked for, and how large cases are."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import platform
import subprocess
import sys
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parents[3]
SOURCES = "pallas_kernels", "attn", "models", "experiments/measure"
PACKAGES = "jax", "jaxlib", "tokamax", "torch", "flash-linear-attention"


@dataclasses.dataclass(frozen=True)
class Place:
    """platform: "cpu", "gpu" or "tpu"; kind: the device's name; capability: of a GPU,
    as "9.0", else ""; tiny: shapes that a CPU interprets in seconds."""

    platform: str
    kind: str
    capability: str
    tiny: bool

    @property
    def interpret(self) -> bool:
        """Whether kernels are interpreted."""
        return self.platform == "cpu"

    @property
    def exact(self) -> tuple[str, ...]:
        """The backends of exact attention that run here, the fastest first."""
        if self.platform == "tpu":
            return "tpu",
        if self.platform == "cpu":
            return "triton", "tpu", "mosaic"
        first = {"9": ("mosaic",), "10": ("blackwell",)}
        return *first.get(self.capability.partition(".")[0], ()), "triton"

    @property
    def others(self) -> tuple[str, ...]:
        """The backends of all other kernels that run here."""
        return {"tpu": ("tpu",), "gpu": ("triton",)}.get(
            self.platform, ("triton", "tpu"))


def here(tiny: bool) -> Place:
    """The place of this process's first device."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    return Place(jax.default_backend(), device.device_kind, capability,
                 tiny or jax.default_backend() == "cpu")


def described(place: Place) -> dict[str, Any]:
    """What a reader has to know of the place: names, driver and versions."""
    there = {d.name.lower() for d in importlib.metadata.distributions()}
    versions = {n: importlib.metadata.version(n) for n in PACKAGES if n in there}
    return {
        "device": place.kind, "platform": place.platform,
        "capability": place.capability, "driver": _driver() if place.platform == "gpu"
        else "", "python": platform.python_version(), "versions": versions,
        "source": source(), "tiny": place.tiny,
    }


def _driver() -> str:
    """The version of NVIDIA's driver; "" if nobody says."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (said.stdout.splitlines() or [""])[0].strip()


@functools.cache
def source() -> str:
    """Twelve digits of the text of all that results depend on: where no git is, a
    changed kernel is still told from the one that was measured."""
    total = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json") and "matrix.json" != path.name:
                total.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def installed(name: str) -> bool:
    """Whether a package can be imported; it is not imported for that."""
    return name in sys.modules or importlib.util.find_spec(name) is not None
