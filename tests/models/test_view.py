"""A view reads and replaces what a model computes, and costs nothing unasked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn import maps
from attn.act import ACT
from attn.based import Based
from attn.contract.effective import by_derivative
from attn.delta import Delta
from attn.landmark import Landmark
from attn.lightning import Lightning
from attn.masks import Causal, Sink, Window
from attn.mla import MLA
from attn.performer import Performer
from attn.positional import Positional
from attn.positions import ALiBi
from attn.softmax import Softmax
from experiments.measure import cost
from models.block import Residual
from models.generate import generate
from models.lm import LM
from models.view import Rows, edited, look, masked_heads, sites
from tests import compiled

T, VOCAB = 9, 17
MODEL = LM(vocab=VOCAB, width=16, heads=4, kv_heads=2, sinks=True, attention=(
    Softmax(Causal() & (Window(4) | Sink(1)), softcap=5.0, score=ALiBi(4)),
    Softmax()))
TOKENS = jax.random.randint(jax.random.key(0), (2, T), 0, VOCAB)


@functools.cache
def parameters(model):
    params = jax.jit(model.init)(jax.random.key(1), TOKENS)
    return jax.tree.map(
        lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape), params)


@functools.cache
def everything(model=MODEL):
    """The logits and all that is inside."""
    call = jax.jit(lambda p: look(model, p, TOKENS, read=sites(model)))
    return call(parameters(model))


def near(a, b, bound=1e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=bound * float(np.abs(b).max()))


def test_what_is_read_is_what_was_computed():
    logits, seen = everything()
    assert set(seen) == set(sites(MODEL))
    near(logits, jax.jit(MODEL.apply)(parameters(MODEL), TOKENS), 0)
    assert (logits == seen["logits"]).all()
    for n in range(2):
        own = seen[f"{n}/v"][:, :, np.arange(4) // 2]
        near(jnp.einsum("bnms,bsnv->bmnv", seen[f"{n}/pattern"], own), seen[f"{n}/z"])
    # a logit without value, and a window: rows do not sum to 1
    assert (np.asarray(seen["0/pattern"]).sum(-1) < 1).all()


def test_contributions_sum_to_the_stream():
    seen = everything()[1]
    added = (seen[f"{n}/{name}"] for n in range(2) for name in ("attn_out", "mlp_out"))
    near(seen["embed"] + sum(added), seen["final"])
    out = parameters(MODEL)["params"]["layers"]["layer_1"]["mixer"]["out"]["kernel"]
    heads = jnp.einsum("bthv,hve->bthe", seen["1/z"], out)  # of each head
    near(heads.sum(2), seen["1/attn_out"])


def test_a_look_costs_nothing_where_nothing_is_asked_for():
    params = parameters(MODEL)

    def flops(f):
        return jax.jit(f).lower(params).compile().cost_analysis()["flops"]

    plain = flops(lambda p: MODEL.apply(p, TOKENS))
    assert flops(lambda p: look(MODEL, p, TOKENS)[0]) == plain
    program = jax.make_jaxpr(lambda p: MODEL.apply(p, TOKENS))(params)
    same = jax.make_jaxpr(lambda p: look(MODEL, p, TOKENS)[0])(params)
    assert str(program) == str(same)


def test_weights_are_made_for_the_heads_and_rows_alone():
    whole = everything()[1]["0/pattern"]
    rows = Rows(heads=[2, 0], rows=[-1, 3, 5], tile=2)
    some = jax.jit(lambda p: look(MODEL, p, TOKENS, patterns={0: rows})[1])
    near(some(parameters(MODEL))["0/pattern"], whole[:, [2, 0]][:, :, [8, 3, 5]])
    t = 1024
    model = LM(vocab=VOCAB, width=16, heads=4, attention=(Softmax(),))
    tokens = jax.ShapeDtypeStruct((1, t), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def memory(**more):
        f = jax.jit(lambda p, x: look(model, p, x, **more))
        return f.lower(params, tokens).compile().memory_analysis().temp_size_in_bytes

    one = memory(patterns={0: Rows(heads=[1], of=maps.argmax, tile=32)})
    assert one - memory() < t * t  # a quarter of the bytes of the map of one head


def test_reductions_by_tiles_are_those_of_the_map():
    whole = everything()[1]["1/pattern"]
    for of in (maps.argmax, maps.entropy):
        rows = Rows(of=of, tile=4)
        found = look(MODEL, parameters(MODEL), TOKENS, patterns={1: rows})[1]
        near(found["1/pattern"], of(whole))
    rows = Rows(of=maps.column_sums, tile=4)
    found = look(MODEL, parameters(MODEL), TOKENS, patterns={1: rows})[1]["1/pattern"]
    assert found.shape[2] == 3
    near(found.sum(2), whole.sum(2))


@pytest.mark.parametrize("key", ["embed", "0/q", "0/k", "0/v", "0/z", "0/attn_out",
                                 "0/resid_mid", "0/mlp_out", "1/resid_pre", "final"])
def test_a_replaced_array_is_the_one_that_counts(key):
    _, seen = everything()
    call = jax.jit(lambda p, mask, value: look(
        MODEL, p, TOKENS, read=["logits", key], edit={key: (mask, value)}))
    params, a = parameters(MODEL), seen[key]
    _, found = call(params, jnp.ones((1,) * a.ndim, bool), a)  # with itself: nothing
    near(found["logits"], seen["logits"], 1e-6)
    mask = jnp.zeros((1, T) + (1,) * (a.ndim - 2), bool).at[0, -1].set(True)
    _, found = call(params, mask, jnp.zeros_like(a))  # at the last token alone
    assert (found[key][:, -1] == 0).all() and (found[key][:, :-1] == a[:, :-1]).all()
    near(found["logits"][:, :-1], seen["logits"][:, :-1], 1e-6)
    assert np.abs(found["logits"][:, -1] - seen["logits"][:, -1]).max() > 1e-3


def test_gradients_pass_through_replacements():
    _, seen = everything()

    def f(value, params):
        edit = {"0/z": (jnp.ones((1, 1, 1, 1), bool), value)}
        return look(MODEL, params, TOKENS, edit=edit)[0][:, -1, 0].sum()

    params, z = parameters(MODEL), seen["0/z"]
    grads, inside = jax.jit(jax.grad(f, (0, 1)))(z, params)
    step = 3e-2 * grads / jnp.linalg.norm(grads)
    change = (f(z + step, params) - f(z - step, params)) / 2
    np.testing.assert_allclose((grads * step).sum(), change, rtol=1e-2)
    # what is replaced was not needed
    assert np.abs(inside["params"]["layers"]["layer_0"]["mixer"]["q"]["kernel"]
                  ).max() == 0


def test_a_replaced_row_of_weights_is_what_the_head_attends_to():
    params, seen = parameters(MODEL), everything()[1]
    own = jnp.zeros((T,)).at[2].set(1.0)
    rows = Rows(heads=[1], rows=[-1], mask=jnp.ones((1, 1, 1, T), bool), value=own)
    found = look(MODEL, params, TOKENS, read=["0/z"], patterns={0: rows})[1]
    near(found["0/z"][:, -1, 1], seen["0/v"][:, 2, 0])
    near(found["0/z"][:, :-1], seen["0/z"][:, :-1], 1e-6)
    same = Rows(mask=jnp.zeros((1, 1, 1, 1), bool), value=0.0)
    found = look(MODEL, params, TOKENS, read=["logits"], patterns={0: same})[1]
    near(found["logits"], seen["logits"])


@pytest.mark.parametrize("attention", [Based(feature_dim=4), Lightning(),
                                       Landmark(block=3, top_k=1)],
                         ids=lambda a: type(a).__name__)
def test_recurrent_and_sparse_attentions_have_effective_weights(attention):
    model = LM(vocab=VOCAB, width=16, heads=2, attention=(attention,))
    _, seen = everything(model)
    a, v = seen["0/pattern"], seen["0/v"]
    assert (np.triu(a, 1) == 0).all()
    if not isinstance(attention, Lightning):  # whose output is normed and gated
        near(jnp.einsum("bnms,bsnv->bmnv", a, v), seen["0/z"])


def test_exact_weights_are_the_derivative():
    q, k, v = (jax.random.normal(jax.random.key(n), (1, T, h, 4))
               for n, h in enumerate((4, 2, 2)))
    attention = MODEL.attention[0]
    heads, rows = jnp.array([3, 1]), jnp.array([8, 0, 4])
    sink, segments = jnp.arange(4.0), jnp.array([[1] * 5 + [2] * 3 + [0]])
    more = {"sink": sink, "segments": segments}
    args = attention, q, k, v, heads, rows
    near(jax.jit(lambda: attention.weights(*args[1:], **more))(),
         jax.jit(lambda: by_derivative(*args, **more))())


@pytest.mark.parametrize("wrong, message", [
    (dict(read=["x/pattern"]), "'x/pattern': expected one of"),
    (dict(read=["00/z"]), "'00/z': expected one of"),
    (dict(edit={"0/pattern": (True, 0.0)}), "expected Rows"),
    (dict(edit={"0/z": 0.0}), "edit of 0/z: expected .mask, value."),
    (dict(edit={"0/z": (None, 0.0)}), "mask and value go together"),
    (dict(patterns={0: Rows(heads=[2])}), "heads has 2: expected numbers from 0"),
    (dict(patterns={0: Rows(rows=[-5])}), "rows has -5: expected numbers from -4"),
    (dict(patterns={0: Rows(heads=[True, False])}), "heads is bool"),
    (dict(patterns={0: Rows(rows=[])}), "expected one or more whole numbers"),
], ids=str)
def test_wrong_requests(wrong, message):
    tokens = TOKENS[:, :4]
    model = LM(vocab=VOCAB, width=16, heads=2, attention=(Softmax(),))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: look(
            model, model.init(jax.random.key(0), tokens), tokens, **wrong))


def test_heads_that_are_no_heads_of_the_model():
    model = LM(vocab=VOCAB, width=16, heads=2, attention=(Softmax(), ACT(factor=2.0)))
    for heads, more, error, message in (
        (np.ones(2), {}, ValueError, "expected .L,H. with L=2"),
        (np.ones((2, 3)), {}, ValueError, "with H=2"),
        (np.ones((2, 2)), dict(mode="mean", means={0: 1.0}), ValueError, "layer 1 too"),
        (np.ones((2, 2)), dict(mode="uniform"), NotImplementedError, "ACT of layer 1"),
    ):
        with pytest.raises(error, match=message):
            masked_heads(model, heads, **more)
    with pytest.raises(ValueError, match="tile=0"):
        Rows(tile=0)


def test_what_is_not_read_is_no_site():
    model = LM(vocab=VOCAB, width=16, heads=2, attention=(Positional(length=8),))
    assert {"0/v", "0/z"} <= {*sites(model)} and not {"0/q", "0/k"} & {*sites(model)}


def test_weights_follow_all_variables_of_an_attention():
    model = LM(vocab=VOCAB, width=16, heads=2, attention=(Performer(features=8),))
    params = compiled.init(model, jax.random.key(0), TOKENS)
    other = {**params, "fixed": jax.tree.map(lambda a: -a[:, ::-1], params["fixed"])}
    _, seen = look(model, other, TOKENS, read=["0/v", "0/z", "0/pattern"])
    z = jnp.einsum("bhts,bshv->bthv", seen["0/pattern"], seen["0/v"])
    np.testing.assert_allclose(z, seen["0/z"], atol=1e-5)


def test_what_has_no_weights_says_so():
    tokens = TOKENS[:, :4]
    for attention, name in ((Delta(), "Delta"),):
        model = LM(vocab=VOCAB, width=16, heads=2, attention=(attention,))
        with pytest.raises(NotImplementedError, match=f"{name} has no matrix"):
            jax.eval_shape(lambda: look(
                model, model.init(jax.random.key(0), tokens), tokens,
                read=["0/pattern"]))
    model = LM(vocab=VOCAB, width=16, heads=2, attention=(MLA(2, 4, 4, 4, 4),))
    assert "0/z" in sites(model)
    with pytest.raises(ValueError, match="MLA of layer 0 has no 'pattern'"):
        look(model, {}, tokens, read=["0/pattern"])
    with pytest.raises(ValueError, match="'9/z': expected one of"):
        look(MODEL, {}, tokens, read=["9/z"])
    state = MODEL.init_state(8, tokens)
    with pytest.raises(NotImplementedError, match="pattern: a stream"):
        look(MODEL, parameters(MODEL), tokens, state, read=["0/pattern"])


@pytest.mark.parametrize("scan", [False, True])
def test_a_scanned_model_and_scaled_residuals_are_looked_into(scan):
    model = LM(vocab=VOCAB, width=16, heads=2, attention=(Softmax(),) * 2, scan=scan,
               residual=Residual(mixer=(1.0, 0.5)))
    _, seen = everything(model)
    near(seen["0/resid_pre"] + seen["0/attn_out"], seen["0/resid_mid"], 1e-6)


def test_masked_heads_in_a_text_and_in_a_stream():
    model = MODEL.clone(sinks=False, attention=(Softmax(),) * 2)
    params = parameters(model)
    heads = np.zeros((2, 4), bool)
    heads[1, 2] = True
    means = {n: jnp.full((4, 4), float(n)) for n in range(2)}
    for mode in ("zero", "uniform", "mean"):
        other = edited(model, params, masked_heads(model, heads, mode, means))
        whole, seen = look(model, other, TOKENS, read=["1/z", "1/v", "1/pattern"])
        z = seen["1/z"][:, :, 2]
        if mode == "uniform":
            count = np.arange(1, T + 1)[None, :, None]
            near(z, jnp.cumsum(seen["1/v"][:, :, 1], 1) / count)
        else:
            assert (z == (0.0 if mode == "zero" else 1.0)).all()
        state = model.init_state(T, TOKENS)
        step = jax.jit(model.apply)
        state, first = step(other, TOKENS[:, :5], state)
        state, rest = step(other, TOKENS[:, 5:], state)
        near(jnp.concatenate([first, rest], 1), whole)
    zero = edited(model, params, masked_heads(model, np.ones((2, 4), bool)))
    assert generate(model, zero, [[1, 2]], length=2)
    with pytest.raises(NotImplementedError, match="is not uniform"):
        masked_heads(MODEL, heads, "uniform")


def test_what_is_at_hand_is_read_for_nothing():
    params = parameters(MODEL)
    own = cost.flops(lambda p: MODEL.apply(p, TOKENS), params)
    read = ["embed", "0/q", "1/z", "1/resid_mid", "final"]
    assert cost.flops(lambda p: look(MODEL, p, TOKENS, read=read), params) == own
