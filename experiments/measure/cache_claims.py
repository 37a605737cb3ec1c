"""Cache claims: what papers of cache policies say of them, measured on one model.

Each part gives, for one seed, rows (setting, number). Facts are numbers of five digits
hidden in text, so that an answer has several tokens and is right as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attn import duo
from attn.contract.view import Rows
from attn.h2o import H2O
from attn.razor import Razor
from attn.recycled import Recycled
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from attn.streaming import Streaming
from experiments.measure import asked, head_choice
from experiments.measure.asked import Reader, Row
from experiments.measure.cache_budgets import SINKS, headed
from models.generate import stream
from models.view import look

Rated = list[tuple[str, float]]  # (setting, number)


def found(reader: Reader, attention: tuple, rows: list[Row], batch: int) -> float:
    """The share of answers that are right with these in the layers of exact attention
    that see everything."""
    model = head_choice.placed(reader.model, attention)
    return asked.score(dataclasses.replace(reader, model=model), rows, batch)[0]


def several(reader: Reader, trials: int, facts: int) -> list[Row]:
    """Rows of `facts` facts that are all asked for."""
    return asked.aligned(
        lambda own: [asked.needles(own, facts, n) for n in range(trials)], reader)


def everywhere(reader: Reader, attention: Any) -> tuple:
    """One attention for each layer of exact attention that sees everything."""
    return (attention,) * len(head_choice.exact_layers(reader.model))


def window_of(tokens: int) -> Streaming:
    """First and last tokens, at their true positions."""
    return Streaming(sinks=SINKS, window=max(1, tokens - SINKS), rebase=False)


def snapkv(reader: Reader, trials: int, facts: int, batch: int) -> Rated:
    """SnapKV (arXiv:2404.14469): one of many facts is asked for when the prompt's end
    has voted on what stays. Pooling keeps what stands beside a vote."""
    rows = asked.aligned(
        lambda own: [asked.one_of(own, facts, n) for n in range(trials)], reader)
    rated = [("exact", found(reader, everywhere(reader, Softmax()), rows, batch))]
    for part in (16, 8, 4):
        tokens = reader.length // part
        own = SnapKV(capacity=tokens, window=max(1, min(16, tokens // 4)))
        for name, one in (
            ("votes", dataclasses.replace(own, kernel=1)),
            ("pooled votes", own), ("first and last", window_of(tokens)),
        ):
            share = found(reader, everywhere(reader, one), rows, batch)
            rated.append((f"1/{part} by {name}", share))
    return rated


def recycled(reader: Reader, trials: int, facts: int, batch: int) -> Rated:
    """Recycled Attention (arXiv:2411.05787): an eighth of the keys a token, chosen
    anew at every stride-th one; of the weights of full attention it recovers so much.
    """
    tokens = reader.length // 8
    rows = several(reader, trials, facts)
    policies: dict[str, Any] = {
        "exact": Softmax(), "first and last": window_of(tokens),
        "H2O": H2O(heavy=tokens // 2, recent=tokens - tokens // 2),
    }
    for stride in (2, 4, 8, 16):
        policies[f"stride {stride}"] = Recycled(capacity=tokens, stride=stride)
    policies["by similarity"] = Recycled(
        capacity=tokens, schedule="similarity", check_every=5, threshold=0.8)
    rated = [(name, found(reader, everywhere(reader, one), rows, batch))
             for name, one in policies.items()]
    weights = [weights_of(reader, row) for row in rows[:2]]
    for stride in (2, 4, 8, 16):
        rated.append((f"weight recovered, stride {stride}", float(np.mean(
            [recovered(p, first, tokens, stride) for p, first in weights]))))
    near = [recent_weight(p, first, tokens) for p, first in weights]
    return [*rated, ("weight of first and last", float(np.mean(near)))]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _patterns(model: Any, params: Any, tokens: jax.Array, rows: tuple) -> jax.Array:
    layers = head_choice.exact_layers(model)
    _, seen = look(model, params, tokens,
                   patterns={n: Rows(rows=list(rows)) for n in layers})
    return jnp.stack([seen[f"{n}/pattern"][0] for n in layers])  # [layers,H,R,T]


def weights_of(reader: Reader, row: Row) -> tuple[np.ndarray, int]:
    """(weights [layers,H,R,T] of the queries from the first question on, its place)."""
    first = int(row.asked.argmax()) - 1
    rows = tuple(range(first, len(row.ids)))
    tokens = jnp.asarray(row.ids)[None]
    return np.asarray(_patterns(reader.model, reader.params, tokens, rows)), first


def recovered(p: np.ndarray, first: int, capacity: int, stride: int) -> float:
    """The mean weight that the recycled keys have between full steps. p
    [layers,H,R,T]: rows of full attention from position `first` on, of which every
    `stride`-th one is a full step; behind it the token comes, and its least goes."""
    rated = []
    for head in p.reshape(-1, *p.shape[2:]):
        for n, row in enumerate(head):
            if n % stride == 0:
                seen = row[:first + n + 1]
                kept = list(np.argsort(-seen, kind="stable")[:capacity])
                continue
            kept = [*kept, first + n]
            rated.append(row[kept].sum())
            if len(kept) > capacity:
                kept.pop(int(row[kept[:-1]].argmin()))
    return float(np.mean(rated))


def recent_weight(p: np.ndarray, first: int, capacity: int) -> float:
    """The mean weight of the first and last keys of the same number."""
    own = []
    for head in p.reshape(-1, *p.shape[2:]):
        for n, row in enumerate(head):
            end = first + n + 1
            near = row[max(SINKS, end - capacity + SINKS):end]
            own.append(row[:SINKS].sum() + near.sum())
    return float(np.mean(own))


def razor(reader: Reader, trials: int, facts: int, batch: int) -> Rated:
    """RazorAttention (arXiv:2407.15891): few heads show induction; with these whole
    the others lose little, with as many others whole much; one token for the rest
    brings the model nearer to itself."""
    known = head_choice.razor_scores(reader)
    rows = several(reader, trials, facts)
    copies = [asked.repeats(reader, reader.model.vocab, n) for n in range(trials)]
    share, own = headed("Razor", 0.3, reader.length, known)
    order = reader.rng(9).permutation(known[0].size)
    shuffled = tuple(a.ravel()[order].reshape(a.shape) for a in known)
    _, others = headed("Razor", 0.3, reader.length, shuffled)
    layers = len(known[0])
    rated = [("heads with induction above 0.3", float((known[0] > 0.3).mean())),
             ("heads below 0.1", float((known[0] < 0.1).mean())), ("memory", share)]
    for name, attention in (
        ("all heads whole", (Softmax(),) * layers), ("retrieval heads whole", own),
        ("others whole", others),
        ("none whole", everywhere(reader, window_of(round(share * reader.length)))),
    ):
        model = head_choice.placed(reader.model, attention)
        placed = dataclasses.replace(reader, model=model)
        rated += [(f"facts, {name}", asked.score(placed, rows, batch)[0]),
                  (f"repeats, {name}", asked.score(placed, copies, batch)[1])]
    for name, one in (("dropped", False), ("folded into one token", True)):
        attention = tuple(dataclasses.replace(a, compensate=one) for a in own)
        assert all(isinstance(a, Razor) for a in attention)
        rated.append((f"nats apart, the rest {name}",
                      divergence(reader, attention, trials, batch)))
    return rated


def divergence(reader: Reader, attention: tuple, rows: int, batch: int) -> float:
    """KL of the model's next tokens to those with other attentions, in nats a token,
    over the second half of rows of text, which comes token by token."""
    other, half = head_choice.placed(reader.model, attention), reader.length // 2
    room, total = reader.length - len(reader.start), []
    for at in range(0, rows, batch):
        ids = [np.concatenate([reader.start, reader.piece(reader.rng(5, n), room)])
               for n in range(at, min(at + batch, rows))]
        total.append(float(_apart(reader.model, other, reader.params,
                                  jnp.asarray(np.stack(ids), jnp.int32), half)))
    return float(np.mean(total))


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _apart(model: Any, other: Any, params: Any, tokens: jax.Array, half: int):
    own, told = (jax.nn.log_softmax(stream(each, params, tokens, half)[:, half:])
                 for each in (model, other))
    return (jnp.exp(own) * (own - told)).sum(-1).mean()


def duo_heads(reader: Reader, trials: int, facts: int, batch: int, steps: int) -> Rated:
    """DuoAttention (arXiv:2410.10819): heads chosen by gates that were trained, against
    heads by the weight they give to what is far, and heads at random."""
    gates = head_choice.duo_gates(reader, steps, facts)
    rows = several(reader, trials, facts)
    far = np.mean([far_weight(reader, row) for row in rows[:4]], 0)
    drawn = reader.rng(9).random(gates.shape)
    rated = [("gates above 0.9", float((gates > 0.9).mean())),
             ("gates below 0.1", float((gates < 0.1).mean()))]
    for part in (8, 4, 2):
        for name, score in (("gates", gates), ("weight", far), ("chance", drawn)):
            chosen = duo.selected(score, 1 - 1 / part)
            attention = tuple(
                duo.Duo(retrieval=tuple(int(h) for h in np.flatnonzero(row)),
                        sinks=SINKS, recent=16) for row in chosen)
            rated.append((f"1/{part} of the heads by {name}",
                          found(reader, attention, rows, batch)))
    return rated


def far_weight(reader: Reader, row: Row) -> np.ndarray:
    """The mean weight [layers,K] that heads give to keys which a streaming head lacks,
    as the greatest of a group."""
    p, first = weights_of(reader, row)
    at = first + np.arange(p.shape[2])[:, None]
    key = np.arange(p.shape[3])
    far = (key >= SINKS) & (key <= at - 16)
    rated = np.where(far, p, 0).sum(-1).mean(-1)  # [layers,H]
    heads = reader.model.kv_heads or reader.model.heads
    return rated.reshape(len(p), heads, -1).max(-1)


PARTS: dict[str, Callable[..., Rated]] = {
    "snapkv": snapkv, "recycled": recycled, "razor": razor, "duo": duo_heads,
}
