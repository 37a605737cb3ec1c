"""Memory: weights of a small network that are learned while a text is read.

    Z_t = a_t Z_{t-1} + S_t,    S_t = m_t S_{t-1} - s_t dl(W; k_t, v_t)/dW,
    W = phi(Z),                 o_t = M(phi(Z_t), q_t)

Titans (Behrouz et al., 2024, arXiv:2501.00663) and Miras (Behrouz et al., 2025,
arXiv:2504.13173) are settings of this. The gradient is taken at the weights that the
token's chunk of b tokens of its sequence begins with; b = 1 is the recurrence as it is
written. What a chunk does is in `attn/recurrent/memory_chunk.py`; here chunks follow
each other by a scan. The backward pass computes each one again, so that of T tokens it
keeps what T/b chunks begin with, and is differentiated through, second order and all.

Chunks are those of sequences, while what is computed at once are pieces of a row. A
piece is no longer than a chunk, so at most one chunk begins in it, or sequences do: it
is passed over once for what stands before that, once behind it, and once for what
begins, by masks. Whole rows of one sequence take one pass.

Over a mesh axis the memory travels: it is not linear in what it begins with, so that no
shard can go ahead of the one before, and each of W shards waits for the others. That
takes as long as one device does, on a W-th of the memory.

Two limits of the linear memory with momentum, for D = V and one head, of a pass over a
chunk: 4 b D^2 flops of Z and S that are read (x Z, x S, k W), 4 b D^2 of what is added
to them, 2 b^2 D + b^3 of pairs, so about 10 b D^2 over the rate of matrix products; and
2 D^2 + 4 b D numbers moved, over the bandwidth, if Z and S leave the chip once a chunk
(for the backward pass), 4 b D if they do not. An MLP of F hidden channels has 2F/D
times as much of both. The linear memory with momentum has kernels, for whole rows of
one sequence (`attn/recurrent/memory_kernel.py`); all else is XLA's form.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attn.contract.dispatch import pick
from attn.contract.varying import varying
from attn.parallel.sharding import Axis
from attn.recurrent.chunks import from_chunks, only, to_chunks
from attn.recurrent.memory_chunk import (
    Rule, Tokens, Weights, left, pair_weights, read, written,
)
from attn.recurrent.memory_kernel import fused, refuse
from attn.recurrent.memory_pieces import Passes, Where, passes_of, seen_by
from attn.recurrent.one_after_another import one_after_another


class Memory(NamedTuple):
    """What is remembered between tokens, float32, {name: [B,H,...]}: `weights` Z and
    `frozen`, the Z that the present chunk begins with, both less what an empty memory
    has, so that zeros are an empty one; `momentum` S. None for what there is not."""

    weights: Weights
    momentum: Weights | None
    frozen: Weights | None


class Gates(NamedTuple):
    """step s [B,T,H]; log_keep, log a <= 0, [B,T,H] or of each channel of the key
    [B,T,H,D]; log_momentum, log m <= 0, [B,T,H]; delta, handed to the rule's error;
    applied, the share of S_t that is added to Z. None for what there is not."""

    step: jax.Array
    log_keep: jax.Array | None = None
    log_momentum: jax.Array | None = None
    delta: jax.Array | None = None
    applied: jax.Array | None = None


def learn(
    rule: Rule,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: Gates,
    initial: Weights,
    where: Where,
    *,
    state: Memory | None = None,
    fixed: Weights | None = None,
    chunk: int = 16,
    lag: bool = False,
    axis: Axis | None = None,
    dtype: Any = jnp.float32,
    implementation: str | None = None,
) -> tuple[Memory, jax.Array]:
    """The memory after T tokens, and what they read from it, o [B,T,H,V] float32.

    q, k [B,T,H,D], v [B,T,H,V]; initial: Z of an empty memory, {name: [H,...]}; fixed:
    vectors of the network that are not learned here, [H,n]. chunk: b tokens of a
    sequence that share the weights at which gradients are taken. lag: the first token
    of a chunk does so alone, the others with the weights behind it (Miras' lag token;
    one sequence a row). axis: the mesh axis that T is split over, inside `shard_map`.
    dtype: of what a kernel multiplies; XLA's form has float32.
    """
    if lag and where.segment is not None:
        raise NotImplementedError(
            "lag_token with segments: sequences that begin in one piece of a row would "
            "each need weights of their own"
        )
    run = functools.partial(
        _run, rule, q, k, v, gates, initial, fixed or {}, where, chunk, lag)

    def xla():
        first = _begin(state, initial, q.shape[0], gates.log_momentum is not None)
        whole = state is None and where.segment is None and not lag
        # each piece is a chunk of its own
        if chunk == 1 or whole and (axis is None or q.shape[1] % chunk == 0):
            # what a piece begins with is what its chunk begins with
            first = first._replace(frozen=None)
        if axis is None:
            return run(first)
        return one_after_another(run, first, axis, (*q.shape[:3], v.shape[3]))

    def kernel(backend):
        refuse(
            rule, gates, chunk, max(q.shape[3], v.shape[3]), backend,
            lag_token=lag, axis=axis is not None,
            segments=where.segment is not None, **{"a state": state is not None})
        z, s, o = fused(rule, q, k, v, gates, initial["W0"], chunk, dtype, backend)
        return Memory({"W0": z}, {"W0": s}, None), o

    tpu, gpu = (functools.partial(kernel, name) for name in ("tpu", "triton"))
    after, o = pick(implementation, xla=xla, gpu=gpu, tpu=tpu)
    less = functools.partial(jax.tree.map, lambda a, b: a - b[None])
    frozen = after.frozen if state is not None and chunk > 1 else None
    return Memory(
        less(after.weights, initial), after.momentum,
        None if frozen is None else less(frozen, initial),
    ), o


def empty(initial: Any, batch: int, momentum: bool, chunk: int) -> Memory:
    """The memory before the first token; initial: shapes {name: [H,...]}."""
    def zeros():
        return {n: jnp.zeros((batch, *shape), jnp.float32)
                for n, shape in initial.items()}

    return Memory(
        zeros(), zeros() if momentum else None, zeros() if chunk > 1 else None)


def answers(
    rule: Rule, memory: Memory, initial: Weights, fixed: Weights, q: jax.Array
) -> jax.Array:
    """What the memory as it is answers to q [B,T,H,D] -> [B,T,H,V], float32."""
    dual = jax.tree.map(lambda a, b: a + b[None], memory.weights, initial)
    weights = rule.weights(dual)
    vectors = {n: a[None] for n, a in fixed.items()} | {
        n: a for n, a in weights.items() if a.ndim == 3}

    def dot(name, x):
        return x @ weights[name]  # [T,in] [in,out]

    def vec(name):
        return vectors[name][:, :, None]  # [B|1,H,1,n]

    return rule.answer(dot, vec, q.swapaxes(1, 2)).swapaxes(1, 2)


def _begin(
    state: Memory | None, initial: Weights, batch: int, momentum: bool
) -> Memory:
    """Z, S and the frozen Z in full."""
    base = {n: jnp.broadcast_to(a[None], (batch, *a.shape)) for n, a in initial.items()}
    if state is None:
        zeros = jax.tree.map(jnp.zeros_like, base) if momentum else None
        return Memory(base, zeros, base)
    add = functools.partial(jax.tree.map, jnp.add)
    frozen = base if state.frozen is None else add(state.frozen, base)
    return Memory(add(state.weights, base), state.momentum, frozen)


def _run(
    rule: Rule, q, k, v, gates: Gates, initial: Weights, fixed: Weights, where: Where,
    chunk: int, lag: bool, first: Memory,
) -> tuple[Memory, jax.Array]:
    """The memory after the tokens, in full, and o [B,T,H,V]."""
    t = q.shape[1]
    c = min(chunk, t)
    passes = passes_of(where, t, c, chunk, lag, first.frozen is None)
    segment = None if where.segment is None else jnp.pad(
        where.segment, [(0, 0), (0, -t % c)]).reshape(q.shape[0], -1, c).swapaxes(0, 1)
    # [B,T,H,.] -> [N,B,H,c,.]
    tokens = Tokens(*(to_chunks(a, c) for a in (q, k, v)), *(
        None if a is None else to_chunks(a, c) if a.ndim == 4
        else to_chunks(a[..., None], c)[..., 0] for a in gates))
    fixed = {n: a[None, :, None] for n, a in fixed.items()}  # [1,H,1,n]
    anew = jax.tree.map(lambda a: a[None], initial)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(memory: Memory, x):
        tokens, segment, passes = x

        def step(memory, masks):
            return _pass(rule, memory, tokens, segment, masks, fixed, anew)

        if passes.member.shape[0] == 1:
            return step(memory, jax.tree.map(lambda a: a[0], passes))
        memory, o = jax.lax.scan(step, memory, passes)
        return memory, o.sum(0)  # [P,B,H,c,V]: each token is in one pass

    x = tokens, segment, passes
    memory, o = jax.lax.scan(piece, varying(first, x, anew, fixed), x)
    return memory, from_chunks(o, t)


def _pass(rule: Rule, memory: Memory, tokens: Tokens, segment, masks: Passes,
          fixed: Weights, anew: Weights) -> tuple[Memory, jax.Array]:
    """One pass over a piece: the memory behind it, and what its members read."""
    z, s, frozen = memory

    def choose(where, a, b):
        return jax.tree.map(lambda x, y: jnp.where(
            where.reshape(where.shape + (1,) * (y.ndim - 1)), x, y), a, b)

    # a sequence that begins in this pass finds an empty memory: Z anew, S = 0
    if masks.new is not None:
        z = choose(masks.new, anew, z)
        s = None if s is None else choose(masks.new, jax.tree.map(jnp.zeros_like, s), s)
    # gradients are taken at t', where the chunk begins (Titans, equations 16-18)
    if frozen is None:
        at = z
    else:
        at = frozen = choose(masks.freeze, z, frozen)
    member, seen = masks.member[:, None], seen_by(masks.member, segment)
    tokens = tokens._replace(
        step=only(member, tokens.step), log_momentum=_only(member, tokens.log_momentum),
        log_keep=_only(member, tokens.log_keep), applied=_only(member, tokens.applied))
    # A, f and G s of the chunk; its writes u_i at frozen weights; what is read of
    # Z_t; and Z and S at its end
    pairs = pair_weights(tokens, seen)
    factors = written(rule, at, fixed, tokens, pairs)
    o = read(rule, z, s, at, fixed, factors, tokens, pairs)  # [B,H,c,V]
    z, s = left(z, s, factors, tokens, pairs)
    return Memory(z, s, frozen), only(member[..., None], o)


def _only(member, a):
    """a [B,H,c] or [B,H,c,X], 0 for those that are no members [B|1,1,c]."""
    return None if a is None else only(member if a.ndim == 3 else member[..., None], a)
