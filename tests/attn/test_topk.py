"""Top-k and block top-k: which keys a token reads, by the authors' masks and loops."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract import dispatch
from attn.softmax import Softmax
from attn.topk import TopK
from experiments.measure import cost
from tests.compiled import attend, step
from tests.laws import close, inputs

VECTORS = pathlib.Path(__file__).parents[1] / "golden" / "kinetics.npz"


@functools.cache
def vectors():
    with np.load(VECTORS) as file:
        found = {name.partition("/")[2]: file[name] for name in file.files
                 if name.startswith("sparse0/")}
    return found | {"config": json.loads(str(found["config"]))}


@pytest.mark.parametrize("kind", ["topk", "block"])
@pytest.mark.parametrize("row", [0, 1])
def test_the_authors_keep_the_same(kind, row):
    """Queries with one channel each make any logits; values of one position each make
    the output the weights."""
    case = vectors()
    config, length = case["config"], int(case["lens"][row])
    h, heads = config["H"], config["K"]
    logits = np.where(np.isfinite(case["logits"][row]), case["logits"][row], 0)
    q = np.broadcast_to(np.eye(h), (1, length, h, h))
    k = np.zeros((1, length, heads, h))
    for head in range(h):
        k[0, :, head // (h // heads), head] = logits[head, :length]
    v = np.broadcast_to(np.eye(length)[None, :, None], (1, length, heads, length))
    q, k, v = (jnp.asarray(a, jnp.float32) for a in (q, k, v))
    fields = {"top_k": config["topk"], "block": 1}
    if kind == "block":
        fields = {"top_k": config["topk_block"], "block": config["block_size"]}
    attention = TopK(
        sink=config["sink"], local=config["local"], scale=1.0, **fields)
    want = case[f"{kind}_keep"][row][:, :length]
    state = attention.init_state(length, q, k, v)
    state, _ = step(attention, state, *(a[:, :-1] for a in (q, k, v)))
    _, o = step(attention, state, *(a[:, -1:] for a in (q, k, v)))
    assert ((np.asarray(o)[0, 0] > 0) == want).all()
    sparse = TopK(sink=config["sink"], local=config["local"], scale=1.0,
                  prefill="sparse", **fields)
    assert ((np.asarray(attend(sparse, q, k, v))[0, -1] > 0) == want).all()


def by_hand(attention, q, k, v):
    """The last token's output, in float64 loops."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    b, t, h, d = q.shape
    heads, o = k.shape[2], np.zeros((b, h, v.shape[3]))
    n = max(t - attention.sink - attention.local, 0) // attention.block
    end = attention.sink + n * attention.block
    for row, head in np.ndindex(b, heads):
        own = range(head * h // heads, (head + 1) * h // heads)
        s = np.stack([k[row, :, head] @ q[row, -1, a] for a in own]) / np.sqrt(d)
        score = s.mean(0)[attention.sink:end].reshape(n, -1).mean(1)
        kept = np.ones(t, bool)
        kept[attention.sink:end] = np.repeat(
            np.isin(np.arange(n), np.argsort(-score)[:attention.top_k]),
            attention.block)
        for a, x in zip(own, s):
            e = np.where(kept, np.exp(x - x.max()), 0)
            o[row, a] = e / e.sum() @ v[row, :, head]
    return o


@pytest.mark.parametrize("fields", [
    {"top_k": 3, "block": 4, "sink": 3, "local": 5},
    {"top_k": 5, "block": 1, "sink": 0, "local": 2},
    {"top_k": 50, "block": 4, "sink": 1, "local": 5},
])
def test_a_token_reads_what_the_rule_says(fields):
    attention, (q, k, v) = TopK(**fields), inputs(t=41)
    state = attention.init_state(64, q, k, v)
    state, o = step(attention, state, *(a[:, :40] for a in (q, k, v)))
    close(o, attend(Softmax(), *(a[:, :40] for a in (q, k, v))))
    _, o = step(attention, state, *(a[:, 40:] for a in (q, k, v)))
    close(o[:, 0], by_hand(attention, q, k, v))


@pytest.mark.parametrize("platform", ("tpu", "gpu"))
def test_a_token_is_read_by_the_kernel_of_few_queries(platform, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", platform)
    (q, k, v), found = inputs(t=41), []
    for implementation in ("xla", "pallas"):
        attention = TopK(3, 4, 2, 5, implementation=implementation)
        state = attention.init_state(41, q, k, v)
        state, _ = step(TopK(3, 4, 2, 5), state, *(a[:, :40] for a in (q, k, v)))
        found.append(step(attention, state, *(a[:, 40:] for a in (q, k, v)))[1])
    close(*found[::-1])


def test_a_new_sequence_forgets_the_sums_of_the_last():
    attention, (q, k, v) = TopK(1, 2, 1, 2), inputs(t=20)
    segments = jnp.where(jnp.arange(20) < 9, 1, 2)[None].repeat(2, 0)
    state = attention.init_state(20, q, k, v)
    state, _ = step(attention, state, q, k, v, segments=segments)
    alone = attention.init_state(20, q, k, v)
    alone, _ = step(attention, alone, *(a[:, 9:] for a in (q, k, v)))
    close(state.sums, alone.sums)


def test_a_token_costs_one_mean_key_a_block():
    shape = lambda t, h: jax.ShapeDtypeStruct((1, t, h, 64), jnp.float32)

    def work(size, attention):
        state = jax.eval_shape(
            lambda: attention.init_state(size, shape(1, 4), shape(1, 2), shape(1, 2)))
        return cost.flops(attention.step, state, shape(1, 4), shape(1, 2), shape(1, 2))

    growth = [(work(16384, a) - work(8192, a)) / 8192 for a in (TopK(), Softmax())]
    assert growth[0] < growth[1] / 20


@pytest.mark.parametrize("fields, message", [
    ({"top_k": 0}, "top_k=0"), ({"local": 0}, "local=0"), ({"sink": -1}, "sink=-1"),
    ({"prefill": "some"}, "prefill='some'"),
])
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        TopK(**fields)
