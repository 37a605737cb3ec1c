"""PoinTr (Yu et al., 2021) arXiv:2108.08839: the missing part of a cloud of points.

Points near each other become a proxy, a token that knows its place; an encoder reads
the proxies; from its maximum a coarse guess of what is missing is made, whose points
are the queries of a decoder; each of these then spreads into a few points.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.norm import Norm
from models.feed import INIT, Feed
from models.places import Places
from models.seq2seq import DecoderBlock, feed, mixer
from models.stack import check_sizes


def distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared distances [B,n,m] of points a [B,n,3] and b [B,m,3]."""
    return jnp.square(a[:, :, None] - b[:, None]).sum(-1)


def neighbours(points: jax.Array, others: jax.Array, many: int) -> jax.Array:
    """Which of others [B,m,3] are the nearest of each point [B,n,3]: [B,n,many]."""
    return jax.lax.top_k(-distances(points, others), many)[1]


def spread(points: jax.Array, many: int) -> jax.Array:
    """`many` points [B,many,3] of [B,n,3], each the farthest from those before it."""
    b = points.shape[0]

    def step(carry, _):
        far, at = carry  # squared distance from those chosen [B,n]; the newest [B]
        one = jnp.take_along_axis(points, at[:, None, None], 1)
        far = jnp.minimum(far, distances(points, one)[..., 0])
        return (far, far.argmax(1)), at

    first = jnp.full(points.shape[:2], jnp.inf), jnp.zeros((b,), jnp.int32)
    chosen = jax.lax.scan(step, first, None, many)[1]  # [many,B]
    return jnp.take_along_axis(points, chosen.T[..., None], 1)


class Near(nn.Module):
    """The maximum over each token's nearest tokens of a layer of (what they are less
    what it is, what it is): the geometry-aware branch of the paper, an edge
    convolution (Wang et al., 2018) arXiv:1801.07829."""

    many: int
    width: int

    @nn.compact
    def __call__(self, x, places, of=None, there=None):
        """x [B,n,F] at places [B,n,3], among tokens `of` [B,m,F] at `there` [B,m,3], by
        default themselves -> [B,n,width]."""
        of, there = (x, places) if of is None else (of, there)
        at = neighbours(places, there, self.many)  # [B,n,k]
        found = jax.vmap(lambda a, n: a[n])(of, at)  # [B,n,k,F]
        own = jnp.broadcast_to(x[:, :, None], found.shape)
        both = jnp.concatenate([found - own, own], -1)
        y = nn.Dense(self.width, kernel_init=INIT, name="edge")(both)
        return nn.leaky_relu(y, 0.2).max(2)


class GeometryBlock(nn.Module):
    """x + join [self(norm x) ; near(norm x)], then x + MLP(norm x)."""

    places: Places
    heads: int
    near: int

    @nn.compact
    def __call__(self, x, at):
        """x [B,n,E] at places [B,n,3] -> [B,n,E]."""
        e = x.shape[-1]
        norm = lambda name: Norm("layer").module(x.dtype, f"{name}_norm")(x)
        y = norm("own")
        own = mixer(self.places.at("NS"), self.heads).clone(parent=self, name="own")
        y = jnp.concatenate([own(y), Near(self.near, e, name="near")(y, at)], -1)
        x = x + nn.Dense(e, kernel_init=INIT, name="join")(y)  # [B,n,2E] [2E,E]
        return x + feed(e).module(x.dtype, "mlp")(norm("mlp"))


class PoinTr(nn.Module):
    """PoinTr (Yu et al., 2021) arXiv:2108.08839, small; patterns NS in encoder and
    decoder, NC from decoder to encoder.

    proxies: tokens of the encoder; queries: points of the coarse guess; each: points
    that a query spreads into; near: neighbours of a proxy. width E, heads H, layers: of
    encoder and of decoder. (The paper spreads by FoldingNet, and its decoder is
    geometry-aware too; here one layer and plain blocks do it.)
    """

    proxies: int = 64
    queries: int = 32
    each: int = 4
    near: int = 8
    width: int = 64
    heads: int = 4
    layers: int = 2
    places: Places = Places()

    @nn.compact
    def __call__(self, points):
        """points [B,n,3], n >= proxies -> (coarse [B,queries,3], the missing points
        [B,queries each,3])."""
        names = "proxies queries each near width heads layers"
        check_sizes("PoinTr", self, names)
        if points.shape[1] < self.proxies or self.near > self.proxies:
            raise ValueError(f"{points.shape[1]} points, near={self.near}: expected "
                             f"proxies={self.proxies} points or more, and near of at "
                             "most as many")
        b, e = points.shape[0], self.width
        at = spread(points, self.proxies)  # [B,n,3]
        place = Feed(e, "gelu", gated=False, bias=True)
        lift = lambda name, a: place.module(a.dtype, name)(
            nn.Dense(e, kernel_init=INIT, name=f"{name}_in")(a))
        x = Near(self.near, e, name="proxy")(at, at, points, points) + lift("place", at)
        for n in range(self.layers):
            x = GeometryBlock(self.places, self.heads, self.near,
                              name=f"encoder_{n}")(x, at)
        x = Norm("layer").module(x.dtype, "encoder_norm")(x)
        whole = nn.Dense(4 * e, kernel_init=INIT, name="whole")(x).max(1)  # [B,4E]
        coarse = nn.Dense(3 * self.queries, kernel_init=INIT, name="coarse")(
            nn.relu(whole)).reshape(b, self.queries, 3)
        y = lift("query", jnp.concatenate([coarse, jnp.broadcast_to(
            whole[:, None], (b, self.queries, 4 * e))], -1))
        for n in range(self.layers):
            y = DecoderBlock(self.places, self.heads, "NS", "NC",
                             name=f"decoder_{n}")(y, x)
        y = Norm("layer").module(y.dtype, "decoder_norm")(y)
        moves = nn.Dense(3 * self.each, kernel_init=INIT, name="spread")(y)
        moves = moves.reshape(b, self.queries, self.each, 3)
        fine = coarse[:, :, None] + 0.1 * moves
        return coarse, fine.reshape(b, -1, 3)
