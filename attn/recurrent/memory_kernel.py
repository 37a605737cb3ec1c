"""A learned memory by a kernel: which settings of it there is one for, and what it is
told (`pallas_kernels/memory`).

That is the linear memory with momentum on whole rows, each of one sequence: l2,
gradients at the weights that chunks begin with, every token read exactly.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from attn.contract.dispatch import interpreted
from attn.recurrent.chunks import to_chunks
from attn.recurrent.memory_axes import Bias
from attn.recurrent.memory_chunk import Rule, Tokens, pair_weights
from attn.recurrent.memory_nets import MLP
from attn.recurrent.memory_pieces import seen_by
from pallas_kernels import Refused, tables
from pallas_kernels.memory.api import memory
from pallas_kernels.memory.chunk import TILES, Numbers


def refuse(rule: Rule, gates: Any, chunk: int, widest: int, backend: str,
           **there: bool) -> None:
    """Raises Refused for what no kernel does, with the reason; widest: the greater of D
    and V; there: what a call has, by name."""
    error = rule.error
    squares = isinstance(error, Bias) and error.kind == "l2"
    wrong = {
        f"chunk={chunk}: expected {TILES[-1]} or less": chunk > TILES[-1],
        f"memory {rule.answer}: expected a linear one": rule.answer != MLP(1),
        f"error {error}: expected l2": not squares,
        "weights that are a function of Z: expected W = Z": rule.link is not None,
        f"read={rule.read!r}: expected 'exact'": rule.read != "exact",
        "gradients at decayed weights: expected those of the chunk's beginning":
            rule.decayed,
        "no momentum: expected gates of one": gates.log_momentum is None,
        "a decay of each channel: expected one of a head":
            gates.log_keep is not None and gates.log_keep.ndim == 4,
        # there the backward pass of wider tiles spills 9 to 70 kB a program
        f"chunk={chunk} and widths of {widest} on a GPU before Hopper: expected 16 and "
        "64 or less": backend == "triton" and _before_hopper()
            and (chunk > 16 or widest > 64),
    } | {f"{name}: expected whole rows of one sequence on one device": bad
         for name, bad in there.items()}
    if reasons := [text for text, bad in wrong.items() if bad]:
        raise Refused("there is no kernel for such a memory: " + "; ".join(reasons))


def _before_hopper() -> bool:
    """Whether this machine's GPU is NVIDIA's and older than compute capability 9.0."""
    found = tables.capability()
    return found is not None and float(found) < 9.0


def fused(rule: Rule, q, k, v, gates: Any, initial: jax.Array, chunk: int, dtype: Any,
          backend: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Z and S behind the tokens [B,H,D,V], and o [B,T,H,V] float32; q, k [B,T,H,D],
    v [B,T,H,V], initial [H,D,V]; dtype: of what products are made of."""
    b, d, width = q.shape[0], q.shape[3], v.shape[3]
    # [H,D,V] -> [B,H,D,V]
    weights = jnp.broadcast_to(initial[None], (b, q.shape[2], d, width))
    error: Any = rule.error
    q, k, v = (a.astype(dtype) for a in (q, k, v))
    # Z and S [B,H,D,V], o [B,T,H,V]; S_0 = 0
    after, run, o = memory(
        q, k, v, numbers_of(gates, chunk), weights, jnp.zeros_like(weights),
        factor=error.factor, backend=backend, interpret=interpreted())
    return after, run, o.astype(jnp.float32)


@functools.partial(jax.checkpoint, static_argnums=1)
def numbers_of(gates: Any, c: int) -> Numbers:
    """What `memory` is told of chunks of c tokens. Made again in the backward pass."""
    def cut(a):
        """[B,T,H] -> [N,B,H,c]; behind the last token steps and logs of 0."""
        return None if a is None else to_chunks(a[..., None], c)[..., 0]

    none: Any = None
    step, keep, run, _, applied = map(cut, gates)  # [N,B,H,c]; l2 has no delta
    tokens = Tokens(none, none, none, step, keep, run, None, applied)
    n, t = step.shape[0], gates.step.shape[1]
    member = (jnp.arange(n * c) < t).reshape(n, 1, c)
    # momentum would go on behind the last token
    found = jax.vmap(lambda tokens, own: pair_weights(tokens, seen_by(own, None)))(
        tokens, member)
    # [N,B,H,...] -> [B,H,N,...]
    return Numbers(*(jnp.moveaxis(a, 0, 2) for a in found))
