"""LASP-2: a recurrence over a mesh is the recurrence, and one state a shard crosses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract import dispatch
from attn.contract.segments import locate
from attn.lightning import Lightning
from attn.parallel.sharding import TILE, over_mesh, stacked
from attn.recurrent import delta_rule, linear
from attn.recurrent.causal import linear_attention, linear_attention_step
from attn.recurrent.linear import LinearState
from attn.recurrent.noncausal import noncausal
from attn.recurrent.shortconv import shortconv, shortconvs
from experiments.measure.collectives import collectives
from tests.oracles.linear import (
    B, D, FORWARD, GRADIENT, H, K, RUNS, V, close, inputs, like, per_channel, recurrence
)
from tests.laws import ENTRIES, given
from tests.oracles import delta_rule as delta_oracle

KINDS = ("none", "head", "token", "channel")
FORMS = ("plain", "packed", "stream")


def mesh(shards, axes=("data", "seq", "model"), sizes=None):
    sizes = sizes or (1, shards, 1)
    return jax.make_mesh(
        sizes, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
        devices=jax.devices()[:int(np.prod(sizes))],
    )


def letters(g):
    return {None: ".", 1: "H", 3: "BTH", 4: "BTHD"}[None if g is None else g.ndim]


def split(state, q, k, v, g, segment=None, axis="seq", **how):
    """(state, o) of `recurrence` over the mesh in force."""
    f = lambda s, q, k, v, g, segment: linear.recurrence(
        q, k, v, g, state=s, segment=segment, axis=axis, chunk=4, **how)
    words = f"BHDV BTHD BTKD BTKV {letters(g)} BT -> BHDV BTHV"
    return over_mesh(f, words, axis)(state, q, k, v, g, segment)


def held(shards, kind, form, t=16, axis="seq", over=None):
    """Outputs and all gradients against the float64 recurrence."""
    q, k, v, g, state, d_o, d_state = inputs(t, kind)
    packed, streams = form != "plain", form == "stream"
    segment = np.array(RUNS[t] if packed else np.ones((B, t)), np.int32)
    if not streams:
        state, d_state = np.zeros_like(state), np.zeros_like(d_state)
    want, grads = recurrence(q, k, v, per_channel(g, t), state, segment, d_o, d_state)
    runs = jnp.asarray(segment) if packed else None

    @jax.jit
    def both(args):
        out, back = jax.vjp(lambda *a: split(*a, runs, axis), *args)
        return out, back((d_state if streams else None, d_o))

    with jax.set_mesh(over or mesh(shards)):
        have, back = both((state if streams else None, q, k, v, g))
    close(have[1], want[1])
    if streams:
        close(have[0], want[0]), close(back[0], grads[4], GRADIENT)
    for a, b in zip(back[1:4], grads):
        close(a, b, GRADIENT)
    if g is not None:
        close(back[4], like(grads[3], g), GRADIENT)


@pytest.mark.parametrize("shards", (1, 2, 4, 8))
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_is_one_device(shards, kind):
    # three forms take turns on four kinds and four meshes
    turn = KINDS.index(kind) + shards.bit_length()
    held(shards, kind, FORMS[turn % 3])


@pytest.mark.parametrize("kind, form", [
    ("strong", "stream"), ("mixed", "stream"), ("mixed channel", "packed"),
])
def test_strong_decay_is_exact(kind, form):
    held(4, kind, form)


def test_two_mesh_axes_are_one():
    sizes = mesh(4, ("data", "far", "near", "model"), (1, 2, 2, 1))
    held(4, "channel", "stream", axis=("far", "near"), over=sizes)


@pytest.mark.parametrize("kind", ["none", "channel"])
def test_a_token_a_shard(kind):
    q, k, v, g, state, *_ = inputs(8, kind)
    want = linear.recurrence(q, k, v, g, state=state)
    with jax.set_mesh(mesh(8)):
        have = jax.jit(split)(state, q, k, v, g)
    for a, b in zip(have, want):
        close(a, b)


def test_only_padding():
    q, k, v, g, state, *_ = inputs(8, "token")
    with jax.set_mesh(mesh(4)):
        after, o = jax.jit(split)(state, q, k, v, g, jnp.zeros((B, 8), jnp.int32))
    close(after, state)
    assert not np.asarray(o).any()


def test_low_precision_gathers_float32():
    q, k, v, g, state, *_ = inputs(16, "token")
    low = tuple(jnp.asarray(a, jnp.bfloat16) for a in (q, k, v))
    want = linear.recurrence(*low, g, state=state)
    f = functools.partial(split, dtype=jnp.bfloat16)
    with jax.set_mesh(mesh(8)), jax.numpy_dtype_promotion("strict"):
        after, o = jax.jit(f)(state, *low, g)
    assert after.dtype == jnp.float32 and o.dtype == jnp.bfloat16
    close(after, want[0]), close(o.astype(jnp.float32), want[1], 2**-8)


@pytest.mark.parametrize("shards", (1, 2, 4, 8))
def test_without_order(shards):
    q, k, v, *_, d_o, _ = inputs(16)
    a, b, c = (np.asarray(x, np.float64) for x in (q, k, v))
    state = np.einsum("bskd,bskv->bkdv", b, c)
    wide = lambda x: np.repeat(x, H // K, 1)
    d_state = np.einsum("bthd,bthv->bhdv", a, d_o).reshape(B, K, -1, D, V).sum(2)
    want = (
        np.einsum("bthd,bhdv->bthv", a, wide(state)),
        np.einsum("bthv,bhdv->bthd", d_o, wide(state)),
        np.einsum("bskv,bkdv->bskd", c, d_state),
        np.einsum("bskd,bkdv->bskv", b, d_state),
    )
    with jax.set_mesh(mesh(shards)):
        sums = lambda *x: noncausal(*x, axis="seq")
        f = over_mesh(sums, "BTHD BSKD BSKV -> BTHV", "seq")
        o, back = jax.vjp(jax.jit(f), q, k, v)
        for x, y in zip((o, *back(d_o)), want):
            close(x, y, GRADIENT)


def test_reading_backwards_takes_no_state():
    q, k, v, g, state, *_ = inputs(4)
    with pytest.raises(ValueError, match="reverse=True with a state"):
        linear.recurrence(q, k, v, g, state=state, reverse=True)


def packed(*numbers):
    """Bytes of a gather of what eight shards pack into rows of whole tiles."""
    return 8 * -(-sum(numbers) // TILE) * TILE * 4


def moved(f, *shapes, shards=8):
    """Collectives of f and of its gradient, compiled for arrays split over tokens."""
    with jax.set_mesh(devices := mesh(shards)):
        home = jax.sharding.NamedSharding(devices, jax.P(None, "seq"))
        args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=home) for s in shapes]
        own = tuple(range(len(args)))
        loss = lambda *a: (f(*a).astype(jnp.float32) ** 2).sum()
        text = lambda f: jax.jit(f).lower(*args).compile().as_text()
        ahead, both = (collectives(text(g)) for g in (f, jax.grad(loss, own)))
    small = lambda found: {kind: sorted(n for n in sizes if n > 4)
                           for kind, sizes in found.items() if max(sizes) > 4}
    return small(ahead), small(both)


@pytest.mark.parametrize("kind", KINDS)
def test_one_state_crosses_each_way_whatever_the_length(kind):
    state = 8 * B * H * D * V * 4
    # one state serves the query heads of a key head
    state = state * K // H if kind == "none" else state
    # decays travel with the state
    beside = {"token": B * H, "channel": B * H * D}.get(kind)
    sent = state if beside is None else packed(B * H * D * V, beside)
    shape = {"token": (B, 0, H), "channel": (B, 0, H, D)}.get(kind)
    fixed = -jnp.ones((H,)) if kind == "head" else None
    f = lambda q, k, v, *g: linear_attention(q, k, v, g[0] if g else fixed, axis="seq")
    for t in (16, 64):
        shapes = [(B, t, H, D), (B, t, K, D), (B, t, K, V)]
        shapes += [] if shape is None else [(B, t, *shape[2:])]
        ahead, both = moved(f, *shapes)
        assert ahead == {"all-gather": [sent]}
        assert both == {"all-gather": sorted([sent, state])}


FORWARD_AND_BACK = {
    "lightning": 1, "retnet": 1, "gla": 1, "based": 1, "aaren": 1, "lightnet": 2,
    "flow": 4,
}


@pytest.mark.parametrize("name", FORWARD_AND_BACK)
def test_no_family_moves_tokens(name):
    f = given(ENTRIES[name].attention, axis="seq")
    found = [moved(f, (B, t, H, D), (B, t, K, D), (B, t, K, V)) for t in (16, 64)]
    assert found[0] == found[1]  # nothing depends on the length
    for collected, times in zip(found[0], (1, 2)):
        assert list(collected) == ["all-gather"]
        assert len(collected["all-gather"]) == times * FORWARD_AND_BACK[name]


def test_the_delta_rule_moves_two_matrices_and_a_halo():
    f = given(ENTRIES["delta"].attention, axis="seq")
    halo, state = 3 * B * (H * D + K * D + K * V) * 4, 8 * B * H * D * V * 4
    both_matrices = packed(B * H * D * (D + V))
    for t in (32, 64):
        ahead, both = moved(f, (B, t, H, D), (B, t, K, D), (B, t, K, V))
        assert ahead == {"all-gather": [both_matrices], "collective-permute": [halo]}
        assert both == {"all-gather": [state, both_matrices],
                        "collective-permute": [halo] * 2}


def test_without_order_one_sum_crosses_each_way():
    for t in (16, 64):
        found = moved(Lightning(slopes="none", causal=False, axis="seq"),
                      (B, t, H, D), (B, t, K, D), (B, t, K, V))
        for times, collected in enumerate(found, 1):
            assert collected == {"all-reduce": [B * K * D * V * 4] * times}


def test_what_travels_together_comes_back():
    tree = {"a": jnp.arange(8.0).reshape(4, 2), "n": jnp.arange(4) * 2**28 - 7,
            "b": jnp.full((4, 1, 3), -jnp.inf)}
    f = lambda tree: jax.tree.map(lambda a: a[None], stacked(tree, "seq"))
    with jax.set_mesh(mesh(4)):
        spec = jax.P("seq")
        found = jax.shard_map(f, in_specs=spec, out_specs=spec, check_vma=False)(tree)
    for name, a in tree.items():
        assert found[name].dtype == a.dtype
        for shard in np.asarray(found[name]):
            np.testing.assert_array_equal(shard.reshape(a.shape), a)


def test_a_prompt_that_cannot_be_split_runs_in_the_global_view():
    q, k, v, g, state, *_ = inputs(5, "token")
    zero = jnp.zeros((B,), jnp.int32)
    begin = LinearState(jnp.asarray(state), zero, zero + 1)
    with jax.set_mesh(mesh(4)):
        step = jax.jit(lambda *a: linear_attention_step(*a, axis="seq"))
        after, o = step(begin, q, k, v, g)
    want, rows = linear_attention_step(begin, q, k, v, g)
    close(o, rows), close(after.memory, want.memory)


def delta_split(state, q, k, v, beta, g, segment=None, **how):
    f = lambda s, q, k, v, beta, g, segment: delta_rule.recurrence(
        q, k, v, beta, g, state=s, segment=segment, chunk=4, axis="seq", scale=0.5,
        **how,
    )
    words = f"BHDV BTHD BTKD BTKV BTH {letters(g)} BT -> BHDV BTHV"
    return over_mesh(f, words, "seq")(state, q, k, v, beta, g, segment)


@pytest.mark.parametrize("shards, kind, packed, streams", [
    (1, "none", True, True), (2, "token", True, True), (4, "head", False, True),
    (8, "mixed", True, True), (8, "none", False, False), (4, "token", True, False),
    (4, "strong", False, False),
])
def test_the_delta_rule_over_a_mesh(shards, kind, packed, streams):
    t = 16
    *args, d_o, d_state = delta_oracle.inputs(t, kind, 2.0)
    segment = np.array(RUNS[t] if packed else np.ones((delta_oracle.B, t)), np.int32)
    if not streams:
        args[5], d_state = np.zeros_like(args[5]), np.zeros_like(d_state)
    g = np.float64(0) if args[4] is None else args[4]
    want, grads = delta_oracle.recurrence(
        *args[:4], g, args[5], segment, 0.5, d_o, d_state
    )
    runs = jnp.asarray(segment) if packed else None

    @jax.jit
    def both(q, k, v, beta, g, state):
        f = lambda q, k, v, beta, g, state: delta_split(
            state if streams else None, q, k, v, beta, g, runs)
        out, back = jax.vjp(f, q, k, v, beta, g, state)
        return out, back((d_state if streams else None, d_o))

    with jax.set_mesh(mesh(shards)):
        out, back = both(*args)
    if not streams:  # neither a state went in nor one came out
        out, back = (want[0], out[1]), (*back[:5], grads[5])
    delta_oracle.held(out, back, want, grads, args[4])


@pytest.mark.parametrize("platform", ("tpu", "gpu"))
@pytest.mark.parametrize("rule", ("linear", "delta", "wide delta"))
def test_the_kernels_over_a_mesh(platform, rule, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", platform)
    t, segment = 16, jnp.asarray(RUNS[16], jnp.int32)
    if rule == "linear":
        q, k, v, g, state, d_o, d_state = inputs(t, "token")
        f, args = split, (state, q, k, v, g)
    else:
        if rule == "wide delta":  # two calls, where values and D are too many columns
            monkeypatch.setattr("attn.recurrent.delta_rule.WIDEST", 16)
        *args, d_o, d_state = delta_oracle.inputs(t, "token", 1.0)
        f, args = delta_split, (args[5], *args[:5])

    def both(implementation):
        g = lambda *a: f(*a, segment, implementation=implementation)

        @jax.jit
        def all_of_it(*args):
            out, back = jax.vjp(g, *args)
            return *out, *back((d_state, d_o))

        return all_of_it(*args)

    with jax.set_mesh(mesh(4)):
        for a, b in zip(both("pallas"), both("xla")):
            close(a, b, GRADIENT)


@pytest.mark.parametrize("shards", (2, 4, 8))
@pytest.mark.parametrize("form", FORMS)
def test_a_short_convolution_over_a_mesh(shards, form):
    axis = ("far", "near") if shards == 4 else "seq"
    over = mesh(4, ("far", "near"), (2, 2)) if shards == 4 else mesh(shards)
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    xs, ws = [normal(2, 16, c) for c in (3, 5)], [normal(4, c) for c in (3, 5)]
    states = [normal(2, 3, c) for c in (3, 5)] if form == "stream" else None
    segments = [[1] * 5 + [0] * 5 + [1] * 3 + [2] * 3, [0] * 2 + [1] * 13 + [2]]
    segment = locate(jnp.asarray(segments), 2, 16).segment if form != "plain" else None
    words = "BT. BT. .. .. B.. B.. BT -> B.. B.. BT. BT."

    def f(a, b, u, w, s, r, segment):
        before = (s, r) if states else None
        after, ys = shortconvs(
            (a, b), (u, w), states=before, segment=segment, axis=axis
        )
        return *(after or (None, None)), *ys

    with jax.set_mesh(over):
        found = jax.jit(over_mesh(f, words, axis))(
            *xs, *ws, *(states or (None, None)), segment)
    for i, (x, w) in enumerate(zip(xs, ws)):
        after, y = shortconv(x, w, state=states and states[i], segment=segment)
        close(found[2 + i], y, FORWARD)
        if states:
            close(found[i], after, FORWARD)
