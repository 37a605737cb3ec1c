"""Online k-means: centroids that follow what is assigned to them.

Vectors are normalised, a vector belongs to the centroid with which its product is
greatest, and centroids move after each batch, by moving averages of how many vectors
and which sum of them they got. No gradient flows through any of it; what pulls vectors
towards their centroids is a loss, `commitment`.

Source: Roy et al., 2020, arXiv:2003.05997; moving averages as in van den Oord et al.,
2017, arXiv:1711.00937, appendix A.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

LAYER, UNIT = "layer", "unit"
NORMS = LAYER, UNIT
SMALL = 1e-5  # added to counts, so that an empty cluster has a mean


class Centroids(NamedTuple):
    """mean [H,C,D], what vectors are compared with; number [H,C] and total [H,C,D], the
    moving averages that it comes from; all float32."""

    mean: jax.Array
    number: jax.Array
    total: jax.Array


def normalised(a: jax.Array, norm: str) -> jax.Array:
    """Vectors a [...,D] as float32: without mean and of variance 1 ("layer", without
    gain and bias), or of length 1 ("unit")."""
    a = a.astype(jnp.float32)
    if norm == LAYER:
        a = a - a.mean(-1, keepdims=True)
        return a * jax.lax.rsqrt((a * a).mean(-1, keepdims=True) + 1e-6)
    square = (a * a).sum(-1, keepdims=True)
    # the root has no gradient at 0
    return a * jax.lax.rsqrt(jnp.where(square > 0, square, 1))


def random(key: jax.Array, shape: tuple[int, int, int], norm: str) -> Centroids:
    """Centroids [H,C,D] drawn at random; no vector has been assigned to them."""
    mean = normalised(jax.random.normal(key, shape), norm)
    return Centroids(mean, jnp.zeros(shape[:2], jnp.float32), mean)


def scores(x: jax.Array, mean: jax.Array) -> jax.Array:
    """x.mu of vectors [B,T,H,D] and centroids [H,C,D]: [B,H,C,T]. Without a gradient;
    what is no number scores highest, so that it cannot hide."""
    x, mean = jax.lax.stop_gradient((x, mean))
    # [B,T,H,D] x [H,C,D] -> [B,H,C,T]
    a = jnp.einsum("bthd,hcd->bhct", x, mean)
    return jnp.where(jnp.isnan(a), jnp.inf, a)


def commitment(x: jax.Array, mean: jax.Array, real: jax.Array | None) -> jax.Array:
    """The mean of (x - its centroid)^2 over all numbers of x [B,T,H,D]. real [B,T]:
    which tokens count, None for all."""
    own = scores(x, mean).argmax(2)  # [B,H,T]
    nearest = jax.vmap(lambda mean, at: mean[at], (0, 1), 1)(mean, own)  # [B,H,T,D]
    # [B,T,H,D]: vectors are drawn to centroids, which have no gradient
    gap = jnp.square(x - jax.lax.stop_gradient(nearest).swapaxes(1, 2))
    if real is None:
        return gap.mean()
    real = real[..., None, None].astype(jnp.float32)
    return (gap * real).sum() / jnp.maximum(
        real.sum() * gap.shape[2] * gap.shape[3], 1)


def assigned(x: jax.Array, mean: jax.Array, real: jax.Array | None) -> tuple:
    """How many of x [B,T,H,D] belong to each centroid [H,C], and their sum [H,C,D].
    Vectors of zeros are padding, and belong to none."""
    x, mean = jax.lax.stop_gradient((x, mean))
    there = (x != 0).any(-1)  # [B,T,H]
    there = there if real is None else there & real[..., None]
    best = scores(x, mean).argmax(2)  # [B,H,T]
    own = jax.nn.one_hot(best, mean.shape[1])  # [B,H,T,C]
    own = jnp.where(there.swapaxes(1, 2)[..., None], own, 0)
    # [B,H,T,C] x [B,T,H,D] -> [H,C,D]
    return own.sum((0, 2)), jnp.einsum("bhtc,bthd->hcd", own, x)


def follow(
    centroids: Centroids, x: jax.Array, decay: float, norm: str,
    real: jax.Array | None = None,
) -> Centroids:
    """The centroids after a batch of normalised vectors x [B,T,H,D].

    "layer": n <- d n + (1 - d) count, m <- d m + (1 - d) sum, mu = m / n, with SMALL
    added to each n. "unit": mu <- d mu + (1 - d) `iterated`.
    """
    if norm == UNIT:
        new = iterated(x, centroids.mean, real)
        mean = decay * centroids.mean + (1 - decay) * new
        return centroids._replace(mean=mean, total=mean)
    count, total = assigned(x, centroids.mean, real)
    number = decay * centroids.number + (1 - decay) * count
    total = decay * centroids.total + (1 - decay) * total
    whole = number.sum(-1, keepdims=True)
    clusters = number.shape[-1]
    # counts that sum to what they did
    smooth = (number + SMALL) / (whole + clusters * SMALL) * whole
    # before anything was assigned there is nothing to divide by
    mean = jnp.where(
        whole[..., None] > 0, total / jnp.where(smooth > 0, smooth, 1)[..., None],
        centroids.mean,
    )
    return Centroids(mean, number, total)


def iterated(x: jax.Array, mean: jax.Array, real: jax.Array | None = None) -> jax.Array:
    """One iteration of k-means on unit vectors x [B,T,H,D]: the direction of the sum of
    what is assigned; an empty cluster keeps its centroid."""
    count, total = assigned(x, mean, real)
    return jnp.where(count[..., None] > 0, normalised(total, UNIT), mean)


class OnlineKMeans(nn.Module):
    """Centroids [H,C,D] as state: the collection "centroids" of a module's variables,
    which moves where it is mutable; the commitment loss, beta times, is sown into
    "losses".

    clusters C; norm: how vectors are normalised; decay: of the moving averages.
    """

    clusters: int
    norm: str = LAYER
    decay: float = 0.999
    beta: float = 1e-4

    @nn.compact
    def __call__(self, found: list, real: Any = None) -> jax.Array:
        """The centroids [H,C,D] for normalised vectors [B,T,H,D], a list of one or two
        (of queries and of keys); real: [B,T] of each, to learn from, None for none."""
        first, h, d = None, found[0].shape[2], found[0].shape[3]
        if self.is_initializing():
            first = random(self.make_rng("params"), (h, self.clusters, d), self.norm)
        held = [self.variable("centroids", name, getattr, first, name)
                for name in Centroids._fields]
        now = Centroids(*(a.value for a in held))
        if real is None or self.is_initializing():
            return now.mean
        if self.is_mutable_collection("losses"):
            each = [commitment(x, now.mean, r) for x, r in zip(found, real)]
            loss = sum(each) / len(each)
            # the authors add that of queries and of keys, shared ones too
            loss = 2 * loss if self.norm == LAYER else loss
            self.sow("losses", "commitment", self.beta * loss)
        if self.is_mutable_collection("centroids"):
            moved = now
            for x, r in zip(found, real):
                moved = follow(moved, x, self.decay, self.norm, r)
            for variable, a in zip(held, moved):
                variable.value = a
        return now.mean
