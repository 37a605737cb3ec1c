"""The layers above the kernels: every attention as users call it, and a small hybrid
that takes a step and writes tokens, on the device and by XLA on this machine's CPU."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attn.aaren import Aaren
from attn.based import Based
from attn.delta import Delta
from attn.flow import Flow
from attn.gla import GLA
from attn.landmark import Landmark
from attn.lightning import Lightning
from attn.lightnet import LightNet
from attn.lineartransformer import LinearTransformer
from attn.masks import Causal, Window
from attn.rat import RAT
from attn.retnet import RetNet
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from experiments.measure import timing
from experiments.measure.device.case import F32, Bench, Case, Row, Wrong, normal
from experiments.measure.device.place import Place
from models.generate import generate
from models.lm import LM

ATTENTIONS = (
    Softmax(), Softmax(mask=Causal() & Window(40)), Lightning(), RetNet(), Based(),
    Flow(), GLA(), Delta(gated=True), RAT(), Aaren(), LightNet(), LinearTransformer(),
    Landmark(), SnapKV(capacity=32, window=8),
)
CLOSE, GRADIENT = 2e-5, 4e-5  # both sides are off by as much as a law allows one
TOKENS = 32


def cases(place: Place) -> Iterator[Case]:
    """Each attention, and the model."""
    for n, attention in enumerate(ATTENTIONS):
        name = type(attention).__name__
        more = " window" if n == 1 else ""
        yield Case(f"layer {name}{more}",
                   functools.partial(_attention, attention), tier=2)
    yield Case("layer a hybrid's step and tokens", _hybrid, tier=1)


def by_xla(attention: Any) -> Any:
    """The attention with XLA's implementation of all that it does."""
    if isinstance(attention, nn.Module):
        return attention.clone(implementation="xla", parent=None)
    return dataclasses.replace(attention, implementation="xla")


def _attention(attention: Any, bench: Bench) -> Row:
    """o, and the gradients of q, k and v."""
    q, k, v = (normal(n, 2, 100, h, 16, dtype=F32) for n, h in enumerate((4, 2, 2)))
    x = timing.Inputs(q, k, v, normal(4, *q.shape, dtype=F32))

    def run(attention: Any) -> Any:
        f, more = timing.bound(attention, x)

        def both(*args):
            o, back = jax.vjp(f, *args)
            return o, back(x.do)[:3]

        return jax.jit(both)(*x[:3], *more)

    return _compared(bench, lambda: run(attention), lambda: run(by_xla(attention)))


def _hybrid(bench: Bench) -> Row:
    """The loss, its gradients, and the tokens that follow a text, the likeliest each.
    """
    layers = Delta(gated=True), Softmax(), GLA(), Softmax(mask=Causal() & Window(16))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 48)), jnp.int32)

    def run(layers: tuple) -> Any:
        model = LM(vocab=64, width=64, heads=4, attention=layers)
        params = jax.jit(model.init)(jax.random.key(0), ids)

        def loss(params):
            found: Any = model.apply(params, ids)
            logits = jax.nn.log_softmax(found[:, :-1])
            return -jnp.take_along_axis(logits, ids[:, 1:, None], 2).mean()

        value, grads = jax.jit(jax.value_and_grad(loss))(params)
        texts = generate(model, params, ids.tolist(), length=TOKENS, temperature=0.0)
        return value, (grads, jnp.asarray(texts, F32))

    return _compared(bench, lambda: run(layers),
                     lambda: run(tuple(map(by_xla, layers))))


def _compared(bench: Bench, ours: Callable, reference: Callable) -> Row:
    """The row of (result, gradients) here and on the CPU, in float32."""
    with jax.default_matmul_precision("highest"):
        with bench.alone():
            have = jax.device_get(ours())
        with jax.default_device(jax.devices("cpu")[0]):
            want = jax.device_get(reference())
    worst = {}
    bounds = {"result": CLOSE, "gradients": GRADIENT}
    for (name, bound), a, b in zip(bounds.items(), have, want):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
        worst[name] = max(_apart(*pair) for pair in pairs)
        if not worst[name] <= bound:
            raise Wrong(f"{name}: {worst[name]:.1e} from the CPU's, at most {bound}")
    return {"errors": {name: f"{error:.1e}" for name, error in worst.items()}}


def _apart(a: Any, b: Any) -> float:
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-6)
