"""Scan and Snap: the flow is the gradient, and the fate of tokens is the paper's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import scansnap
from experiments.data.cooccurrence import Cooccurrence
from experiments.training import one_layer
from experiments.training.one_layer import Rates, Texts, Weights


@pytest.mark.parametrize("normalise", (True, False))
@pytest.mark.parametrize("case", ("texts", "one token", "empty", "strong"))
def test_the_flow_is_minus_the_gradient(normalise, case):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        counts = rng.integers(0, 3, (5, 7)).astype(float)
        if case == "one token":
            counts = np.eye(7)[:5]
        if case == "empty":
            counts[2] = 0
        size = 300.0 if case == "strong" else 1.0
        texts = Texts(jnp.asarray(counts), jnp.arange(5) % 2, jnp.arange(5))
        weights = Weights(*jnp.asarray(rng.normal(size=(2, 7, 7)) * [[[size]], [[1]]]))
        both = jax.jit(lambda w: (
            jax.value_and_grad(one_layer.loss)(w, texts, normalise),
            one_layer.flow(w, texts, normalise)))
        (value, gradient), flow = both(weights)
        assert np.isfinite(value)
        for a, b in zip(gradient, flow):
            np.testing.assert_allclose(a, -b, rtol=1e-10, atol=1e-13)


def test_only_the_row_of_a_query_moves():
    texts = Texts(jnp.ones((1, 6)), jnp.array([4]), jnp.array([5]))
    rng = np.random.default_rng(1)
    weights = Weights(*jnp.asarray(rng.normal(size=(2, 6, 6)), jnp.float32))
    flow = jax.jit(one_layer.flow)(weights, texts)
    assert not np.delete(flow.z, 4, 0).any() and np.all(flow.z[4] != 0)


def test_the_facts_of_the_golden_file():
    data = Cooccurrence(common=4, distinct=4, tokens=11)
    assert data.vocab == 16
    with np.load("tests/golden/scansnap.npz") as file:
        p = np.take_along_axis(
            data.probabilities(), file["case0/fact_tokens"].astype(int), 1)
        np.testing.assert_allclose(p, file["case0/fact_probs"], rtol=1e-6)
        np.testing.assert_array_equal(data.query(), file["case0/fact_last"])
        np.testing.assert_array_equal(data.label(), file["case0/fact_next"])


def test_texts_are_drawn_from_their_probabilities():
    data = Cooccurrence(queries=2, next_tokens=2, query_common=2, distinct=3)
    counts, n = jax.jit(data.draw, static_argnums=1)(jax.random.key(0), 1024)
    assert (counts.sum(1) == 127).all() and counts.min() == 0
    for k, p in enumerate(data.probabilities()):
        own = np.asarray(counts)[np.asarray(n) == k]
        np.testing.assert_allclose(own.mean(0) / 127, p, atol=0.005)
        assert (own[:, p == 0] == 0).all()
    # those common to a query stand beside all its next tokens, and no others
    beside = (data.probabilities()[:, 10:14] > 0).astype(int)
    assert beside.tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2


@functools.cache
def flowed(steps=4000, rate=0.05, decoder=2000):
    """The population under small steps without momentum, in float64 -> the push on Z
    under a decoder that has nearly converged, then Z's rows over time [time,K,M] and
    the push of each time."""
    with jax.enable_x64(True):
        data = Cooccurrence()
        texts = one_layer.population(data.probabilities(), data.query(), data.label())
        zero = one_layer.zero_weights(data.vocab)

        @functools.partial(jax.jit, static_argnums=1)
        def follow(weights, many, rates):
            def one(carry, _):
                push = one_layer.flow(carry[0], texts).z[texts.query]
                kept = one_layer.mix(carry[0].z, texts), push
                return one_layer.step(*carry, texts, rates), kept

            zeros = jax.tree.map(jnp.zeros_like, weights)
            (last, _), kept = jax.lax.scan(one, (weights, zeros), length=many)
            return last, kept

        learned, _ = follow(zero, decoder, Rates(0.0, 1.0))
        fast = one_layer.flow(learned, texts).z[texts.query]
        first, _ = follow(zero, 1, Rates(0.0, rate))
        early = one_layer.flow(first, texts).z[texts.query]
        _, (c, pushes) = follow(zero, steps, Rates(rate, rate))
        return data, *map(np.asarray, (fast, early, c, pushes))


def test_distinct_tokens_win_and_common_ones_lose():
    data, fast, early, _, pushes = flowed()
    for n, own in enumerate(data.distinct_ids()):
        for push in (fast, early, *pushes[[1, 100, 1000, -1]]):
            assert (push[n, own] > 0).all() and (push[n, : data.common] < 0).all()


def test_growth_is_with_the_square_of_what_a_token_has():
    data, _, early, c, _ = flowed()
    for n, own in enumerate(data.distinct_ids()):
        f = c[0, n] / np.linalg.norm(c[0, n])
        rate = early[n, own] / f[own] ** 2
        np.testing.assert_allclose(rate, rate[0], rtol=1e-9)


def test_the_bounds_of_growth():
    """With dZ ~ f^2 itself: exp(2 f_l(0)^2 B) <= r / r(0) <= exp(2 B)."""
    with jax.enable_x64(True):
        data = Cooccurrence()
        own, p = data.distinct_ids()[0], data.probabilities()[:1]
        texts = Texts(jnp.asarray(p), jnp.array([0]), jnp.array([0]))

        def one(carry, _):
            z, b = carry
            c = one_layer.mix(z, texts)
            f = c / one_layer.length(c)
            grown = jnp.zeros(data.vocab).at[own].set(f[0, own] ** 2)
            return (z + 1e-3 * grown[None], b + 1e-3), (f[0], b)

        start = jnp.zeros((1, data.vocab)), jnp.zeros(())
        _, (f, b) = jax.jit(lambda: jax.lax.scan(one, start, length=3000))()
    f, b = np.asarray(f), np.asarray(b)
    most = f[:, own[-1]]
    for other in own[:-1]:
        r = (most / f[:, other]) ** 2 - 1
        chi = r / r[0]
        assert (np.diff(chi) > 0).all()
        assert (chi <= np.exp(2 * b) * (1 + 1e-9)).all()
        # steps of 1e-3 lag behind the flow by their square
        assert (chi >= np.exp(2 * most[0] ** 2 * b) * (1 - 1e-3)).all()


def test_order_is_kept_and_the_mixture_freezes():
    data, _, _, c, _ = flowed()
    at = [0, 500, 1000, 2000, 3999]
    for n, own in enumerate(data.distinct_ids()):
        assert (np.diff(c[at][:, n, own], axis=-1) > 0).all()
        r = (c[:, n, own[-1]] / c[:, n, own[0]]) ** 2 - 1
        assert (np.diff(r) >= 0).all()
        # four steps in a thousand grow as much as the last thousand together
        assert r[-1] - r[-1000] < 0.1 * (r[-1] - r[0])


def test_the_command_at_the_size_of_the_paper():
    found = scansnap.run(scansnap.Config(
        queries=(1,), rates=(0.5, 2.0), ratios=(1.0, 10.0), seeds=1, quiet=True))
    assert found["more entropy by ratio, 1 queries"] > 0.08
    assert found["less entropy by rate, 1 queries"] > 0
    assert found["changed at the end"] < 0.01 and found["in order"] == 1
    assert found["distinct above common"] == 1
    assert -0.01 < found["growth after its peak"] <= 0
    # of texts, not of the population: a text holds the rarest less than once
    assert found["distinct above 0"] >= 0.8


def test_wrong_settings_say_what_was_expected():
    with pytest.raises(ValueError, match="distinct=0"):
        Cooccurrence(distinct=0)
    with pytest.raises(ValueError, match="ratios"):
        scansnap.Config(ratios=())
    with pytest.raises(ValueError, match="rates"):
        scansnap.Config(rates=(-1.0,))
