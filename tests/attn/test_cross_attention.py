"""Cross attention: what is seen of a context, and where its tokens stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.based import Based
from attn.gla import GLA
from attn.landmark import Landmark
from attn.layers import MultiHead
from attn.masks import Causal, Full
from attn.positions import ALiBi
from attn.softmax import Softmax
from tests.laws import close, inputs

B, T, S, E, H = 2, 12, 9, 16, 4
X = jax.random.normal(jax.random.key(0), (B, T, E))
CONTEXT = jax.random.normal(jax.random.key(1), (B, S, E))


def applied(attention, params, *args, **options):
    layer = MultiHead(attention, heads=H)
    return jax.jit(lambda p, *a: layer.apply(p, *a, **options))(params, *args)


PARAMS = MultiHead(Softmax(), heads=H).init(jax.random.key(2), X)


def test_a_context_is_seen_whole_unless_a_mask_was_asked_for():
    whole = applied(Softmax(), PARAMS, X, context=CONTEXT)
    close(whole, applied(Softmax(mask=Full()), PARAMS, X, context=CONTEXT))
    masked = applied(Softmax(mask=Causal()), PARAMS, X, context=CONTEXT)
    assert np.abs(masked[:, :T - S]).max() == 0 < np.abs(whole[:, :T - S]).min(1).max()
    # without a context it is causal
    close(applied(Softmax(), PARAMS, X), applied(Softmax(mask=Causal()), PARAMS, X))


@pytest.mark.parametrize("attention", [
    Softmax(mask=Causal()), Softmax(mask=Causal(), score=ALiBi(H))], ids=str)
def test_the_last_query_stands_at_the_last_key(attention):
    """Of a mask, a score and the rotation: the tail of a text with all of it as its
    context is what it is in self attention."""
    tail = applied(attention, PARAMS, X[:, -5:], context=X)
    close(tail, applied(attention, PARAMS, X)[:, -5:])
    ids = jnp.asarray([[1] * 5 + [2] * 7, [3] * 8 + [0] * 4])
    some = jnp.asarray([3, 4, 10, 11]), jnp.asarray([6, 7, 10, 11])
    at = jnp.stack(some)
    take = lambda a: jax.vmap(lambda row, n: row[n])(a, at)
    packed = applied(attention, PARAMS, X, segments=ids)
    part = applied(attention, PARAMS, take(X), context=X, segments=(take(ids), ids))
    close(part, take(packed))


@pytest.mark.parametrize("mask", (Full(), Causal()), ids=str)
@pytest.mark.parametrize("score", (ALiBi(4), lambda h, i, j: 0.01 * i * j + h * 0.1),
                         ids=("alibi", "any"))
def test_a_score_of_a_pair_of_segments(mask, score):
    """Of equal lengths in all, with other lengths or another order of segments."""
    q, k, v = inputs()
    attention = Softmax(mask=mask, score=score)
    run = jax.jit(attention)
    mine = np.array([[1] * 6 + [2] * 10, [2] * 6 + [1] * 10])
    keys = np.array([[1] * 10 + [2] * 6, [1] * 10 + [2] * 6])
    o = jax.jit(attention)(q, k, v, segments=(jnp.asarray(mine), jnp.asarray(keys)))
    for row in range(2):
        for n in (1, 2):
            at, of = (np.nonzero(a[row] == n)[0] for a in (mine, keys))
            own = run(q[row:row + 1, at], k[row:row + 1, of], v[row:row + 1, of])
            close(o[row:row + 1, at], own)


def test_what_has_no_use_for_a_context_says_so():
    for attention, message in (
        (Based(feature_dim=4), r"Based reads .* expected Based\(causal=False\)"),
        (GLA(), r"GLA reads .* in step, expected one without a causal order"),
        (Landmark(), r"Landmark reads .* in step"),
    ):
        for context in (CONTEXT, X):
            with pytest.raises(ValueError, match=message):
                MultiHead(attention, heads=H).init(
                    jax.random.key(0), X, context=context)
    with pytest.raises(ValueError, match=r"score=ALiBi\(heads=8\): q has H=4 heads"):
        Softmax(score=ALiBi(8))(*inputs())
    with pytest.raises(ValueError, match=r"pos of context has shape \(1, 12\)"):
        MultiHead(Softmax(), heads=H).init(
            jax.random.key(0), X, context=CONTEXT, pos=jnp.arange(T)[None])
