"""Miras (Behrouz et al., 2025) arXiv:2504.13173: recurrent layers as memories, by four
choices.

What a recurrent layer keeps is a memory that learns to answer keys with values while it
reads. Which network it is, what an error costs (the attentional bias), how old weights
are kept (the retention) and by which algorithm it learns are four separate choices:
linear attention, RetNet, GLA and the delta rules are settings of them, and so are three
new ones, `Moneta`, `Yaad` and `Memora`.

    Z_t = alpha_t Z_{t-1} - eta_t dl(M(W, k_t), v_t)/dW,    W = phi(Z),
    o_t = M(phi(Z_t), q_t)

The gradient is that at the weights which the token's chunk begins with; chunk = 1 is
the recurrence as it is written. No code was published, and of the paper notes with its
equation numbers were read: what is proposed here says so.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.fields import check_fields
from attn.recurrent.decay_gate import log_rates, small_steps
from attn.recurrent.memory import Gates
from attn.recurrent.memory_axes import (
    BIASES, KL, NEEDS_DELTA, Bias, Elastic, Lq, sigmoid,
)
from attn.recurrent.memory_chunk import READS, Rule
from attn.recurrent.memory_layer import MemoryAttention
from attn.recurrent.memory_nets import MLP, Diagonal
from attn.recurrent.short_qkv import unread

MEMORIES = ("linear", "mlp2", "mlp2_plain", "vector")
RETENTIONS = ("none", "decay", "lq", "kl", "elastic", "bregman")
FORGETS = ("token", "channel", "retnet", "mamba2")
ALGORITHMS = ("gd", "momentum", "implicit")
RANK = 16  # of gates of channels, as GLA has them
KEEP = 6.0  # alpha begins at sigmoid(6) = 0.9975


class Miras(MemoryAttention):
    """Miras (Behrouz et al., 2025) arXiv:2504.13173: a memory of four choices.

    memory: "linear", "mlp2" (residual, layer norm that is not learned by reading, GELU,
    `expansion`), "mlp2_plain" without the first two, or "vector" (V = D). bias, with p,
    l2_factor and smooth: see `attn.recurrent.memory_axes.Bias`; its delta is a gate,
    softplus(x W + b) (proposed). retention: phi, with q of lq and threshold of elastic;
    "none" has no alpha, "decay" alpha alone. algorithm: "gd", "momentum" (one more
    gate), or "implicit", a step of eta / (1 + eta |k|^2) (Longhorn).

    forget, what alpha is: a gate of each "token", sigmoid(x W + b), of each "channel"
    of the key (as in GLA), "retnet", 1 - 2^(-5-h), or "mamba2" (as in Gated DeltaNet).
    eta = eta_max sigmoid(x W + b); eta_max: 1/chunk for a linear memory or a vector,
    else 0.1, with b from -log(chunk) (proposed); steps="one": eta = 1. initial: Z
    before the first token, "learned" (Xavier, a head) or "zero". point: gradients at
    the memory "previous" to the chunk, or at that "decayed" by the alphas since. read:
    of W_t ("exact"), of Z_t with the norm that the chunk began with ("norm", of lq), or
    of W there ("start"). lag_token: a chunk's first token makes a step of its own.
    chunk changes the result.

    short: queries, keys and values go through convolutions of `conv` taps and silu, and
    queries and keys get length 1; without, they are what they are. scale: of the
    answer. Positions are not needed: `MultiHead(Miras(), position=None)`.
    """

    memory: str = "mlp2"
    bias: str = "l2"
    retention: str = "decay"
    algorithm: str = "gd"
    expansion: int = 4
    p: float = 3.0
    q: float = 4.0
    threshold: float = 0.05
    l2_factor: float = 1.0
    smooth: bool = True
    forget: str = "token"
    steps: str = "gate"
    eta_max: float | None = None
    initial: str = "learned"
    point: str = "previous"
    read: str = "exact"
    lag_token: bool = False
    short: bool = True
    scale: float = 1.0

    def __post_init__(self):
        check_fields(
            self, least={"conv": 0, "expansion": 1, "p": 1.0, "q": 1.0},
            above={"eta_max": 0, "threshold": 0, "l2_factor": 0},
            choices={
                "memory": MEMORIES, "bias": BIASES, "retention": RETENTIONS,
                "algorithm": ALGORITHMS, "forget": FORGETS, "steps": ("gate", "one"),
                "initial": ("learned", "zero"), "point": ("previous", "decayed"),
                "read": READS,
            },
        )
        self._check_together()
        super().__post_init__()

    def _check_together(self) -> None:
        linked = self.retention not in ("none", "decay")
        wrong = {
            "read='norm'": self.read == "norm" and self.retention != "lq",
            "initial='zero'": self.initial == "zero" and (
                self.retention == "lq" or self.memory.startswith("mlp2")),
            "point='decayed'": self.point == "decayed" and (
                linked or self.forget == "channel"),
            "forget='channel'": self.forget == "channel" and (
                self.memory != "linear" or linked or self.algorithm == "momentum"),
            f"memory='vector' and retention={self.retention!r}":
                self.memory == "vector" and linked,
        }
        expected = {
            "read='norm'": "retention='lq', whose weights are Z over a norm",
            "initial='zero'": "'learned': lq divides by a norm, and an MLP of zeros "
                              "has no gradient",
            "point='decayed'": "retention='decay', and not forget='channel'",
            "forget='channel'": "memory='linear', retention='decay', no momentum",
            f"memory='vector' and retention={self.retention!r}": "'none' or 'decay'",
        }
        for what, broken in wrong.items():
            if broken:
                raise ValueError(f"Miras: {what}: expected {expected[what]}")

    def network(self, d: int, v: int) -> MLP | Diagonal:
        """The memory for keys of width d and values of width v."""
        if self.memory == "vector":
            if d != v:
                raise ValueError(f"memory='vector': V={v}, expected D={d}")
            return Diagonal()
        if self.memory == "linear":
            return MLP(depth=1)
        whole = self.memory == "mlp2"
        # M(k) = k + LN(gelu(k W0) W1), or gelu(k W0) W1 alone
        return MLP(2, self.expansion * d, residual=whole, norm=whole)

    def rule(self, d: int, v: int) -> Rule:
        """The bias, phi, and how it is read."""
        links: dict[str, Any] = {
            "lq": Lq(self.q), "kl": KL(), "elastic": Elastic(self.threshold),
            "bregman": sigmoid,
        }
        bias = Bias(self.bias, self.p, self.l2_factor, self.smooth)
        return Rule(
            self.network(d, v), bias, links.get(self.retention), self.read,
            self.point == "decayed",  # phi(alpha Z), as in the gated delta rule
        )

    def learned_vectors(self, v: int) -> dict[str, tuple[int, ...]]:
        """The memory that is a vector; gain and bias of the norm are not learned."""
        return {"w": (v,)} if self.memory == "vector" else {}

    @property
    def sums_updates(self) -> bool:
        """Whether there is momentum."""
        return self.algorithm == "momentum"

    def short_arrays(self, arrays, tails, segment, axis):
        """The next tails, and q, k, v float32."""
        if self.short:
            return super().short_arrays(arrays, tails, segment, axis)
        return unread(tails), [a.astype(jnp.float32) for a in arrays]

    def begin(self, name: str):
        """What initialises a matrix or the memory's vector, None for zeros."""
        return None if self.initial == "zero" else super().begin(name)

    def gates(self, x: jax.Array, k: jax.Array, h: int) -> Gates:
        """eta, log alpha, the log of the momentum's decay, and delta, float32."""
        def logit(name, bias=0.0, width=h):
            return nn.Dense(
                width, dtype=jnp.float32, name=f"{name}_gate",
                bias_init=nn.initializers.constant(bias),
            )(x)  # [B,T,E] [E,H]

        eta = jnp.ones((*x.shape[:2], h), jnp.float32)
        if self.steps == "gate":
            flat, most = self.memory in ("linear", "vector"), self.eta_max
            if most is None:
                # b gradients of one point add up: with 1/b, and |k| = 1, that is stable
                most = 1 / self.chunk if flat else 0.1
            bias = 0.0 if flat else -math.log(self.chunk)
            eta = most * nn.sigmoid(logit("step", bias))
        if self.algorithm == "implicit":
            length = (k * k).sum(-1)[..., None]  # |k|^2 [B,T,K,1], of K G heads
            each = eta.reshape(*length.shape[:3], -1)  # [B,T,K,G]
            # the implicit step: eta / (1 + eta |k|^2)
            eta = (each / (1 + each * length)).reshape(eta.shape)
        run = nn.log_sigmoid(logit("momentum")) if self.sums_updates else None
        delta = nn.softplus(logit("delta")) if self.bias in NEEDS_DELTA else None
        keep = None
        if self.retention != "none":
            keep = self._log_alpha(x, (h, k.shape[3]), logit)
        return Gates(eta, keep, run, delta)

    def _log_alpha(self, x, shape: tuple[int, int], logit) -> jax.Array:
        h = shape[0]
        if self.forget == "token":
            return nn.log_sigmoid(logit("forget", KEEP))
        if self.forget == "retnet":
            log = np.log1p(-(2.0 ** -(5.0 + np.arange(h))))  # 1 - 2^(-5-h)
            return jnp.broadcast_to(jnp.asarray(log, jnp.float32), (*x.shape[:2], h))
        if self.forget == "mamba2":  # -exp(A) softplus(x W + b)
            rate = jnp.exp(self.param("A_log", log_rates, (h,))).reshape(1, 1, h)
            bias = self.param("dt_bias", small_steps, (h,)).reshape(1, 1, h)
            return -rate * nn.softplus(logit("forget") + bias)
        # by channel, through a low rank: [B,T,E] [E,R]
        low = nn.Dense(RANK, use_bias=False, dtype=jnp.float32, name="forget_down")(x)
        up = nn.DenseGeneral(shape, dtype=jnp.float32, name="forget_up")(low)
        # the 16th root, as GLA has it, holds alpha near to 1
        return nn.log_sigmoid(up) / 16.0  # [B,T,R] [R,H,D]


class Moneta(Miras):
    """Moneta: an MLP, the l_p error (p = 3) and the l_q retention (q = 4)."""

    bias: str = "lp"  # equations 10 and 11
    retention: str = "lq"  # equation 24


class Yaad(Miras):
    """Yaad: an MLP, Huber's error with a threshold of each token, and decay."""

    bias: str = "huber_switch"  # equation 16


class Memora(Miras):
    """Memora: an MLP, squared error, and the KL retention: weights are a softmax."""

    retention: str = "kl"  # equations 21 and 27
