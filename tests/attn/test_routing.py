"""Routing: clusters by loops, what a later token changes, and centroids that follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.layers import MultiHead
from attn.routing import Routing
from attn.sparse import kmeans, routed
from experiments.measure import cost
from models.lm import LM
from tests.laws import close, gradients

B, T, H, K, D, V = 2, 23, 4, 2, 8, 6
SEGMENTS = np.array([
    [1] * 3 + [0] * 2 + [1] * 5 + [2] * 9 + [0] + [3] * 3, [0] * 2 + [4] * 6 + [2] * 15,
])


def inputs(t=T, s=T):
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = (B, t, H, D), (B, s, K, D), (B, s, K, V)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def drawn(attention, q, k, v):
    """Its variables, and a compiled call."""
    params = jax.jit(attention.init)(jax.random.key(3), q, k, v)
    return params, jax.jit(attention.apply)


def norm(a, how):
    if how == "unit":
        return a / np.linalg.norm(a, axis=-1, keepdims=True)
    a = a - a.mean(-1, keepdims=True)
    return a / np.sqrt((a * a).mean(-1, keepdims=True) + 1e-6)


def best(score, among, window):
    """The `window` tokens of `among` that score highest, the older first if equal."""
    return sorted(among, key=lambda j: (-score[j], j))[:window]


def by_loops(attention, params, q, k, v, seg):
    """Section 1 of the mechanism, token by token, in float64. seg: of q and of k."""
    mean = np.asarray(params["centroids"]["kmeans"]["mean"], np.float64)
    memory = params.get("params", {})
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k = q if attention.share_qk else np.repeat(k, H // K, 2)
    v = np.repeat(v, H // K, 2)
    qn, kn = norm(q, attention.norm), norm(k, attention.norm)
    unit, share = attention.norm == "unit", attention.share_qk
    a, b_ = (q, kn if share else k) if unit else (qn, kn)
    scale = D ** -0.5 if unit else 1
    o = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, h in np.ndindex(q.shape[:3]):
        if not seg[0][b, t]:
            continue
        mine, theirs = (np.nonzero(s[b] == seg[0][b, t])[0] for s in seg)
        if attention.members == "prefix":
            mine, theirs = (x[x <= t] for x in (mine, theirs))
        total, count = 0, 0
        for c in range(attention.clusters):
            w = attention.window
            if t not in best(qn[b, :, h] @ mean[h, c], mine, w):
                continue
            read = best(kn[b, :, h] @ mean[h, c], theirs, w)
            if attention.causal:
                read = [j for j in read if j <= t]
            if unit and share and len(read) > 1:
                read = [j for j in read if j != t]
            logit = [a[b, t, h] @ b_[b, j, h] * scale for j in read]
            values = [v[b, j, h] for j in read]
            if attention.memory:
                mk, mv = (np.asarray(memory[f"memory_{n}"], np.float64)[h, c]
                          for n in "kv")
                logit += list(mk @ a[b, t, h] * scale)
                values += list(mv)
            count += 1
            if logit:
                e = np.exp(np.array(logit) - max(logit))
                total = total + e @ np.array(values) / e.sum()
        o[b, t, h] = total / (count + attention.eps) if count else 0
    return o


@pytest.mark.parametrize("attention", [
    Routing(clusters=3, window=5),
    Routing(clusters=3, window=4, share_qk=False, causal=False),
    Routing(clusters=2, window=4, norm="unit", eps=1e-5),
    Routing(clusters=2, window=4, norm="unit", share_qk=False, memory=2),
    Routing(clusters=3, window=5, members="prefix"),
    Routing(clusters=3, window=3, members="prefix", share_qk=False),
    Routing(clusters=2, window=4, members="prefix", norm="unit"),
    Routing(clusters=2, window=4, members="prefix", norm="unit", share_qk=False,
            memory=1),
], ids=lambda a: f"{a.members}-{a.norm}-{a.share_qk}-{a.causal}")
@pytest.mark.parametrize("packed", [False, True])
def test_clusters_by_loops(attention, packed):
    q, k, v = inputs()
    params, call = drawn(attention, q, k, v)
    seg = SEGMENTS if packed else np.ones((B, T), int)
    o = call(params, q, k, v, segments=jnp.asarray(seg) if packed else None)
    close(o, by_loops(attention, params, q, k, v, (seg,) * 2))


def test_a_context_is_routed_by_the_same_centroids():
    attention = Routing(clusters=2, window=5, share_qk=False, causal=False)
    q, k, v = inputs(s=17)
    params, call = drawn(attention, q, k, v)
    seg = SEGMENTS, np.array([[1] * 7 + [2] * 8 + [0] * 2, [2] * 9 + [4] * 8])
    o = call(params, q, k, v, segments=tuple(map(jnp.asarray, seg)))
    close(o, by_loops(attention, params, q, k, v, seg))
    with pytest.raises(ValueError, match="T must be S"):
        attention.clone(share_qk=True).apply(params, q, k, v)


def test_a_later_token_takes_a_place_unless_members_are_of_the_prefix():
    """No gradient flows through the choice: the future is changed instead."""
    q, k, v = inputs()
    changed = [a.at[:, 15:].multiply(-3.0) for a in (q, k, v)]
    for members, same in (("whole", False), ("prefix", True)):
        attention = Routing(clusters=3, window=5, members=members, share_qk=False)
        params, call = drawn(attention, q, k, v)
        before, after = (call(params, *args)[:, :15] for args in ((q, k, v), changed))
        assert (np.asarray(before) == np.asarray(after)).all() == same


def test_a_stream_reads_lists_that_do_not_grow():
    attention = Routing(clusters=3, window=4, members="prefix", local=2, local_block=4)
    q, k, v = inputs()
    params, call = drawn(attention, q, k, v)
    step = jax.jit(lambda state, *args: attention.apply(
        params, state, *args, method="step"))
    state, outs, at = attention.init_state(T, q, k, v), [], 0
    assert state.lists.k.shape == (B, 2, 3, 4, D)
    for n in (1, 9, 1, 12):
        state, o = step(state, *(a[:, at:at + n] for a in (q, k, v)))
        outs.append(o)
        at += n
    close(jnp.concatenate(outs, 1), call(params, q, k, v))
    # the same of "whole", whose stream cannot know what comes
    other = attention.clone(members="whole")
    _, o = other.apply(params, other.init_state(T, q, k, v), q, k, v, method="step")
    close(o, call(params, q, k, v))


def test_local_heads_are_the_last_and_read_their_neighbourhood():
    q, k, v = inputs()
    attention = Routing(clusters=2, window=4, local=3, local_block=4, causal=False,
                        flange=1)
    params, call = drawn(attention, q, k, v)
    far = jnp.zeros_like(v).at[:, :8].set(9.0)
    moved = np.abs(np.asarray(call(params, q, k, v + far) - call(params, q, k, v)))
    assert (moved[:, 12:, 1:] == 0).all() and (moved[:, :12, 1:].max(-1) > 0).all()
    assert params["centroids"]["kmeans"]["mean"].shape == (1, 2, D)


def test_time_grows_as_t_to_the_power_of_three_halves():
    """With sqrt(T) clusters of sqrt(T) members."""
    work = []
    for t in (1024, 4096, 16384):
        root = int(t ** 0.5)
        q, k, v = (jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32) for _ in range(3))
        attention = Routing(clusters=root, window=root)
        params = jax.eval_shape(attention.init, jax.random.key(0), q, k, v)
        work.append(cost.flops(attention.apply, params, q, k, v))
    # lengths grow by 4: the slope by 2 is half of that by 4
    assert abs(cost.slope(work) / 2 - 1.5) < 0.1


def mass(q, members):
    """The share of the weight of softmax(q q) that lies within shared clusters."""
    s = np.einsum("btd,bsd->bts", *(np.asarray(q[:, :, 0], np.float64),) * 2)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    own = np.zeros_like(p, bool)
    for b, cluster in enumerate(np.asarray(members)[:, 0]):
        for at in cluster:
            own[b][np.ix_(at, at)] = True
    return (p * own).sum(-1).mean()


def test_centroids_that_follow_find_more_of_the_weight():
    """The spec's claim (b): the covered mass of true softmax weights rises."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(8, 16))
    q = kinds[rng.integers(0, 8, (4, 128))] + 0.3 * rng.normal(size=(4, 128, 16))
    q = kmeans.normalised(jnp.asarray(q[:, :, None], jnp.float32), "layer")
    centroids = kmeans.random(jax.random.key(2), (1, 8, 16), "layer")

    @jax.jit
    def learn(centroids):
        def step(c, _):
            return kmeans.follow(c, q, 0.9, "layer"), None
        return jax.lax.scan(step, centroids, None, length=100)[0]

    before, after = (mass(q, routed.members(kmeans.scores(q, c.mean), 16))
                     for c in (centroids, learn(centroids)))
    print(f"weight within clusters: {before:.2f} at first, {after:.2f} at last")
    assert after > before + 0.1


def test_centroids_move_only_where_they_are_mutable_and_by_real_tokens():
    layer = MultiHead(Routing(clusters=3, window=5), heads=4, position=None)
    x = jax.random.normal(jax.random.key(0), (B, T, 32))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    y, after = layer.apply(variables, x, mutable=["centroids", "losses"])
    close(y, layer.apply(variables, x))
    moved = after["centroids"]["attention"]["kmeans"]
    first = variables["centroids"]["attention"]["kmeans"]
    assert np.abs(moved["mean"] - first["mean"]).max() > 0
    assert float(after["losses"]["attention"]["kmeans"]["commitment"][0]) > 0
    # numbers are counted by (1 - decay) per token of a head
    np.testing.assert_allclose(moved["number"].sum(-1), 0.001 * B * T, rtol=1e-5)
    _, after = layer.apply(
        variables, x, segments=jnp.asarray(SEGMENTS), mutable=["centroids"])
    np.testing.assert_allclose(
        after["centroids"]["attention"]["kmeans"]["number"].sum(-1),
        0.001 * (SEGMENTS > 0).sum(), rtol=1e-5)


def test_the_loss_pulls_vectors_to_their_centroids():
    attention = Routing(clusters=3, window=5, beta=1.0)
    q, k, v = inputs()
    params, _ = drawn(attention, q, k, v)

    def loss(q):
        _, after = attention.apply(params, q, k, v, mutable=["losses"])
        return after["losses"]["kmeans"]["commitment"][0]

    grad = jax.grad(loss)(q)
    assert loss(q - 0.5 * grad / jnp.abs(grad).max()) < loss(q)
    assert all(np.isfinite(a).all() for a in gradients(
        lambda *args: attention.apply(params, *args), q, k, v))


def test_a_model_of_routed_layers_trains_and_generates():
    model = LM(vocab=11, width=16, heads=2, hidden=16, attention=(
        Routing(clusters=2, window=4, members="prefix", local=1, local_block=4),))
    tokens = jnp.arange(12)[None] % 11
    variables = jax.jit(model.init)(jax.random.key(0), tokens)

    @jax.jit
    def read(variables, tokens):
        return model.apply(variables, tokens, mutable=["centroids", "losses"])

    logits, after = read(variables, tokens)
    assert logits.shape == (1, 12, 11) and set(after) == {"centroids", "losses"}
    variables = variables | {"centroids": after["centroids"]}
    assert np.isfinite(read(variables, tokens)[0]).all()


@pytest.mark.parametrize("fields, message", [
    ({"memory": 1}, "memory=1, norm='layer': expected norm='unit'"),
    ({"members": "prefix", "causal": False}, "expected members='whole'"),
    ({"members": "some"}, "members='some'.*expected"),
    ({"norm": "batch"}, "norm='batch'.*expected"),
])
def test_wrong_fields_say_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        Routing(**fields)
    with pytest.raises(ValueError, match="local=5: expected at most H=4"):
        Routing(local=5).init(jax.random.key(0), *inputs())
