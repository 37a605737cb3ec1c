"""TransNormer: streaming, packing, gradients, variants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.lightning import Lightning
from models.transnormer import TransNormer, lrpe
from tests.compiled import apply, init

MODEL = TransNormer(vocab=32, width=24, heads=3, depth=3, attention=Lightning(chunk=4))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 13)), jnp.int32)


def close(a, b, bound=2e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all()
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    assert error <= bound, f"{error:.2e}"


@pytest.mark.parametrize("lrpe_in,variant", [("first", "paper"), ("rest", "example")])
def test_streaming_is_reading_at_once(lrpe_in, variant):
    model = MODEL.clone(lrpe=lrpe_in, variant=variant)
    params = init(model, jax.random.key(0), TOKENS)
    want = jax.jit(model.apply)(params, TOKENS)
    step = jax.jit(model.apply)
    for pieces in ((13,), (4, 4, 5), (1,) * 13):
        state, outs, at = model.init_state(13, TOKENS), [], 0
        for n in pieces:
            state, logits = step(params, TOKENS[:, at:at + n], state)
            outs.append(logits)
            at += n
        close(jnp.concatenate(outs, 1), want)
        assert all(s.end.tolist() == [13, 13] for s in state)


def test_packing_changes_nothing():
    params = init(MODEL, jax.random.key(0), TOKENS)
    segments = jnp.asarray([[1] * 5 + [2] * 6 + [0] * 2, [0] + [3] * 12], jnp.int32)
    packed = jax.jit(MODEL.apply)(params, TOKENS, segments=segments)
    for row, part in ((0, slice(0, 5)), (0, slice(5, 11)), (1, slice(1, 13))):
        alone = apply(MODEL, params, TOKENS[row:row + 1, part])
        close(packed[row:row + 1, part], alone)
    at = jnp.asarray([10, 12])
    last = jax.jit(MODEL.apply)(params, TOKENS, segments=segments, at=at)
    close(last, packed[jnp.arange(2), at])


def test_every_parameter_learns_and_only_the_first_layer_rotates():
    params = init(MODEL, jax.random.key(0), TOKENS)
    loss = lambda p: (MODEL.apply(p, TOKENS) ** 2).sum()
    grads = jax.jit(jax.grad(loss))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 0, path
    rotating = [name for name, p in params["params"].items() if "theta" in p]
    assert rotating == ["mixers_0"]
    theta = np.asarray(params["params"]["mixers_0"]["theta"]).ravel()
    np.testing.assert_allclose(theta, 10000.0 ** (-2 * np.arange(24) / 24), rtol=1e-5)


def test_the_rotation_depends_on_the_distance():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 5, 2, 4)), jnp.float32) for _ in range(2))
    theta = jnp.asarray(rng.uniform(size=(2, 4)), jnp.float32)
    at = np.arange(5)
    turn = lambda a, first: lrpe(a, theta, jnp.asarray(at + first)[None])
    s = jnp.einsum("bthd,bshd->bhts", turn(q, 0), turn(k, 0))
    apart = np.cos((at[:, None] - at)[..., None, None] * np.asarray(theta))
    close(s, np.einsum("bthd,bshd,tshd->bhts", q, k, apart))
    close(jnp.einsum("bthd,bshd->bhts", turn(q, 90), turn(k, 90)), s)


def test_wrong_settings_say_what_was_expected():
    for wrong, message in (
        ({"lrpe": "last"}, "lrpe='last': expected one of"),
        ({"variant": "new"}, "variant='new': expected one of"),
        ({"heads": 5}, "E=24: expected a multiple of heads=5"),
        ({"depth": 1}, "divides by zero"), ({"depth": 0}, "depth=0: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            MODEL.clone(**wrong).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="tokens"):
        MODEL.init(jax.random.key(0), TOKENS[0])
