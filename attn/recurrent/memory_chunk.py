"""One chunk of a learned memory: what its tokens write, what they read, what is left.

The memory is a small network. All gradients of a chunk are taken at one frozen set of
weights, so that what tokens do to the weights is linear, and each gradient of a matrix
is rank one: a token's input of that layer, times what came back to its output. Nothing
of the size of a matrix is therefore made of each token:

    S_t = m_t S_{t-1} - s_t u_t,     Z_t = a_t Z_{t-1} + S_t
    Z_t = A_t Z + f_t S - sum_i G_ti s_i u_i,    u_i = x_i^T d_i
    A_t = prod a,  G_ti = sum_{j=i..t} (A_t/A_j) (m_j ... m_{i+1}),  f_t = G_t0 m_1
    x Z_t = A_t x Z + f_t x S - sum_i G_ti s_i (x.x_i) d_i

with Z and S what the chunk begins with (Titans, equations 13-18; Miras' chunked form).
A network of several layers is read so layer by layer, exactly. Where the weights are a
function of Z that is not linear, Z_t is made of every token, or the function is taken
at the chunk's beginning. Ratios of products are sums of logarithms between two tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from attn.recurrent.chunks import only, pair_decays, pairs_by_channel

Weights = dict[str, jax.Array]  # matrices [B,H,in,out] and vectors [B,H,n]
READS = ("exact", "norm", "start")


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a memory answers and learns.

    answer(dot, vec, x): the network, of x [B,H,c,D]; dot(name, x) is x times the matrix
    of that name, vec(name) the vector. error(answer, v, delta): what is passed back to
    it for the answer to k, [B,H,c,V]. link: the weights W of dual ones Z, a matrix at a
    time (None: W = Z); one of the form Z / n has n [...,1,1] as its `norm(Z)`. read: of
    W_t ("exact"), with the norm of the chunk's beginning ("norm"), or of the weights
    there ("start"). decayed: gradients at A_t Z, as far as the memory has decayed by
    then.
    """

    answer: Callable
    error: Callable
    link: Any = None
    read: str = "exact"
    decayed: bool = False

    def weights(self, dual: Weights) -> Weights:
        """W of Z; vectors are themselves."""
        if self.link is None:
            return dual
        return {n: self.link(a) if a.ndim == 4 else a for n, a in dual.items()}


class Tokens(NamedTuple):
    """Tokens of a chunk: q, k [B,H,c,D], v [B,H,c,V]; step s [B,H,c]; log_keep, the log
    of a [B,H,c] or of each channel [B,H,c,D], log_momentum, of m, delta of the error
    and applied, a share of S_t that is added to Z (1 if None), [B,H,c]; None for none.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    step: jax.Array
    log_keep: jax.Array | None
    log_momentum: jax.Array | None
    delta: jax.Array | None
    applied: jax.Array | None


class Pairs(NamedTuple):
    """Numbers of a chunk; of c+1 rows the last one is its end. enter A [B,H,c+1] and,
    by channel, [B,H,c+1,D]; carry f [B,H,c+1]; pair G_ti s_i [B,H,c+1,c]; held and
    moved: of S at the end, m [B,H] and those of its tokens [B,H,c]."""

    enter: jax.Array
    carry: Any
    pair: jax.Array
    held: Any
    moved: Any


def pair_weights(tokens: Tokens, seen: jax.Array) -> Pairs:
    """seen [B|1,1,c+1,c]: which tokens are in Z_t, and in Z at the end. Those that take
    no part have a step of 0 and do not decay: logs of 0."""
    sees = seen.astype(jnp.float32)
    like = jnp.ones_like(tokens.step)[..., None, :]  # [B,H,1,c]

    def summed(g):
        """The sums of g [B,H,c,X] over what each row sees [B,H,c+1,X]."""
        return jnp.exp(sees @ g)  # [c+1,c] [c,X]

    def between(g):
        """exp(sum over those behind i, up to t) [B,H,c+1,c], where i is seen."""
        g = jnp.pad(g, [(0, 0), (0, 0), (0, 1)])[..., None]
        decays: Any = pair_decays(g)
        return only(seen, decays[..., :-1])

    keep, step = tokens.log_keep, tokens.step[..., None, :]
    if keep is not None and keep.ndim == 3:
        decay, enter = between(keep), summed(keep[..., None])[..., 0]
    else:
        decay = sees * like
        enter = jnp.ones_like(decay[..., 0]) if keep is None else summed(keep)
    if tokens.applied is not None:
        decay = decay * tokens.applied[..., None, :]
    if tokens.log_momentum is None:
        return Pairs(enter, None, decay * step, None, None)
    run = between(tokens.log_momentum)  # m_t .. m_(i+1)
    first = summed(tokens.log_momentum[..., None])  # m_t .. m_1
    pair = decay @ run[..., :-1, :] * step  # [c+1,c] [c,c]
    carry = decay @ first[..., :-1, :]  # f: [c+1,c] [c,1]
    return Pairs(
        enter, carry[..., 0], pair, first[..., -1, 0], run[..., -1, :] * step[..., 0, :]
    )


def written(rule: Rule, frozen: Weights, fixed: Weights, tokens: Tokens, pairs: Pairs):
    """u_i in factors, {name: (x_i [B,H,c,in], d_i [B,H,c,out])}, x_i None for a vector.
    """
    weights, inputs = rule.weights(frozen), {}
    shape = tokens.step.shape
    zeros = {n: jnp.zeros((*shape, a.shape[-1]), jnp.float32)
             for n, a in weights.items()}
    scale = pairs.enter[..., :-1, None] if rule.decayed else 1.0

    def predict(moves):
        def dot(name, x):
            inputs[name] = x
            # [c,in] [in,out]; moves are 0, and their gradient is d
            return scale * (x @ weights[name]) + moves[name]

        def vec(name):
            if name in fixed:
                return fixed[name]
            return scale * weights[name][..., None, :] + moves[name]

        answer = rule.answer(dot, vec, tokens.k)
        return answer, inputs

    answer, back, inputs = jax.vjp(predict, zeros, has_aux=True)
    error = rule.error(answer, tokens.v, tokens.delta)
    deltas, = back(error)
    return {n: (inputs.get(n), d) for n, d in deltas.items()}


def read(rule: Rule, z: Weights, s: Any, frozen: Weights, fixed: Weights,
         factors: dict, tokens: Tokens, pairs: Pairs) -> jax.Array:
    """The answers to q [B,H,c,V], of the memory after each token's own write."""
    at_start = rule.weights(frozen) if rule.read == "start" else None
    enter, pair = pairs.enter[:, :, :-1], pairs.pair[..., :-1, :]
    carry: Any = None if s is None else pairs.carry[..., :-1, None]

    def linear(name, x):
        """x Z_t."""
        before, d = factors[name]
        if tokens.log_keep is not None and tokens.log_keep.ndim == 4:
            # x A_t Z: [c,in] [in,out]
            met, begun = _by_channel(x, before, tokens, pair), (x * enter) @ z[name]
        else:
            met = pair * jnp.einsum("bhtd,bhid->bhti", x, before)  # [c,D] [D,c]
            # A_t x Z: [c,in] [in,out]
            begun = enter[..., None] * (x @ z[name])
        y = begun - met @ d  # [c,c] [c,out]
        # f_t x S: [c,in] [in,out]
        return y if s is None else y + carry * (x @ s[name])

    def whole(name):
        """Z_t itself, of every token [B,H,c,in,out]."""
        before, d = factors[name]
        # sum_i G_ti s_i x_i d_i^T: [B,H,c,c] x [B,H,c,in] x [B,H,c,out] ->
        # [B,H,c,in,out]
        made = jnp.einsum("bhti,bhid,bhif->bhtdf", pair, before, d)
        y = enter[..., None, None] * z[name][:, :, None] - made
        return y if s is None else y + carry[..., None] * s[name][:, :, None]

    def dot(name, x):
        if at_start is not None:
            # [c,in] [in,out]
            return x @ at_start[name]
        if rule.link is None:
            return linear(name, x)
        if rule.read == "norm":
            return linear(name, x) / rule.link.norm(frozen[name])
        # [B,H,c,in] x [B,H,c,in,out] -> [B,H,c,out]
        return jnp.einsum("bhtd,bhtdf->bhtf", x, rule.link(whole(name)))

    def vec(name):
        if name in fixed:
            return fixed[name]
        if at_start is not None:
            return at_start[name][..., None, :]
        # [c,c] [c,out]
        y = enter[..., None] * z[name][..., None, :] - pair @ factors[name][1]
        return y if s is None else y + carry * s[name][..., None, :]

    return rule.answer(dot, vec, tokens.q)


def _by_channel(x, before, tokens: Tokens, pair) -> jax.Array:
    """sum_d x_td before_id (a_t .. a_(i+1))_d s_i [B,H,c,c], for what is seen."""
    keep: Any = tokens.log_keep
    block = next(n for n in (16, 8, 4, 2, 1) if x.shape[2] % n == 0)
    return pairs_by_channel(x[None], before[None], keep[None], block)[0] * pair


def left(z: Weights, s: Weights | None, factors: dict, tokens: Tokens, pairs: Pairs):
    """Z and S at the end of the chunk."""
    enter, pair = pairs.enter[:, :, -1:], pairs.pair[..., -1, :, None]
    if tokens.log_keep is not None and tokens.log_keep.ndim == 4:
        enter, pair = pairs.enter[:, :, -1], pair * _since(tokens.log_keep)

    def added(name, weight):
        """sum_i weight_i u_i; weight [B,H,c,1|D]."""
        before, d = factors[name]
        if before is None:
            return (weight * d).sum(-2)
        return (weight * before).swapaxes(-1, -2) @ d  # [in,c] [c,out]

    def times(factor, a):
        """factor [B,H,1|in] of each row."""
        return (factor[..., None] if a.ndim == 4 else factor) * a

    after = {n: times(enter, a) - added(n, pair) for n, a in z.items()}
    if s is None:
        return after, None
    carry, held = pairs.carry[:, :, -1:], pairs.held[..., None]
    after = {n: a + times(carry, s[n]) for n, a in after.items()}
    moved = pairs.moved[..., None]
    return after, {n: times(held, a) - added(n, moved) for n, a in s.items()}


def _since(log_keep) -> jax.Array:
    """exp(sum of what comes behind each token) [B,H,c,D]."""
    later = jnp.pad(log_keep[:, :, 1:], [(0, 0), (0, 0), (0, 1), (0, 0)])
    return jnp.exp(jax.lax.cumsum(later, 2, reverse=True))
