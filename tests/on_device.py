"""Whether tests run kernels on the accelerator that is here, or interpret them.

`make test-device` sets ATTN_DEVICE: the kernels' tests then compile for this machine's
accelerator. Tests of a kernel that is another device's, by the name of a parameter, and
laws over a mesh, which need eight devices, are left out.
"""

import functools
import os
import re

ASKED = bool(os.environ.get("ATTN_DEVICE"))
INTERPRET = not ASKED
BACKENDS = {"tpu", "triton", "mosaic", "blackwell"}
MESHES = re.compile(r"mesh|shard|device_grid|ring|exchange|lasp")


@functools.cache
def own():
    """The backends of this device."""
    import jax

    major = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    by_card = {"9": {"mosaic"}, "10": {"blackwell"}}.get(major, set())
    return {"tpu": {"tpu"}, "gpu": {"triton"} | by_card}.get(
        jax.default_backend(), set())


def why_not(item):
    """Why a test does not run on this device, "" if it does."""
    words = set(re.split(r"\W|_", item.nodeid.partition("::")[2]))
    words |= set(re.split(r"\W|_", item.path.stem)) & {"mosaic", "blackwell"}
    if foreign := (words & BACKENDS) - own():
        return f"{min(foreign)} is another device's"
    import jax

    if jax.device_count() < 8 and MESHES.search(item.name):
        return "needs eight devices"
    return ""
