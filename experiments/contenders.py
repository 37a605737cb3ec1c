"""Contenders: attentions and the peers they are timed against, ready to be called.

A peer takes part where it is installed and runs: cuDNN and tokamax's kernels on a GPU,
tokamax's on a TPU, its chunked form and torch's scaled_dot_product_attention on a CPU
(torch's on a GPU as well). What a peer refuses is said once and left out.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.masks import Causal
from attn.softmax import Softmax

PEER = "jax.nn"
PASSES = ("forward", "both", "decode")
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


def prepared(f: Any, x: Inputs, which: str) -> Callable[[], Any]:
    """A call of f, compiled and run once. f: an attention, or a function of q, k, v."""
    if which == "decode" and hasattr(f, "init_state"):
        return _stream(f, x)

    def both(do, *args):
        return jax.vjp(f, *args)[1](do)

    if which == "both":
        call = functools.partial(jax.jit(both), x.do, *x[:3])
    else:
        call = functools.partial(jax.jit(f), *x[:3])
    jax.block_until_ready(call())
    return call


def _stream(attention: Any, x: Inputs) -> Callable[[], Any]:
    """One more token for a memory that has read all but the last. The memory is given
    away to the call, so that it is written in place; a cache forgets the token again, a
    recurrent memory reads it once more."""
    t = x.k.shape[1]
    cut = lambda part: (x.k[:, part], x.v[:, part])
    before, last = slice(None, t - 1), slice(t - 1, None)
    queries = jnp.broadcast_to(x.q, (x.k.shape[0], t, *x.q.shape[2:]))
    state = attention.init_state(t, queries, x.k, x.v)
    state, _ = jax.jit(attention.step)(state, queries[:, :t - 1], *cut(before))

    def step(state, q, k, v):
        after, o = attention.step(state, q, k, v)
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


def peers(which: str) -> dict[str, Callable[[Inputs], Callable[[], Any]]]:
    """What prepares a call of each peer that may run here, by name; jax.nn first."""
    where = jax.default_backend()
    causal = which != "decode"  # one query sees all keys
    own = jax.nn.dot_product_attention
    forms: dict[str, Callable] = {PEER: functools.partial(own, is_causal=causal)}
    if where == "gpu":
        forms["cuDNN"] = functools.partial(
            own, is_causal=causal, implementation="cudnn")
    if importlib.util.find_spec("tokamax") is not None:
        import tokamax

        kinds = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",)}
        for kind in kinds.get(where, ("xla_chunked",)):
            forms[f"tokamax {kind}"] = functools.partial(
                tokamax.dot_product_attention, is_causal=causal, implementation=kind)
    found: dict[str, Callable[[Inputs], Callable[[], Any]]] = {
        name: functools.partial(prepared, f, which=which) for name, f in forms.items()}
    if importlib.util.find_spec("torch") is not None and where in ("cpu", "gpu"):
        found["torch SDPA"] = functools.partial(_torch, which=which)
    return found


def _torch(x: Inputs, which: str) -> Callable[[], Any]:
    """torch's attention on the same numbers; a call waits for its result itself."""
    import torch

    place = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if place == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("torch SDPA: this torch has no CUDA")
    kind = getattr(torch, jnp.dtype(x.q.dtype).name)
    turned = lambda a: torch.from_numpy(
        np.array(a.astype(jnp.float32))).to(place, kind).transpose(1, 2)
    q, k, v, do = map(turned, x)
    f = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        is_causal=which != "decode", enable_gqa=q.shape[1] != k.shape[1])
    wait = torch.cuda.synchronize if place == "cuda" else lambda: None

    def call():
        if which != "both":
            with torch.no_grad():
                f(q, k, v)
        else:
            args = [a.detach().requires_grad_() for a in (q, k, v)]
            torch.autograd.grad(f(*args), args, do)
        wait()

    call()
    return call


def repeats(call: Callable[[], Any]) -> int:
    """How often a call has to be made to last long enough to be timed."""
    clock = time.perf_counter()
    jax.block_until_ready(call())
    return max(1, round(SECONDS / max(time.perf_counter() - clock, 1e-6)))


def seconds(call: Callable[[], Any], times: int) -> float:
    """Seconds of one call, of as many that are made one behind the other."""
    clock = time.perf_counter()
    for _ in range(times):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - clock) / times


def exact(attention: Any) -> bool:
    """Whether it does all the work of causal softmax attention, as the peers (None) do:
    flops say how fast."""
    return attention is None or (
        isinstance(attention, Softmax) and attention.mask == Causal())


def flops(x: Inputs, which: str) -> float:
    """Of causal attention, by the field's convention: half the matrix, and backward 2.5
    times forward."""
    b, t, h, d = x.q.shape
    work = 2 * b * h * t * x.k.shape[1] * (d + x.v.shape[3])
    return {"forward": work / 2, "both": work / 2 * 3.5, "decode": work}[which]


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
