"""The compile cache of commands and tests: in the user's cache folder, so that a second
run and a second clone are warm, bounded in size, and safe with several processes.

Nothing here depends on where the checkout lies: XLA's own caches, whose path would be
part of every key, are off.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import sys
import time

try:
    from platformdirs import user_cache_dir
except ImportError:  # a checkout on the path of a machine that has jax alone
    def user_cache_dir(appname: str) -> str:  # type: ignore[misc]
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return os.path.join(home, appname)

LIMIT = 6 * 2**30  # bytes of all compiled programs, of every version together
SETTINGS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
}


def root() -> pathlib.Path:
    """The folder of all compiled programs of this user."""
    return pathlib.Path(user_cache_dir("attn")) / "compiled"


def folder() -> pathlib.Path:
    """Where this Python, jax and processor keep theirs: code compiled for another
    processor's instructions may not run here, and jax's key does not know them."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        known = "flags", "Features"
        features = next(line for line in lines if line.startswith(known))
    except (OSError, StopIteration):
        features = platform.processor()
    chip = hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
    jax, jaxlib = (importlib.metadata.version(name) for name in ("jax", "jaxlib"))
    python = ".".join(map(str, sys.version_info[:2]))
    return root() / f"jax{jax}-jaxlib{jaxlib}-py{python}-{chip}"


def use() -> None:
    """Points jax, and every process that is started from here, at the cache; what the
    user has set stays. Programs that were compiled before are not in it."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder()))
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import jax

    for name in ("JAX_COMPILATION_CACHE_DIR", *SETTINGS):
        # jax reads the environment when it is imported, which may have been before
        kind = type(getattr(jax.config, name.lower()))
        value = os.environ[name]
        jax.config.update(name.lower(), value if kind is type(None) else kind(value))
    _write_whole_entries()


def _write_whole_entries() -> None:
    """Makes jax rename an entry into its place once it is written, so that no process
    reads half of what another one is writing, and none is left by a killed one."""
    from jax._src import lru_cache  # no public way

    def put(self, key: str, value: bytes) -> None:
        path = pathlib.Path(str(self.path)) / f"{key}-cache"
        if path.exists():
            return
        part = path.with_name(f"{path.name}.{os.getpid()}")
        part.write_bytes(value)
        part.replace(path)

    lru_cache.LRUCache.put = put  # type: ignore[method-assign]


def prune(limit: int = LIMIT) -> int:
    """Removes programs, those first that were not used for the longest time, until the
    rest has at most `limit` bytes. Returns how many went. Another process may do the
    same at the same time."""
    found = []
    for path in root().rglob("*"):
        try:
            if path.is_file():
                stat = path.stat()
                found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
        except FileNotFoundError:
            continue
    size, gone = sum(size for _, size, _ in found), 0
    for used, own, path in sorted(found):
        torn = not path.name.endswith("-cache") and used < time.time() - 3600
        if size <= limit and not torn:
            continue
        path.unlink(missing_ok=True)
        size, gone = size - own, gone + 1
    return gone
