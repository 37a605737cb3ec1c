"""Recurrences on a device: linear attention, the delta rule, and softmax over prefixes.

The reference of the first two is the loop as it is written, token by token, in float32;
plain jnp in a low type is the same loop in that type, the state as well.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp

from attn.recurrent import delta_rule, linear as linear_attention, scan as prefix
from attn.recurrent.linear import token_decays
from experiments.measure.device.case import BF16, F32, Bench, Case, Row, normal
from experiments.measure.device.exact import segments
from experiments.measure.device.fast import OURS, Contender, race, with_gradients
from experiments.measure.device.place import Place
from experiments.measure.device.right import Subject, check
from pallas_kernels.delta.api import delta
from pallas_kernels.linear.api import linear
from pallas_kernels.scan.api import scan

DECAYS = "none", "head", "token", "channel"
# kernel, and what of a call is not the rule
RIGHT: dict[str, dict[str, Any]] = {
    "linear token": {"decay": "token"}, "delta gated": {"decay": "token"},
    "scan": {}, "linear channel": {"decay": "channel"},
    "linear none": {"decay": "none"}, "linear head": {"decay": "head"},
    "linear channel strong": {"decay": "channel", "shift": -6.0},
    "linear channel packed": {"decay": "channel", "packed": True, "t": 1500},
    "linear token packed K2": {"decay": "token", "packed": True, "t": 1500, "k": 2},
    "linear channel float32": {"decay": "channel", "dtype": F32, "t": 1000},
    "linear token T1": {"decay": "token", "t": 1},
    "linear channel T3001 D80": {"decay": "channel", "t": 3001, "d": 80},
    "delta T1": {"decay": "token", "t": 1}, "delta T2": {"decay": "token", "t": 2},
    "delta plain": {"decay": "none"}, "delta K2 packed": {
        "decay": "token", "k": 2, "packed": True, "t": 1500},
    "delta T3001 D80": {"decay": "token", "t": 3001, "d": 80},
    "delta float32": {"decay": "token", "dtype": F32, "t": 1000},
    "delta strong": {"decay": "token", "shift": -6.0},
    "delta channel": {"decay": "channel"},
    "delta channel strong": {"decay": "channel", "shift": -6.0},
    "delta channel packed K2": {
        "decay": "channel", "k": 2, "packed": True, "t": 1500},
    "scan T1": {"t": 1}, "scan packed": {"packed": True, "t": 1500},
    "scan T3001 V80": {"t": 3001, "d": 80},
}
SMALL = ("linear token", "delta gated", "scan", "linear channel packed", "delta T1")
FAST: dict[str, dict[str, Any]] = {
    "linear channel T8192 D128 H16": {"decay": "channel", "t": 8192},
    "delta gated T8192 D128 H32 K16": {"t": 8192, "h": 32, "k": 16},
    "scan T8192 V128 H16": {"t": 8192},
    "linear token T8192 D128 H16": {"decay": "token", "t": 8192},
    "delta gated T8192 D128 H64 K16": {"t": 8192, "h": 64, "k": 16},
    "linear head T8192 D128 H16": {"decay": "head", "t": 8192},
    "linear none T8192 D128 H16": {"decay": "none", "t": 8192},
    "delta gated T2048 D128 H64 K16": {"t": 2048, "h": 64, "k": 16},
    "delta gated T32768 D128 H32 K16": {"t": 32768, "h": 32, "k": 16},
    "linear channel T32768 D128 H16": {"decay": "channel", "t": 32768},
    "linear token T32768 D128 H16": {"decay": "token", "t": 32768},
}
TINY: dict[str, dict[str, Any]] = {
    "linear channel T70 D16 H2": {"decay": "channel", "t": 70, "d": 16, "h": 2},
    "delta gated T70 D16 H2 K1": {"t": 70, "d": 16, "h": 2, "k": 1},
    "scan T70 V16 H2": {"t": 70, "d": 16, "h": 2},
}
FIRST = 3


def cases(place: Place) -> Iterator[Case]:
    """What is right, on every backend, and what is fast, on the first."""
    for backend in place.others:
        for n, (name, options) in enumerate(RIGHT.items()):
            if not place.tiny or name in SMALL:
                kernel, _, rest = name.partition(" ")
                yield Case(f"right {kernel} {backend} {rest}".rstrip(),
                           functools.partial(_check, place, backend, kernel, options),
                           tier=0 if n < FIRST else 1 if name in SMALL else 2)
    for n, (name, shape) in enumerate((TINY if place.tiny else FAST).items()):
        for back in (False, True):
            kernel, _, rest = name.partition(" ")
            way = "both" if back else "forward"
            yield Case(f"fast {kernel} {way} {rest}",
                       functools.partial(_race, place, kernel, shape, back),
                       tier=(0 if n < FIRST and not back else 1 if n < FIRST else 2))


def arguments(kernel: str, t=2048, h=4, k=None, d=128, decay="token", dtype=BF16,
              shift=3.0) -> tuple:
    """The arrays of a call; decays are the sigmoid of normal numbers plus `shift`."""
    if kernel == "scan":
        return normal(0, 1, t, h, dtype=F32), normal(1, 1, t, k or h, d, dtype=dtype)
    q = unit(normal(0, 1, t, k if k and kernel == "delta" else h, d, dtype=F32))
    found = [q.astype(dtype), unit(normal(1, 1, t, k or h, d, dtype=F32)).astype(dtype),
             normal(2, 1, t, h if kernel == "delta" else k or h, d, dtype=dtype)]
    if kernel == "delta":
        found.append(jax.nn.sigmoid(normal(3, 1, t, h, dtype=F32)))
    own = {"head": (h,), "token": (1, t, h), "channel": (1, t, h, d)}
    if decay in own:
        found.append(jax.nn.log_sigmoid(normal(4, *own[decay], dtype=F32) + shift))
    return tuple(found)


def unit(a: jax.Array) -> jax.Array:
    """Vectors of length 1: the state of a recurrence then stays bounded."""
    return a / jnp.linalg.norm(a, axis=-1, keepdims=True)


def names(kernel: str, many: int) -> tuple[str, ...]:
    """The names of a call's arrays."""
    known = {"scan": ("scores", "v"), "linear": ("q", "k", "v", "log_decay"),
             "delta": ("q", "k", "v", "beta", "log_decay")}
    return known[kernel][:many]


def ours(place: Place, kernel: str, backend: str, dtype: Any, segment=None,
         variant: tuple[str, ...] = ()) -> Callable:
    """(final state, o) of a kernel as a function of its arrays."""
    told: dict[str, Any] = {"segment": segment, "backend": backend,
                            "interpret": place.interpret}
    if kernel != "scan":
        told["variant"] = variant

    def f(*args):
        if kernel == "scan":
            (b, _, h), width = args[0].shape, args[1].shape[3]
            empty = (jnp.full((b, h), -jnp.inf), jnp.zeros((b, h)),
                     jnp.zeros((b, h, width)))
            (_, u, w), o = scan(*args, empty, dtype=dtype, **told)
            return u, w, o
        if kernel == "linear":
            return linear(*args, dtype=dtype, **told)
        return delta(*args, **told)

    return f


def xla(kernel: str, segment=None) -> Callable:
    """The same by XLA, by chunks."""
    def f(*args):
        told: dict[str, Any] = {"segment": segment, "implementation": "xla"}
        if kernel == "scan":
            state, o = prefix.prefix_softmax(*args, dtype=args[1].dtype, **told)
            assert state is not None  # it is None over a mesh axis alone
            return state.l, state.acc, o
        rule = linear_attention.recurrence if kernel == "linear" else \
            delta_rule.recurrence
        return rule(*args, dtype=args[2].dtype, **told)

    return f


def loop(kernel: str, segment=None) -> Callable:
    """The same token by token in float32; of a scan XLA's form, which is that."""
    if kernel == "scan":
        return xla(kernel, segment)
    rule = linear_attention.naive if kernel == "linear" else delta_rule.naive

    def f(*args):
        (b, _, _, d), width = args[0].shape, args[2].shape[3]
        h = args[3].shape[2] if kernel == "delta" else args[0].shape[2]
        state, o = rule(*args, state=jnp.zeros((b, h, d, width)), segment=segment)
        return state, o.astype(args[2].dtype)

    return f


def rough(kernel: str, segment=None) -> Callable:
    """The loop in the type of v; of a scan XLA's form."""
    if kernel == "scan":
        return xla(kernel, segment)

    def f(*args):
        kind, h = args[2].dtype, args[3 if kernel == "delta" else 0].shape[2]
        q, k, v = (jnp.repeat(a, h // a.shape[2], 2) for a in args[:3])
        beta = args[3].astype(kind) if kernel == "delta" else None
        b, t, _, d = q.shape
        g = token_decays(args[-1], t) if len(args) > 3 + (beta is not None) else None
        decay = jnp.ones((1, t, h, 1), kind) if g is None else jnp.exp(g).astype(kind)
        row = jnp.ones((1, t), jnp.int32) if segment is None else segment

        def step(carry, token):
            state, present = carry
            q, k, v, beta, decay, now = token
            old = jnp.where((now == present)[:, None, None, None], state, 0)
            old = old * decay[..., None]
            if beta is not None:
                v = beta[..., None] * (v - jnp.einsum("bhd,bhdv->bhv", k, old))
            new = old + k[..., None] * v[:, :, None]
            real = (now > 0)[:, None, None]
            o = jnp.where(real, jnp.einsum("bhd,bhdv->bhv", q, new), 0)
            return (jnp.where(real[..., None], new, state),
                    jnp.where(now > 0, now, present)), o

        tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0),
                              (q, k, v, beta, jnp.broadcast_to(
                                  decay, (decay.shape[0], t, *decay.shape[2:])), row))
        first = jnp.zeros((b, h, d, v.shape[3]), kind), jnp.ones((1,), jnp.int32)
        (state, _), o = jax.lax.scan(step, first, tokens)
        return state.astype(F32), jnp.moveaxis(o, 0, 1)

    return f


def subject(place: Place, backend: str, kernel: str, packed=False, variant=(),
            **options: Any) -> Subject:
    """A call of a kernel, beside the loop and XLA's form."""
    if place.tiny:
        options |= {"t": min(options.get("t", 150), 150), "h": 2, "d": 16}
        options["k"] = 1 if options.get("k") else None
    args = arguments(kernel, **options)
    segment = segments(args[0].shape[1]) if packed else None
    kind = options.get("dtype", BF16)
    results = ("l", "acc", "o") if kernel == "scan" else ("state", "o")
    return Subject(
        ours(place, kernel, backend, kind, segment, variant), rough(kernel, segment),
        args, len(args), (*results, *(f"d{n}" for n in names(kernel, len(args)))),
        exact=loop(kernel, segment), low=kind)


def _check(place: Place, backend: str, kernel: str, options: dict, bench: Bench) -> Row:
    return check(bench, subject(place, backend, kernel, **options))


def _race(place: Place, kernel: str, shape: dict, back: bool, bench: Bench) -> Row:
    h = 16 if "h" not in shape else shape["h"]
    args = arguments(kernel, **({"h": h} | shape))
    backend = place.others[0]
    f = ours(place, kernel, backend, BF16)
    found = [Contender(f"{OURS} {backend}", lambda *a: f(*a)[-1])]
    if shape["t"] <= 8192:
        peer = xla(kernel)
        found.append(Contender("XLA", lambda *a: peer(*a)[-1]))
    if back:
        found = [one._replace(f=with_gradients(one.f, len(args))) for one in found]
        v = args[1 if kernel == "scan" else 2]
        args = *args, normal(9, 1, shape["t"], h, v.shape[3])
    moved = sum(a.nbytes for a in args)
    return race(bench, found, args, moved=moved)
