"""The linear memory that learns with momentum on a device.

The reference is the loop as it is written, token by token, in float32; plain jnp in a
low type is the same loop in that type, the state as well.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp

from attn.recurrent.memory import Gates, Where, learn
from attn.recurrent.memory_axes import Bias
from attn.recurrent.memory_chunk import Rule
from attn.recurrent.memory_kernel import fused
from attn.recurrent.memory_nets import MLP
from experiments.measure.device.case import BF16, F32, Bench, Case, Row, normal
from experiments.measure.device.fast import OURS, Contender, race, with_gradients
from experiments.measure.device.place import Place
from experiments.measure.device.recurrent import unit
from experiments.measure.device.right import Subject, check

RULE = Rule(MLP(1), Bias(factor=2.0))
NAMES = "q", "k", "v", "step", "log_keep", "log_momentum", "weights"
RIGHT: dict[str, dict[str, Any]] = {
    "chunk 16": {}, "T1": {"t": 1}, "chunk 64 D128": {"d": 128, "chunk": 64},
    "T3001 D40 V72": {"t": 3001, "d": 40, "v": 72}, "strong": {"shift": -6.0},
    "float32": {"t": 1000, "dtype": F32},
}
SMALL = "chunk 16", "T1"
FAST: dict[str, dict[str, Any]] = {
    "chunk 16 T8192 D64 H16": {"t": 8192, "h": 16},
    "chunk 64 T8192 D128 H16": {"t": 8192, "d": 128, "h": 16, "chunk": 64},
}
TINY: dict[str, dict[str, Any]] = {
    "chunk 16 T70 D16 H2": {"t": 70, "d": 16, "h": 2}}


def cases(place: Place) -> Iterator[Case]:
    """What is right, on every backend, and what is fast, on the first."""
    for backend in place.others:
        for n, (name, options) in enumerate(RIGHT.items()):
            if not place.tiny or name in SMALL:
                yield Case(f"right memory {backend} {name}",
                           functools.partial(_check, place, backend, options),
                           tier=0 if n == 0 else 1 if name in SMALL else 2)
    for n, (name, shape) in enumerate((TINY if place.tiny else FAST).items()):
        for back in (False, True):
            way = "both" if back else "forward"
            yield Case(f"fast memory {way} {name}",
                       functools.partial(_race, place, shape, back), tier=1 + n)


def arguments(t=2048, h=4, d=64, v=None, shift=3.0, dtype=BF16) -> tuple:
    """The arrays of a call, as `NAMES` has them; what is kept, of weights and momentum,
    is the sigmoid of normal numbers plus `shift`."""
    q, k = (unit(normal(n, 1, t, h, d, dtype=F32)).astype(dtype) for n in (0, 1))
    step, keep, run = (normal(n, 1, t, h, dtype=F32) for n in (3, 4, 5))
    return (q, k, normal(2, 1, t, h, v or d, dtype=dtype), jax.nn.sigmoid(step) / 10,
            jax.nn.log_sigmoid(keep + shift), jax.nn.log_sigmoid(run + shift),
            normal(6, h, d, v or d, dtype=F32) / d)


def ours(backend: str, dtype: Any, chunk: int = 16) -> Callable:
    """(weights, momentum, o) of the kernel as a function of the arrays."""
    def f(q, k, v, step, log_keep, log_momentum, weights):
        gates = Gates(step, log_keep, log_momentum)
        *state, o = fused(RULE, q, k, v, gates, weights, chunk, dtype, backend)
        return *state, o.astype(dtype)

    return f


def xla(chunk: int = 16) -> Callable:
    """The same by XLA, by chunks, in float32."""
    def f(q, k, v, step, log_keep, log_momentum, weights):
        where = Where(jnp.arange(q.shape[1], dtype=jnp.int32)[None], None)
        after, o = learn(RULE, q, k, v, Gates(step, log_keep, log_momentum),
                         {"W0": weights}, where, chunk=chunk, implementation="xla")
        assert after.momentum is not None
        return (after.weights["W0"] + weights, after.momentum["W0"],
                o.astype(v.dtype))

    return f


def loop(chunk: int = 16) -> Callable:
    """The same token by token, in the type of v: errors at the weights W that their
    chunk began with, S = m S - 2 step k^T (k W - v), W = a W + S, o = q W."""
    def f(q, k, v, *more):
        *gates, weights = (a.astype(v.dtype) for a in more)

        def token(carry, x):
            w, s, frozen = carry
            t, q, k, v, step, keep, run = x
            frozen = jnp.where(t % chunk == 0, w, frozen)
            error = jnp.einsum("bhd,bhdv->bhv", k, frozen) - v  # [B,H,V]
            update = 2 * step[..., None] * k  # [B,H,D]
            run, keep = (jnp.exp(a)[..., None, None] for a in (run, keep))
            s = run * s - update[..., None] * error[:, :, None]
            w = keep * w + s
            return (w, s, frozen), jnp.einsum("bhd,bhdv->bhv", q, w)

        rows = [jnp.moveaxis(a, 1, 0) for a in (q, k, v, *gates)]  # [T,B,H,...]
        first = weights[None], jnp.zeros_like(weights[None]), weights[None]
        (w, s, _), o = jax.lax.scan(token, first, (jnp.arange(q.shape[1]), *rows))
        return w.astype(F32), s.astype(F32), jnp.moveaxis(o, 0, 1)

    return f


def _check(place: Place, backend: str, options: dict, bench: Bench) -> Row:
    chunk = options.get("chunk", 16)
    told = {n: value for n, value in options.items() if n != "chunk"}
    if place.tiny:
        told |= {"t": min(told.get("t", 70), 70), "h": 2, "d": 16}
    args, kind = arguments(**told), options.get("dtype", BF16)

    def exact(*args):
        *state, o = loop(chunk)(*args)
        return *state, o.astype(kind)

    return check(bench, Subject(
        ours(backend, kind, chunk), loop(chunk), args, len(args),
        ("W", "S", "o", *(f"d{name}" for name in NAMES)), exact=exact, low=kind))


def _race(place: Place, shape: dict, back: bool, bench: Bench) -> Row:
    chunk = shape.get("chunk", 16)
    args = arguments(**{n: value for n, value in shape.items() if n != "chunk"})
    backend = place.others[0]
    forms = {f"{OURS} {backend}": ours(backend, BF16, chunk), "XLA": xla(chunk)}
    found = [Contender(name, functools.partial(_last, f)) for name, f in forms.items()]
    if back:
        found = [one._replace(f=with_gradients(one.f, len(args))) for one in found]
        args = *args, normal(9, *args[2].shape)
    return race(bench, found, args, moved=sum(a.nbytes for a in args))


def _last(f: Callable, *args: Any) -> Any:
    """o of f's results."""
    return f(*args)[-1]
