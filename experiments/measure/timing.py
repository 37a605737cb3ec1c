"""Contenders: attentions ready to be called and timed, and what a device can do."""

from __future__ import annotations

import ctypes
import functools
import time
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.masks import Causal
from attn.softmax import Softmax

PASSES = ("forward", "both", "decode")
PROMPT = "prompt"  # forward, and what a stream keeps of it
SECONDS = 0.02  # how long one timing lasts at least


class Inputs(NamedTuple):
    """q [B,T,H,D], k [B,T,K,D], v [B,T,K,V] and do [B,T,H,V], iid normal."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    do: jax.Array

    @property
    def last(self) -> Inputs:
        """The same with the last query alone: what a decoding step sees."""
        return self._replace(q=self.q[:, -1:], do=self.do[:, -1:])


def inputs(batch, t, heads, kv_heads, d, v, dtype) -> Inputs:
    """Inputs of a call of the given sizes."""
    shapes = ((heads, d), (kv_heads, d), (kv_heads, v), (heads, v))
    keys = jax.random.split(jax.random.key(0), 4)
    return Inputs(*(jax.random.normal(key, (batch, t, *shape)).astype(dtype)
                    for key, shape in zip(keys, shapes)))


def prepared(f: Any, x: Inputs, which: str, gates: tuple = ()) -> Callable[[], Any]:
    """A call of f, compiled and run once. f: an attention, or a function of q, k, v and
    gates. The gradients of a learned attention are also those of its tokens and
    parameters, those of a function those of its gates."""
    if which == "decode" and hasattr(f, "init_state"):
        return _stream(f, x)
    if which == PROMPT and hasattr(f, "init_state"):
        return _prompt(f, x)
    f, more = bound(f, x)
    more += gates

    def both(do, *args):
        return jax.vjp(f, *args)[1](do)

    if which == "both":
        call = functools.partial(jax.jit(both), x.do, *x[:3], *more)
    else:
        call = functools.partial(jax.jit(f), *x[:3], *more)
    jax.block_until_ready(call())
    return call


def bound(f: Any, x: Inputs, method: str = "__call__") -> tuple[Callable, tuple]:
    """(function of arrays and of more, more): what a learned attention needs besides
    its arrays, tokens [B,T,H V] that are iid normal, and parameters; () for others."""
    if not hasattr(f, "apply"):
        return getattr(f, method) if method != "__call__" else f, ()
    b, t = x.k.shape[:2]
    width = x.q.shape[2] * x.v.shape[3]
    tokens = jax.random.normal(jax.random.key(1), (b, t, width)).astype(x.q.dtype)
    first = [a[:, :1] for a in (*x[:3], tokens)]
    params = f.init(jax.random.key(2), *first[:3], x=first[3])

    def apply(*args):
        *arrays, tokens, params = args
        return f.apply(params, *arrays, x=tokens, method=method)

    return apply, (tokens, params)


def _stream(attention: Any, x: Inputs) -> Callable[[], Any]:
    """One more token for a memory that has read all but the last. The memory is given
    away to the call, so that it is written in place; a cache forgets the token again, a
    recurrent memory reads it once more."""
    t = x.k.shape[1]
    advance, more = bound(attention, x, "step")

    def cut(part):
        own = (more[0][:, part], *more[1:]) if more else ()
        return (x.k[:, part], x.v[:, part], *own)

    before, last = slice(None, t - 1), slice(t - 1, None)
    queries = jnp.broadcast_to(x.q, (x.k.shape[0], t, *x.q.shape[2:]))
    # the prompt is what comes before: what drops tokens of it has room for one more
    prompt = (a[:, before] for a in (queries, x.k, x.v))
    state = attention.init_state(t, *prompt)
    state, _ = jax.jit(advance)(state, queries[:, :t - 1], *cut(before))

    def step(state, q, *args):
        after, o = advance(state, q, *args)
        # positions and counts as they were: the same step again
        same = lambda new, old: new if jnp.issubdtype(new.dtype, jnp.floating) else old
        return jax.tree.map(same, after, state), o

    run = jax.jit(step, donate_argnums=0)
    held = [state]

    def call():
        held[0], o = run(held[0], x.q, *cut(last))
        return o

    jax.block_until_ready(call())
    call.moved = sum(a.nbytes for a in jax.tree.leaves(held[0]))  # type: ignore
    return call


def _prompt(attention: Any, x: Inputs) -> Callable[[], Any]:
    """All tokens for an empty memory, as one piece: what a policy keeps of them is part
    of the work."""
    advance, more = bound(attention, x, "step")
    state = attention.init_state(x.k.shape[1], *x[:3])
    call = functools.partial(jax.jit(advance), state, *x[:3], *more)
    jax.block_until_ready(call())
    return call


def keep_memory() -> None:
    """Tells glibc to keep what was freed. It gives large arrays back to the system, and
    the next call then pays for every page anew: time of the system, not of attention.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def repeats(call: Callable[[], Any]) -> int:
    """How often a call has to be made to last long enough to be timed."""
    clock = time.perf_counter()
    jax.block_until_ready(call())
    return max(1, round(SECONDS / max(time.perf_counter() - clock, 1e-6)))


def seconds(call: Callable[[], Any], times: int) -> float:
    """Seconds of one call, of as many that are made one behind the other: on a CPU
    calls that were not waited for would run beside each other, and beside the next."""
    wait = jax.default_backend() == "cpu"
    clock = time.perf_counter()
    for _ in range(times):
        out = call()
        if wait:
            jax.block_until_ready(out)
    jax.block_until_ready(out)
    return (time.perf_counter() - clock) / times


def ratio(one: Callable[[], Any], other: Callable[[], Any], rounds: int) -> float:
    """How many times as long `other` takes as `one`, both compiled: the median of
    rounds in which they take turns."""
    calls = one, other
    times = [repeats(call) for call in calls]
    spent = [[seconds(call, n) for call, n in zip(calls, times)] for _ in range(rounds)]
    return float(np.median([b / a for a, b in spent]))


def exact(attention: Any) -> bool:
    """Whether it does all the work of causal softmax attention, as the peers (None) do:
    flops say how fast."""
    return attention is None or (
        isinstance(attention, Softmax) and attention.visible == Causal())


def flops(x: Inputs, which: str) -> float:
    """Of causal attention, by the field's convention: half the matrix, and backward 2.5
    times forward."""
    b, t, h, d = x.q.shape
    work = 2 * b * h * t * x.k.shape[1] * (d + x.v.shape[3])
    share = {"forward": 0.5, PROMPT: 0.5, "both": 0.5 * 3.5, "decode": 1.0}[which]
    return work * share


def limits(dtype: Any) -> tuple[float, float]:
    """What this device does of late: flops a second of a large matrix product, and
    bytes a second of a large copy, read and written together."""
    large = jax.default_backend() != "cpu"
    n, size = (8192, 2**29) if large else (1024, 2**25)
    a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    x = jnp.zeros(size // jnp.dtype(dtype).itemsize, dtype)
    rates = []
    for f, arg, amount in ((lambda a: a @ a, a, 2 * n**3), (lambda x: -x, x, 2 * size)):
        call = functools.partial(jax.jit(f), arg)
        jax.block_until_ready(call())
        times = repeats(call)
        rates.append(amount / min(seconds(call, times) for _ in range(5)))
    return rates[0], rates[1]
