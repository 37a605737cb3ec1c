"""Head choice: which heads of a model keep all tokens, found on the model itself.

RazorAttention's criterion (Tang et al., 2024, arXiv:2407.15891) looks at the weights of
random tokens that repeat; DuoAttention (Xiao et al., 2024, arXiv:2410.10819) trains a
gate a head, the model frozen, on texts with numbers that are asked for at the end.
Scores are of key heads, of the layers of exact attention that see everything.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from attn import duo, razor
from attn.contract.view import Rows
from attn.masks import Causal
from attn.softmax import Softmax
from experiments.measure.asked import Reader, needles, repeats
from models.swap import inherited
from models.view import look

REPEATS = 4  # times that random tokens stand there, as in the paper
WEIGHT = 0.05  # of the sum of gates in the loss


def exact_layers(model: Any) -> list[int]:
    """The layers of exact attention that see everything."""
    return [n for n, a in enumerate(model.attention)
            if isinstance(a, Softmax) and a.visible == Causal()]


def placed(model: Any, entries: tuple) -> Any:
    """The model with one of the entries in each of its `exact_layers`; what else it
    has, as windows, stays."""
    layers = list(model.attention)
    for n, entry in zip(exact_layers(model), entries, strict=True):
        layers[n] = inherited(layers[n], entry)
    return model.clone(attention=tuple(layers))


def everywhere(model: Any, attention: Any) -> Any:
    """The model with one attention in all of its `exact_layers`."""
    return placed(model, (attention,) * len(exact_layers(model)))


def razor_scores(reader: Reader, block: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """(induction, echo) [layers,K] of the model, of one first token and `block` random
    ones four times; fewer where its rows are shorter."""
    model = reader.model
    block = max(2, min(block, (reader.length - 1) // REPEATS))
    random = reader.rng(7).integers(model.vocab, size=block)
    first = (reader.start or [0])[:1]
    tokens = jnp.asarray(np.r_[first, np.tile(random, REPEATS)])[None]
    layers = exact_layers(model)

    @jax.jit
    def of(params, tokens):
        _, seen = look(model, params, tokens, patterns={n: Rows() for n in layers})
        p = jnp.stack([seen[f"{n}/pattern"][0] for n in layers])  # [layers,H,T,T]
        return razor.head_scores(p, block)

    heads = model.kv_heads or model.heads
    induction, echo = (
        np.asarray(razor.by_key_head(a, heads)) for a in of(reader.params, tokens))
    return induction, echo


@dataclasses.dataclass(frozen=True)
class _Sunk:
    """Exact attention with another mask and the model's own logits without value."""

    mask: Any
    exact: Softmax
    sink: Any

    def __call__(self, q, k, v):
        """As `Softmax`."""
        exact = dataclasses.replace(self.exact, mask=self.mask)
        return exact(q, k, v, sink=self.sink)


class Gated(nn.Module):
    """Exact attention of the first half of the rows, the teacher's, and of the second
    one its heads mixed with streaming ones by gates alpha [K], which are parameters."""

    exact: Softmax
    sinks: int
    recent: int

    @nn.compact
    def __call__(self, q, k, v, *, x=None, segments=None, sink=None):
        """q [2B,T,H,D], k [2B,T,K,D], v [2B,T,K,V], sink [H] -> [2B,T,H,V]."""
        alpha = self.param("alpha", nn.initializers.ones, (k.shape[2],), jnp.float32)
        half = q.shape[0] // 2
        full = self.exact(q[:half], k[:half], v[:half], sink=sink)
        exact = _Sunk(self.exact.mask, self.exact, sink)
        mixed = duo.mixed(alpha, full, q[half:], k[half:], v[half:], sinks=self.sinks,
                          recent=self.recent, exact=exact)  # type: ignore[arg-type]
        return jnp.concatenate([full, mixed.astype(full.dtype)])


def duo_gates(reader: Reader, steps: int, facts: int, *, sinks: int = 4,
              recent: int = 16, batch: int = 2, rate: float = 0.02) -> np.ndarray:
    """Gates [layers,K] in [0, 1] after `steps` steps of the authors' training, on rows
    in which `facts` numbers are asked for (of a model without a tokenizer: on random
    tokens that repeat)."""
    layers = exact_layers(reader.model)
    heads = reader.model.kv_heads or reader.model.heads
    entries = list(reader.model.attention)
    for n in layers:
        entries[n] = Gated(entries[n], sinks, recent)
    student = reader.model.clone(attention=tuple(entries))

    def loss(alphas, params, tokens, labels):
        gated = _with_gates(params, layers, alphas)
        _, seen = look(student, gated, jnp.concatenate([tokens] * 2), read=["final"])
        final = student.apply(gated, seen["final"], method=_normed)
        half = len(tokens)
        gap = duo.distillation(final[:half], final[half:], labels)
        return gap + WEIGHT * duo.regularisation(alphas)

    optimizer = optax.adam(lambda n: rate * _schedule(n, steps))

    @jax.jit
    def step(alphas, state, params, tokens, labels):
        alphas = jnp.clip(alphas, 0, 1)
        grads = jax.grad(loss)(alphas, params, tokens, labels)
        change, state = optimizer.update(grads, state)
        return optax.apply_updates(alphas, change), state

    alphas = jnp.ones((len(layers), heads))
    state = optimizer.init(alphas)
    for n in range(steps):
        rows = [_row(reader, facts, 10**6 + batch * n + m) for m in range(batch)]
        tokens = jnp.asarray(np.stack([row.ids for row in rows]))
        labels = jnp.asarray(np.stack([row.asked for row in rows]))
        alphas, state = step(alphas, state, reader.params, tokens, labels)
    return np.clip(np.asarray(alphas), 0, 1)


def _schedule(n, steps: int):
    """The authors' schedule, of a traced step (`attn.duo.learning_rate`)."""
    fifth = steps / 5
    up, down = (jnp.maximum(a / fifth, 0.1) for a in (n + 1, steps - n))
    return jnp.minimum(1.0, jnp.minimum(up, down))


def _row(reader: Reader, facts: int, trial: int):
    if not len(reader.hay):
        return repeats(reader, reader.model.vocab, trial)
    return needles(reader, facts, trial)


def _normed(model: Any, x: jax.Array) -> jax.Array:
    return model.norm(x)


def _with_gates(params: Any, layers: list[int], alphas: jax.Array) -> Any:
    """The parameters with a gate a head in each of the layers."""
    own = dict(params["params"])
    own["layers"] = dict(own["layers"])
    for n, alpha in zip(layers, alphas):
        layer = dict(own["layers"][f"layer_{n}"])
        layer["mixer"] = {**layer["mixer"], "attention": {"alpha": alpha}}
        own["layers"][f"layer_{n}"] = layer
    return {**params, "params": own}
