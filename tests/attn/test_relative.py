"""Relative against Shaw's form with a vector for each pair, in float64; its memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.relative import Relative
from attn.softmax import Softmax
from experiments import music
from tests import compiled
from tests.laws import close, inputs

H, T = 4, 16
FORMS = {
    "global": Relative(20), "short": Relative(5, by_value=True),
    "shared": Relative(7, shared=True, by_value=True),
    "local": Relative(16, block=4), "normal": Relative(6, causal=False, by_value=True),
}
EACH = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def pairs(attention, params, q, k, v, pos=None, real=None):
    """o [B,T,H,V] with e and w written out for all pairs [H,T,T,.]: jnp, in the widest
    type that there is. pos, real [T]: positions, and which tokens are there."""
    t = q.shape[1]
    pos = np.arange(t) if pos is None else pos
    k, v = (jnp.repeat(a, H // a.shape[2], 2) for a in (k, v))
    far = pos[:, None] - pos[None]
    rows = params["distances"].shape[1]
    at = attention.reach - 1 - far
    there = (at >= 0) & (at < rows)

    def every(name):  # [H|1,T,T,D]
        found = params[name][:, np.clip(at, 0, rows - 1)]
        return jnp.where(there[None, ..., None], found, 0)

    e = jnp.broadcast_to(every("distances"), (H, t, t, q.shape[-1]))
    s = jnp.einsum("bthd,bshd->bhts", q, k) + jnp.einsum("bthd,htsd->bhts", q, e)
    seen = np.asarray(attention.visible(0, pos[:, None], pos[None]))
    seen = seen if real is None else seen & real[None]
    p = jax.nn.softmax(jnp.where(seen[None, None], s * q.shape[-1] ** -0.5, -jnp.inf))
    o = jnp.einsum("bhts,bshv->bthv", p, v)
    if attention.by_value:
        w = jnp.broadcast_to(every("distance_values"), (H, t, t, v.shape[-1]))
        o = o + jnp.einsum("bhts,htsv->bthv", p, w)
    return o


def drawn(attention):
    return compiled.init(attention, jax.random.key(1), *inputs(t=4))["params"]


def both(attention, t):
    """(o, gradients by tables, q, k and v) of the attention and of `pairs`, the latter
    in float64."""
    args = drawn(attention), *inputs(t=t)
    do = np.asarray(jax.random.normal(jax.random.key(9), (2, t, H, 12)))

    def ours(params, q, k, v):
        return attention.apply({"params": params}, q, k, v)

    def found(f, *args):
        def product(*args):
            o = f(*args)
            return (do * o).sum(), o

        (_, o), grads = jax.jit(jax.value_and_grad(
            product, (0, 1, 2, 3), has_aux=True))(*args)
        return jax.device_get((o, grads))

    have = found(ours, *args)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), args)
        want = found(functools.partial(pairs, attention), *wide)
    return have, want


@EACH
@pytest.mark.parametrize("t", [1, 7, T])
def test_it_is_shaws_form(form, t):
    (o, grads), (o_want, want) = both(form, t)
    close(o, o_want)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        if np.any(b):
            close(a, b, "gradient")
        else:  # a single token's weight is 1, whatever its logit
            assert t == 1 and np.abs(a).max() < 1e-6


def test_so_it_is_over_many_tiles():
    (o, grads), (o_want, want) = both(Relative(300, by_value=True), 530)
    close(o, o_want)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        close(a, b, "gradient")


@EACH
def test_padding_inside_of_a_sequence_is_no_distance(form):
    segments = np.array([1] * 5 + [0] * 3 + [1] * 8)
    params, (q, k, v) = drawn(form), inputs()
    ids = jnp.asarray(np.tile(segments, (2, 1)))
    o = compiled.apply(form, {"params": params}, q, k, v, segments=ids)
    pos = np.where(segments > 0, np.cumsum(segments > 0) - 1, 0)
    want = pairs(form, params, q, k, v, pos, segments > 0)
    close(o, np.where((segments > 0)[None, :, None, None], want, 0))


def test_without_vectors_it_is_exact_attention():
    q, k, v = inputs()
    params = jax.tree.map(jnp.zeros_like, {"params": drawn(Relative(9))})
    close(compiled.apply(Relative(9), params, q, k, v), Softmax()(q, k, v))
    bias = jax.random.normal(jax.random.key(5), (1, H, T, T))
    close(compiled.apply(Relative(9), params, q, k, v, pairwise_bias=bias),
          Softmax()(q, k, v, bias=bias))


def test_a_table_of_longer_texts_ends_with_the_rows_of_shorter_ones():
    q, k, v = inputs()
    params = drawn(Relative(40))
    short = {"distances": params["distances"][:, -T:]}
    close(compiled.apply(Relative(T), {"params": short}, q, k, v),
          compiled.apply(Relative(40), {"params": params}, q, k, v))


def test_a_text_shorter_than_two_blocks_is_one():
    q, k, v = inputs()
    params = {"params": drawn(Relative(T))}
    close(compiled.apply(Relative(T, block=T // 2), params, q, k, v),
          compiled.apply(Relative(T), params, q, k, v))


def test_a_local_stream_keeps_two_blocks():
    local, (q, k, v) = Relative(12, block=3), inputs()
    params = {"params": drawn(local)}
    state, outs = local.init_state(100, q, k, v), []
    assert state.k.shape[1] == 6
    for at, n in ((0, 7), (7, 1), (8, 1), (9, 7)):
        state, o = compiled.apply(
            local, params, state, *(a[:, at:at + n] for a in (q, k, v)), method="step")
        outs.append(o)
    close(jnp.concatenate(outs, 1), compiled.apply(local, params, q, k, v))


def test_memory_is_linear_where_shaws_is_not():
    ours, theirs = zip(*(music.memory(t) for t in music.LENGTHS))
    assert music.LENGTHS == (650, 2048, 3500)
    # bytes a token do not grow; they fall until constants no longer count
    each = [size / t for size, t in zip(ours, music.LENGTHS)]
    assert max(each[1:]) < each[0]
    assert all(size >= 4 * 64 * t * t for size, t in zip(theirs, music.LENGTHS))
    assert ours[-1] < theirs[-1] / 50


@pytest.mark.parametrize("fields, message", [
    ({"reach": 0}, "reach=0: expected 1 or more"),
    ({"block": 0}, "block=0: expected 1 or more"),
    ({"block": 4, "causal": False}, "expected block=None"),
])
def test_wrong_fields_say_what_was_expected(fields, message):
    with pytest.raises(ValueError, match=message):
        Relative(**fields)


def test_wrong_calls_say_what_was_expected():
    q, k, v = inputs()
    params = {"params": drawn(Relative(9))}
    with pytest.raises(ValueError, match="T must be S"):
        Relative(9).apply(params, q[:, :4], k, v)
    with pytest.raises(ValueError, match="bias has shape"):
        Relative(9).apply(params, q, k, v, pairwise_bias=jnp.ones((H, T, T)))
    with pytest.raises(NotImplementedError, match="no stream"):
        Relative(9, causal=False).init_state(9, q, k, v)
