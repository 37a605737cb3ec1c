"""Modules and attentions as compiled programs: eagerly each operation is compiled by
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


def attend(attention, *args, **kwargs):
    """attention(*args), compiled once for all calls with the same shapes."""
    return _call(attention, "__call__")(*args, **kwargs)


def step(attention, *args, **kwargs):
    """attention.step(*args), compiled once for all calls with the same shapes."""
    return _call(attention, "step")(*args, **kwargs)


@functools.cache
def _call(attention, method):
    return jax.jit(getattr(attention, method))
