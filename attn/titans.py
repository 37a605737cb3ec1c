"""Titans (Behrouz et al., 2024) arXiv:2501.00663: a memory that is trained by what it
reads.

Each head has a small network whose weights are its state. A token is written by one
step of gradient descent on how badly the network answers its key, with momentum, so
that what surprised it lately is still being written, and with forgetting; a query is
answered by the network as it is then. Training goes through all of that.

    S_t = eta_t S_{t-1} - theta_t grad ||M(W; k_t) - v_t||^2       (equation 10)
    W_t = (1 - alpha_t) W_{t-1} + S_t,    o_t = M(W_t; q_t)        (13, 15)

The gradient is that at the weights which the token's chunk begins with (16-18). This is
the memory alone, LMM; `models/titans.py` puts it beside attention, MAC, MAG and MAL.
No code was published, and of the paper notes with its equation numbers were read: what
is proposed here says so.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.fields import check_fields
from attn.recurrent.memory import Gates
from attn.recurrent.memory_axes import Bias
from attn.recurrent.memory_chunk import Rule
from attn.recurrent.memory_layer import MemoryAttention
from attn.recurrent.memory_nets import ACTIVATIONS, MLP

FORGET = -6.0  # alpha begins at sigmoid(-6) = 0.0025


class Titans(MemoryAttention):
    """Titans (Behrouz et al., 2024) arXiv:2501.00663: the neural memory, LMM.

    depth: layers of the memory, 1 (a matrix) to 4, with `expansion` times D channels
    between (4 is proposed), `activation`, and, of more than one layer, `residual`: the
    key is added to the answer, and `norm`: a layer norm before that, whose gain and
    bias are learned by reading too. (With it the first steps are large, for it divides
    by how little an untrained network says, and gradients of long texts may overflow.)
    theta = theta_max sigmoid(x W + b). The steps of a chunk are all taken from one
    place, momentum repeats them, and together they must not overshoot: without a
    theta_max (proposed) it is (1 - eta)/chunk for a matrix, with which they cannot, and
    for more layers 0.1 (1 - eta), with b from -log(chunk).
    eta = sigmoid(x W + b), alpha = sigmoid(x W + b), b of alpha from -6 (proposed).
    momentum, forget: False leaves eta, alpha out. by_chunk: gates are those of a
    chunk's first token, for all of it (the paper has gates of chunks; which token they
    are made of is proposed). read: of the memory after the token ("exact") or of that
    at its chunk's beginning ("start"). chunk changes the result.

    Queries, keys and values go through causal convolutions of `conv` taps and silu, and
    queries and keys get length 1. Of H heads with fewer key heads, each has a memory of
    its own. Positions are not needed: `MultiHead(Titans(), position=None)`.
    """

    depth: int = 2
    expansion: int = 4
    activation: str = "gelu"
    residual: bool = True
    norm: bool = False
    momentum: bool = True
    forget: bool = True
    theta_max: float | None = None
    by_chunk: bool = False
    read: str = "exact"

    def __post_init__(self):
        check_fields(
            self, least={"conv": 0, "expansion": 1}, above={"theta_max": 0},
            choices={"depth": (1, 2, 3, 4), "activation": tuple(ACTIVATIONS),
                     "read": ("exact", "start")},
        )
        super().__post_init__()

    def network(self, d: int, v: int) -> MLP:
        """The memory for keys of width d and values of width v."""
        if self.depth == 1:
            return MLP(depth=1)
        return MLP(
            self.depth, self.expansion * d, self.activation, self.residual, self.norm)

    def rule(self, d: int, v: int) -> Rule:
        """A sum of squares, whose gradient carries the factor 2."""
        # ||M(W; k) - v||^2, not half of it
        return Rule(self.network(d, v), Bias("l2", factor=2.0), read=self.read)

    def learned_vectors(self, v: int) -> dict[str, tuple[int, ...]]:
        """Gain and bias of the norm are weights like others."""
        return self.network(v, v).vectors(v)

    @property
    def sums_updates(self) -> bool:
        """Whether there is momentum."""
        return self.momentum

    @property
    def shared(self) -> tuple[str, ...]:
        """What tokens of a chunk have in common, if `by_chunk`."""
        names = {"step": True, "log_keep": self.forget, "log_momentum": self.momentum}
        return tuple(n for n, there in names.items() if there)

    def gates(self, x: jax.Array, k: jax.Array, h: int) -> Gates:
        """theta, log(1 - alpha) and log eta [B,T,H], float32."""
        def logit(name, bias):
            return nn.Dense(
                h, dtype=jnp.float32, name=f"{name}_gate",
                bias_init=nn.initializers.constant(bias),
            )(x)  # [B,T,E] [E,H]

        flat, most = self.depth == 1, self.theta_max
        step = nn.sigmoid(logit("step", 0.0 if flat else -math.log(self.chunk)))
        keep = run = None
        if self.forget:
            keep = nn.log_sigmoid(-logit("forget", FORGET))  # log(1 - alpha)
        if self.momentum:
            eta = logit("momentum", 0.0)
            run = nn.log_sigmoid(eta)
            if most is None:
                step = step * nn.sigmoid(-eta)  # 1 - eta
        if most is None:
            most = 1 / self.chunk if flat else 0.1
        # theta = theta_max sigmoid(x W + b) [B,T,H], by default times 1 - eta
        return Gates(most * step, keep, run)
