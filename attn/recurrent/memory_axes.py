"""Two of Miras' four axes as data: what an error costs, and how old weights are kept.

A bias says what is passed back for the difference r of answer and value; a retention is
a function W = phi(Z) of the sum Z that the updates add to. (The others, the network and
the algorithm, are `attn/recurrent/memory_nets.py` and the gates of a memory.)

Source: Miras (Behrouz et al., 2025, arXiv:2504.13173), equations 10-27 by number, from
notes on the paper. Where sign and absolute value are smooth, as the paper remarks, it
is tanh(slope r) and sqrt(r^2 + eps); slope 10 and eps 1e-6 are those of the notes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

BIASES = ("dot", "l2", "lp", "huber_coord", "huber_norm", "huber_switch", "robust")
NEEDS_DELTA = ("huber_coord", "huber_norm", "huber_switch", "robust")
TINY = 1e-12  # below every squared length that is divided by


@dataclasses.dataclass(frozen=True)
class Bias:
    """The attentional bias: (answer, v [...,V], delta [...]) -> dl/d answer [...,V].

    Of r = answer - v; dot: -<answer, v>. l2: factor/2 ||r||^2.
    lp: ||r||_p^p. Of Huber's loss: huber_coord of each channel, huber_norm of the
    length (equations 14, 15), huber_switch, l2 up to the length delta and delta times
    l1 past it (16, no loss has this gradient). robust (17): 1/2 ||r||^2 + delta ||r||.
    smooth: sign and absolute value of lp and huber_switch are smooth.
    """

    kind: str = "l2"
    p: float = 3.0
    factor: float = 1.0
    smooth: bool = False
    slope: float = 10.0
    eps: float = 1e-6

    def __call__(self, answer, v, delta: jax.Array | None = None) -> jax.Array:
        """What is passed back to the network."""
        if self.kind == "dot":
            return -v
        r = answer - v
        if self.kind == "l2":
            # d/dy factor/2 ||y - v||^2
            return self.factor * r
        if self.kind == "lp":
            return self._lp(r)
        if delta is None:
            raise ValueError(f"bias={self.kind!r} without delta: expected [B,T,H]")
        bound = delta[..., None]
        if self.kind == "huber_coord":
            # equation 14: r up to delta, delta sign(r) past it, channel by channel
            return jnp.clip(r, -bound, bound)
        # the length, and a number that can be divided by where r is 0
        square = (r * r).sum(-1, keepdims=True)
        length = jnp.sqrt(jnp.maximum(square, TINY))
        if self.kind == "robust":
            # equation 17: r + delta r / ||r||
            return r + bound * r / length
        # equation 15: delta r / ||r|| past the length delta
        far = bound * r / length
        if self.kind == "huber_switch":
            # equation 16: delta sign(r)
            far = bound * self._sign(r)
        return jnp.where(length <= bound, self.factor * r, far)

    def _sign(self, r):
        return jnp.tanh(self.slope * r) if self.smooth else jnp.sign(r)

    def _lp(self, r):
        """p sign(r) |r|^(p-1)."""
        if self.smooth:
            return self.p * self._sign(r) * (r * r + self.eps) ** ((self.p - 1) / 2)
        zero = r == 0  # where a power below 1 has no derivative
        size = jnp.where(zero, 1, jnp.abs(r)) ** (self.p - 1)
        return self.p * jnp.sign(r) * jnp.where(zero, 0, size)


@dataclasses.dataclass(frozen=True)
class Lq:
    """W = Z / ||Z||_q^(q-2), the norm of a whole matrix (equation 24, as printed; of
    what is proposed). q = 2: W = Z. eps, in the norm, keeps Z = 0 from dividing by 0;
    where ||Z||_q falls below eps^(1/q) by decay, W goes on as Z / eps^((q-2)/q)."""

    q: float = 4.0
    eps: float = 1e-6

    def norm(self, z: jax.Array) -> jax.Array:
        """||Z||_q^(q-2) [...,1,1]."""
        total = ((z * z) ** (self.q / 2)).sum((-2, -1), keepdims=True)
        return (total + self.eps) ** ((self.q - 2) / self.q)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Z [...,in,out] -> W."""
        return z / self.norm(z)


@dataclasses.dataclass(frozen=True)
class KL:
    """W = c softmax(Z) over the inputs of each output (equations 21, 27; that slice is
    proposed): Z = 0 is uniform, and no logarithm of W is ever taken."""

    total: float = 1.0

    def __call__(self, z: jax.Array) -> jax.Array:
        """Z [...,in,out] -> W."""
        # over `in` of [...,in,out]
        return self.total * jax.nn.softmax(z, axis=-2)


@dataclasses.dataclass(frozen=True)
class Elastic:
    """W = sign(Z) max(0, |Z| - gamma): small sums are no weights (equation 23)."""

    gamma: float = 0.05

    def __call__(self, z: jax.Array) -> jax.Array:
        """Z [...,in,out] -> W."""
        # z - gamma sign(z) where |z| > gamma, else 0
        return z - jnp.clip(z, -self.gamma, self.gamma)


def sigmoid(z: jax.Array) -> jax.Array:
    """W = sigmoid(Z): the Bregman divergence of the logistic function."""
    return jax.nn.sigmoid(z)
