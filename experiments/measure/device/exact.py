"""Exact attention on a device: what is proved of it, and in what sizes."""

from __future__ import annotations

import functools
from typing import Any, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from attn.exact.chunked import attend
from attn.masks import Causal, Full, Window
from attn.positions import ALiBi
from experiments.measure.device.case import BF16, F32, Case, normal
from experiments.measure.device.place import Place
from experiments.measure.device.right import Subject, check
from pallas_kernels.flash.api import flash
from pallas_kernels.logits import LogitSpec, Where

# what is proved beside: sizes and features, by name
RIGHT: dict[str, dict[str, Any]] = {
    "causal": {}, "D64": {"d": 64}, "D256": {"d": 256, "h": 2},
    "D192 V128": {"d": 192, "v": 128}, "grouped": {"h": 8, "k": 2},
    "T1": {"t": 1}, "T3001 D80": {"t": 3001, "d": 80}, "full": {"mask": Full()},
    "T100 S1000": {"t": 100, "s": 1000},
    "window sink softcap score": {
        "mask": Causal() & Window(300), "softcap": 20.0, "score": ALiBi(4),
        "sink": True},
    "packed": {"packed": True, "t": 1500}, "float32": {"dtype": F32, "t": 1000},
    "bias": {"bias": True, "t": 700},
}
SMALL = ("causal", "T1", "window sink softcap score", "packed", "grouped")


def sized(b=1, t=4096, h=16, k=None, d=128, v=None, s=None, dtype=BF16, **_) -> tuple:
    """q [B,T,H,D], k [B,S,K,D], v [B,S,K,V]."""
    shapes = (b, t, h, d), (b, s or t, k or h, d), (b, s or t, k or h, v or d)
    return tuple(normal(n, *shape, dtype=dtype) for n, shape in enumerate(shapes))


def segments(t: int) -> jax.Array:
    """Segments of a row [1,T], with padding at the end."""
    at = np.arange(t)
    found = 1 + np.digitize(at, [t // 7, t // 3, t // 3 + 1, t - t // 5])
    return jnp.asarray(np.where(at < t - t // 20, found, 0)[None], jnp.int32)


def plain(q, k, v, sink=None, bias=None, *, mask, softcap=None, score=None,
          segment=None) -> tuple:
    """o [B,T,H,V] in v's type and lse [B,H,T], by the whole matrix of logits."""
    (_, t, h, d), s = q.shape, k.shape[1]
    k, v = (jnp.repeat(a, h // a.shape[2], 2) for a in (k, v))
    i, j = jnp.arange(t)[:, None] + s - t, jnp.arange(s)[None]
    n = jnp.arange(h)[:, None, None]
    logit = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=F32) * d**-0.5
    if softcap is not None:
        logit = softcap * jnp.tanh(logit / softcap)
    if score is not None:
        logit = logit + score(n, i, j)
    if bias is not None:
        logit = logit + bias.astype(F32)
    seen = jnp.broadcast_to(mask(n, i, j), (1, h, t, s))
    if segment is not None:
        a, b = segment[:, None, :, None], segment[:, None, None]
        seen = seen & (a == b) & (a > 0)
    logit = jnp.where(seen, logit, -jnp.inf)
    top = logit.max(-1, keepdims=True)
    if sink is not None:
        top = jnp.maximum(top, sink[:, None, None])
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    p = jnp.where(seen, jnp.exp(logit - top), 0)
    total = p.sum(-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink[:, None, None] - top)
    some = total > 0
    safe = jnp.where(some, total, 1)
    o = jnp.einsum("bhts,bshv->bthv", (p / safe).astype(v.dtype), v,
                   preferred_element_type=F32)
    lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
    return o.astype(v.dtype), lse[..., 0]


def subject(place: Place, backend: str, t=None, d=128, h=4, k=None, v=None, s=None,
            mask=Causal(), softcap=None, score=None, sink=False, packed=False,
            bias=False, dtype=BF16, variant=()) -> Subject:
    """A call of flash, beside the whole matrix."""
    t = t or 4096
    if place.tiny:
        h = 2 if backend != "mosaic" or k else 1  # whose interpreter is slow
        t, d, k = min(t, 70), min(d, 64), 1 if k else None
        v, s = min(v, 64) if v else None, min(s, 90) if s else None
        score = ALiBi(h) if score else None
    args = sized(1, t, h, k, d, v, s, dtype)
    options: dict[str, Any] = {"mask": mask, "softcap": softcap, "score": score}
    names = ["q", "k", "v"]
    if sink:
        args, names = (*args, normal(5, h, dtype=F32)), [*names, "sink"]
    if bias:
        args = *args, normal(6, 1, h, t, s or t, dtype=dtype)
        names = [*names, "bias"]
    segment = segments(t) if packed else None
    told = LogitSpec(**options), Where(q_segment=segment, kv_segment=segment)

    def kernel(q, k, v, *more):
        return flash(q, k, v, *told, **dict(zip(names[3:], more)), backend=backend,
                     variant=variant, interpret=place.interpret)

    def dense(*args):
        return plain(**dict(zip(names, args)), **options, segment=segment)

    def xla(q, k, v, *more):
        return attend(q, k, v, *told, **dict(zip(names[3:], more)))

    return Subject(kernel, xla, args, len(args),
                   ("o", "lse", *(f"d{n}" for n in names)), sizes, dense)


def sizes(q, k, v, *rest) -> dict[str, float]:
    """What dq and dk are sums of, before anything cancels: |dP| times k or q."""
    norm = jnp.linalg.norm
    both = norm(v) * v.shape[1] ** 0.5 * v.shape[3] ** 0.5
    scale = q.shape[3] ** -0.5 / (q.shape[1] * q.shape[2] * k.shape[1]) ** 0.5
    return {"dq": float(both * norm(k) * scale), "dk": float(both * norm(q) * scale)}


def right_cases(place: Place) -> Iterator[Case]:
    """Every backend with every size and feature that it takes."""
    for backend in place.exact:
        for n, (name, options) in enumerate(RIGHT.items()):
            lacks = backend in ("mosaic", "blackwell") and (
                "dtype" in options or "bias" in options)
            slow = place.interpret and backend == "mosaic" and n
            if lacks or slow or place.tiny and name not in SMALL:
                continue
            yield Case(
                f"right flash {backend} {name}",
                functools.partial(_check, place, backend, options),
                tier=0 if n == 0 else 1 if name in SMALL else 2)


def _check(place: Place, backend: str, options: dict, bench) -> dict[str, Any]:
    return check(bench, subject(place, backend, **options))
