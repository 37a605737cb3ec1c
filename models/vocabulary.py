"""Vocabulary: the table of a vector for each token id, in one piece or split by ids.

Where the ids are split over the mesh axis `model`, each device looks up those that it
has and the sums of all devices are the vectors (Shoeybi et al., 2019) arXiv:1909.08053:
neither the table nor the tokens' vectors are gathered over it.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models.placement import tensor_spec

_EMBED = nn.initializers.normal(0.02)


class Embed(nn.Module):
    """A learned vector of `width` for each of `size` token ids. dtype: of what comes
    out; the parameter `embedding` [N,E] is float32."""

    size: int
    width: int
    dtype: Any = jnp.float32

    def setup(self):
        shape = self.size, self.width
        self.embedding = self.param("embedding", _EMBED, shape, jnp.float32)

    def __call__(self, tokens):
        """tokens [B,T] int -> [B,T,E]."""
        return lookup(self.embedding.astype(self.dtype), tokens)

    def attend(self, x):
        """The products of x [...,E] with every vector: [...,N]."""
        # [...,E] [E,N]
        return jnp.dot(x.astype(self.dtype), self.embedding.astype(self.dtype).T)


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """table [N,E], tokens [B,T] int -> [B,T,E]: on the mesh in force, where B and T can
    be split over data and seq; the compiler's way elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = PartitionSpec("data", "seq")
    if not splits_rows(mesh, tokens.shape):
        return jnp.take(table, tokens, axis=0)
    ids = tensor_spec("embed/embedding", table.shape, mesh)
    split = len(ids) > 0  # N is split over `model`

    def local(table, ids, tokens):
        # ids [N/devices]: the numbers of this device's rows
        at = tokens - ids[0]
        own = (at >= 0) & (at < ids.size)
        # an id of another device reads some row
        x = jnp.take(table, jnp.where(own, at, 0), axis=0)
        x = jnp.where(own[..., None], x, 0)  # which counts as 0
        # one device has a token's vector, so the sum is that vector
        return jax.lax.psum(x, "model") if split else x

    return jax.shard_map(local, in_specs=(ids, ids, rows), out_specs=rows)(
        table, jnp.arange(table.shape[0]), tokens
    )


def splits_rows(mesh: Any, shape: tuple[int, ...]) -> bool:
    """Whether the mesh, None for none, can split B and T of shape [B,T] over data and
    seq."""
    homes = "data", "seq"
    if mesh is None or mesh.empty or math.prod(mesh.shape.values()) == 1:
        return False
    if not {*homes} <= {*mesh.axis_names}:
        return False
    return all(size % mesh.shape[home] == 0 for home, size in zip(homes, shape))
