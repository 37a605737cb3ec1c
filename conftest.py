"""Test settings: 8 CPU devices, exact arithmetic, strict shapes, a compile cache."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAGS = os.environ.get("XLA_FLAGS", "")
if "host_platform_device_count" not in _FLAGS:
    _FLAGS = f"{_FLAGS} --xla_force_host_platform_device_count=8"
if "backend_optimization" not in _FLAGS:
    # compiling is most of the time of small tests
    _FLAGS = f"{_FLAGS} --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = _FLAGS

import jax  # noqa: E402

_CACHE = pathlib.Path(__file__).parent / ".cache" / "jax"
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
