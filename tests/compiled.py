"""Linen modules as compiled programs: eagerly every operation of a layer is compiled by
itself, which is most of a small test."""

import functools

import jax


def init(module, *args, method=None, **kwargs):
    """Its parameters: module.init(*args), compiled."""
    return jax.jit(functools.partial(module.init, method=method))(*args, **kwargs)


def apply(module, *args, method=None, **kwargs):
    """module.apply(*args), compiled once for all calls with the same shapes."""
    return _program(module, method)(*args, **kwargs)


@functools.cache
def _program(module, method):
    return jax.jit(functools.partial(module.apply, method=method))
