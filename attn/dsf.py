"""DSF (Sieber et al., 2024) arXiv:2405.15731: attention, SSM and RNN as one system.

Whatever turns a sequence u into a sequence y by a state that the gates, and not the
state itself, steer, is a linear system that changes with time:

    h_t = A_t h_{t-1} + B_t u_t,    y_t = C_t h_t + D_t u_t,    h_{-1} = 0

Unrolled it is one lower triangular operator, the attention matrix of any such model:

    y = Phi u,    Phi_tj = C_t A_t .. A_{j+1} B_j,    Phi_tt = C_t B_t + D_t

Two models are the same if their Phi are, however their states look. Here are the
systems of the mechanisms of this library and of their relatives, to be compared as
arrays. It is a tool to analyse with, not one to compute with: Phi costs T^2 N d. The
state is vec of [d,n], channel after channel: B = kron(I_d, b), C = kron(I_d, c^T).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp

LONGEST = 512


@dataclasses.dataclass(frozen=True)
class DSF:
    """DSF (Sieber et al., 2024) arXiv:2405.15731: one linear system, as arrays.

    A [T,N,N], or [T,N] if it is diagonal; B [T,N,d]; C [T,p,N]; D [T,p,d], None for 0.
    """

    A: Any
    B: Any
    C: Any
    D: Any = None

    def __post_init__(self):
        t, n, d = self.B.shape
        if self.A.shape not in ((t, n), (t, n, n)):
            raise ValueError(f"A has shape {self.A.shape}: expected {(t, n)} or "
                             f"{(t, n, n)}")
        if self.C.shape[0] != t or self.C.shape[2] != n:
            raise ValueError(f"C has shape {self.C.shape}: expected [{t},p,{n}]")
        if self.D is not None and self.D.shape != (t, self.C.shape[1], d):
            raise ValueError(
                f"D has shape {self.D.shape}: expected {(t, self.C.shape[1], d)}"
            )

    @property
    def dense(self) -> DSF:
        """The same with A [T,N,N] and D [T,p,d] written out."""
        a = self.A if self.A.ndim == 3 else jax.vmap(jnp.diag)(self.A)
        shape = (*self.C.shape[:2], self.B.shape[2])
        zero = jnp.zeros(shape, self.B.dtype)
        return DSF(a, self.B, self.C, zero if self.D is None else self.D)

    def scan(self, u: jax.Array, parallel: bool = False) -> jax.Array:
        """y [T,p] of u [T,d], step by step, or by an associative scan over T."""
        added = jnp.einsum("tnd,td->tn", self.B, u)  # B_t u_t: [N,d] [d]
        # A_t h: by channel, or [N,N] [N,.]
        times: Any = jnp.multiply if self.A.ndim == 2 else jnp.matmul
        if parallel:
            columns = added if self.A.ndim == 2 else added[..., None]  # [T,N,1]

            def join(f, g):
                """First f, then g: h -> A_g (A_f h + b_f) + b_g."""
                return times(g[0], f[0]), times(g[0], f[1]) + g[1]

            states = jax.lax.associative_scan(join, (self.A, columns))[1]
            states = states.reshape(added.shape)
        else:
            def step(h, now):
                h = times(now[0], h) + now[1]  # h_t = A_t h_{t-1} + B_t u_t
                return h, h

            states = jax.lax.scan(step, jnp.zeros_like(added[0]), (self.A, added))[1]
        y = jnp.einsum("tpn,tn->tp", self.C, states)  # C_t h_t: [p,N] [N]
        # y_t = C_t h_t + D_t u_t
        return y if self.D is None else y + jnp.einsum("tpd,td->tp", self.D, u)

    def transfer(self) -> jax.Array:
        """Phi [T,p,T,d], the operator itself."""
        t, n, d = self.B.shape
        if t > LONGEST:
            raise ValueError(f"T={t}: Phi is for analysis, expected T <= {LONGEST}")
        full = self.dense

        def step(m, now):
            i, a, b, c, skip = now
            # m_j = A_i .. A_{j+1} B_j and, at j = i, B_i: [N,N] [N,T,d]
            m = jnp.einsum("nm,mjd->njd", a, m).at[:, i].set(b)
            # Phi_ij = C_i m_j: [p,N] [N,T,d], and D_i at j = i
            return m, jnp.einsum("pn,njd->pjd", c, m).at[:, i].add(skip)

        zero = jnp.zeros((n, t, d), self.B.dtype)
        parts = jnp.arange(t), full.A, full.B, full.C, full.D
        return jax.lax.scan(step, zero, parts)[1]

    def rescaled(self, s: jax.Array) -> DSF:
        """The same operator with the state s_t h_t, s [T] without zeros."""
        before = jnp.concatenate([s[:1], s[:-1]])  # as h_{-1} = 0, the first is free
        change = (s / before).reshape((-1,) + (1,) * (self.A.ndim - 1))
        column = s.reshape(-1, 1, 1)
        # h' = s h: A'_t = A_t s_t / s_{t-1}, B'_t = s_t B_t, C'_t = C_t / s_t
        return DSF(self.A * change, self.B * column, self.C / column, self.D)


def distance(one: DSF, other: DSF) -> jax.Array:
    """The largest difference between two operators over the largest value of the first.
    """
    a, b = one.transfer(), other.transfer()
    return jnp.abs(a - b).max() / jnp.abs(a).max()


def operator(f: Callable[[jax.Array], jax.Array], u: jax.Array) -> jax.Array:
    """Phi [T,p,T,d] of any y [T,p] = f(u [T,d]) that is linear in u: an attention, as a
    function of its values."""
    # f is linear: its Jacobian is the same everywhere
    return jax.jacobian(f)(jnp.zeros_like(u))


def separable(q: jax.Array, k: jax.Array, eta: jax.Array, width: int) -> DSF:
    """y_t = sum_j (q_t.k_j) u_j / eta_t for features q, k [T,n] and normalisers eta
    [T]: attention as a system that decays by eta_{t-1} / eta_t."""
    # eta_{t-1} / eta_t; nothing comes in at t = 0
    decay = jnp.concatenate([jnp.zeros_like(eta[:1]), eta[:-1] / eta[1:]])
    a = jnp.repeat(decay[:, None], width * k.shape[1], 1)  # [T,width n]
    return DSF(a, _inward(k / eta[:, None], width), _outward(q, width))


def normalised(q: jax.Array, k: jax.Array, width: int) -> DSF:
    """`separable` with the sum of weights as normaliser: linear attention."""
    # eta_t = q_t.sum_(j<=t) k_j
    return separable(q, k, (q * jnp.cumsum(k, 0)).sum(1), width)


def softmax(q: jax.Array, k: jax.Array, width: int) -> DSF:
    """Causal softmax attention of q, k [T,m], exactly: no finite number of features
    will do, so every token has a channel of the state, as in a cache."""
    t, m = q.shape
    # [T,m] [m,T]
    s = jnp.where(jnp.tril(jnp.ones((t, t), bool)), q @ k.T * m**-0.5, -jnp.inf)
    ones = jnp.ones((t, width * t), q.dtype)  # A = 1: what is written stays
    own = jnp.eye(t, dtype=q.dtype)  # token t writes channel t
    return DSF(ones, _inward(own, width), _outward(jax.nn.softmax(s, -1), width))


def taylor(x: jax.Array, order: int) -> jax.Array:
    """Features [T,1+m+..+m^order] of x [T,m]: phi(q).phi(k) is the expansion of
    exp(q.k / sqrt(m)) to that order."""
    t, m = x.shape
    part = jnp.ones((t, 1), x.dtype)
    parts = [part]
    for p in range(1, order + 1):
        # [T,m^(p-1)] x [T,m] -> [T,m^p]: their inner product is s^p
        part = (part[:, :, None] * (x * m**-0.25)[:, None]).reshape(t, -1)
        parts.append(part / math.sqrt(math.factorial(p)))  # s^p / p!
    return jnp.concatenate(parts, 1)


def decayed(q: jax.Array, k: jax.Array, log_decay: jax.Array, width: int) -> DSF:
    """Linear attention with decay: log_decay [T] (retention, Lightning) or, by channel
    of the key, [T,n] (GLA); q, k [T,n]."""
    decay = jnp.exp(log_decay)
    decay = decay[:, None] if decay.ndim == 1 else decay
    a = jnp.tile(jnp.broadcast_to(decay, k.shape), (1, width))  # [T,width n]
    return DSF(a, _inward(k, width), _outward(q, width))


def delta(q, k, beta, log_decay, width: int) -> DSF:
    """The gated delta rule: A = exp(g_t) (I - beta_t k_t k_t^T), which is not diagonal;
    q, k [T,n], beta, log_decay [T]."""
    eye = jnp.eye(k.shape[1], dtype=k.dtype)
    # I - beta_t k_t k_t^T
    erase = eye[None] - beta[:, None, None] * k[:, :, None] * k[:, None]
    a = jnp.exp(log_decay)[:, None, None] * erase
    # [T,n,n] -> [T,width n,width n]: every channel of u has its own state
    a = jax.vmap(lambda a: jnp.kron(jnp.eye(width, dtype=a.dtype), a))(a)
    return DSF(a, _inward(k * beta[:, None], width), _outward(q, width))


def additive(q: jax.Array, k: jax.Array, width: int) -> DSF:
    """LightNet's recurrence: each channel's keys are shared out over time by a softmax;
    q, k [T,n]."""
    z = jax.lax.cumlogsumexp(k, 0)  # z_t = log sum_(s<=t) exp(k_s)
    # z_{-1} = -inf: nothing comes in
    before = jnp.concatenate([jnp.full_like(z[:1], -jnp.inf), z[:-1]])
    # A = exp(z_{t-1} - z_t), B = exp(k_t - z_t)
    return DSF(jnp.tile(jnp.exp(before - z), (1, width)),
               _inward(jnp.exp(k - z), width), _outward(q, width))


def chunked(gate: jax.Array, p: jax.Array, chunk: int) -> DSF:
    """RAT: gates g [T,d] sum the values of a chunk up, and weights p [T,C+1] mix what
    the C chunks end with and, last, the running sum. The state is that sum and, as in
    a cache, a place a chunk, which is written when it ends."""
    (t, d), ends = gate.shape, p.shape[1] - 1
    a, b = [], []
    eye, n = jnp.eye(d, dtype=gate.dtype), (ends + 1) * d
    for i in range(t):
        keep = jnp.diag(gate[i]) * (i % chunk != 0)  # g_t, 0 where a chunk begins
        move, into = jnp.eye(n, dtype=gate.dtype), jnp.zeros((n, d), gate.dtype)
        # the running sum, last of the places, and that of a chunk which ends here
        written = [ends] + [i // chunk] * (i % chunk == chunk - 1)
        for place in written:
            rows = slice(place * d, (place + 1) * d)
            # both become g_t h_own + (1 - g_t) u_t
            move = move.at[rows].set(0).at[rows, ends * d:].set(keep)
            into = into.at[rows].set(jnp.diag(1 - gate[i]))
        a.append(move)
        b.append(into)
    c = jax.vmap(lambda p: jnp.kron(p[None], eye))(p)  # p_t x I_d [T,d,(C+1) d]
    return DSF(jnp.stack(a), jnp.stack(b), c)


def s6(delta_logit, a, b, c, skip) -> DSF:
    """The selective SSM (Gu & Dao, 2023, arXiv:2312.00752): delta_logit [T,d], rates a
    [d,n] > 0, b and c [T,n], skip [d]. A is discretised exactly, B by Euler."""
    (t, d), n = delta_logit.shape, b.shape[1]
    step = jax.nn.softplus(delta_logit)  # Delta_t [T,d]
    # exp(-Delta_t a): [T,d,1] x [1,d,n] -> [T,d n]
    decay = jnp.exp(-step[:, :, None] * a[None]).reshape(t, d * n)
    # Delta_t b_t, of each channel for itself: [T,d,n,d]
    into = jnp.eye(d, dtype=b.dtype)[None, :, None] * (
        step[:, :, None, None] * b[:, None, :, None]
    )
    skips = jnp.broadcast_to(jnp.diag(skip)[None], (t, d, d))
    return DSF(decay, into.reshape(t, d * n, d), _outward(c, d), skips)


def ssd(delta_logit, a, b, c, width: int) -> DSF:
    """S6 with one rate a and one step [T] for all channels (Dao & Gu, 2024,
    arXiv:2405.21060): a decay and a gain that are coupled."""
    step = jax.nn.softplus(delta_logit)
    return decayed(c, b * step[:, None], -step * a, width)


def qlstm(f, i, o, alpha: jax.Array | None = None) -> DSF:
    """An LSTM whose gates see the input alone: logits f, i, o [T,d]; with `alpha` its
    forget gate is that of S6, sigmoid(-f)^alpha."""
    # sigmoid(-f)^alpha = exp(-alpha softplus(f)), the decay of S6
    keep = jax.nn.sigmoid(f) if alpha is None else jax.nn.sigmoid(-f) ** alpha
    return DSF(keep, _diagonal(jax.nn.sigmoid(i)), _diagonal(jax.nn.sigmoid(o)))


def rglru(r, i, rate, c: float = 8.0) -> DSF:
    """The RG-LRU of Griffin (De et al., 2024, arXiv:2402.19427): logits r, i [T,d] and
    rate [d]; a = exp(-c softplus(rate) sigmoid(r)), gain sqrt(1 - a^2) sigmoid(i)."""
    log_a = -c * jax.nn.softplus(rate)[None] * jax.nn.sigmoid(r)
    # 1 - a^2 = -expm1(2 log a): exact for a near 1
    gain = jnp.sqrt(-jnp.expm1(2 * log_a)) * jax.nn.sigmoid(i)
    return DSF(jnp.exp(log_a), _diagonal(gain), _diagonal(jnp.ones_like(gain)))


def _inward(b: jax.Array, width: int) -> jax.Array:
    """kron(I_width, b_t) [T,width n,width] of b [T,n]."""
    eye = jnp.eye(width, dtype=b.dtype)
    return jax.vmap(lambda b: jnp.kron(eye, b[:, None]))(b)  # [n,1] -> [width n,width]


def _outward(c: jax.Array, width: int) -> jax.Array:
    """kron(I_width, c_t^T) [T,width,width n] of c [T,n]."""
    return jnp.moveaxis(_inward(c, width), 1, 2)


def _diagonal(x: jax.Array) -> jax.Array:
    return jax.vmap(jnp.diag)(x)
