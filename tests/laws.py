"""The laws: one table of tests that every attention passes.

To add an attention, add an entry to `ENTRIES`. What only one attention claims stands in
its own test file.

Laws are compiled whole: `compiled` is one program for the output and all gradients, and
what the attention gives on one device (`whole`) is computed once for all of its laws.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.aaren import Aaren
from attn.abc import ABC
from attn.act import ACT
from attn.actqkv import ActQKV
from attn.adakv import AdaKV
from attn.based import Based
from attn.combiner import Combiner
from attn.contract import dispatch
from attn.contract.attention import said
from attn.contract.patterns import of_context, patterns
from attn.cosformer import CosFormer
from attn.delta import Delta
from attn.duo import Duo
from attn.essa import Essa
from attn.flexprefill import FlexPrefill
from attn.flow import Flow
from attn.gla import GLA
from attn.h2o import H2O
from attn.hip import HiP
from attn.kivi import KIVI
from attn.landmark import Landmark
from attn.lara import LARA
from attn.layers import MultiHead
from attn.lightnet import LightNet
from attn.lightning import Lightning
from attn.lineartransformer import LinearTransformer
from attn.linformer import Linformer
from attn.local import Local
from attn.longshort import LongShort
from attn.masks import Causal, Full, Sink, Window
from attn.miras import Memora, Miras, Moneta, Yaad
from attn.moba import MoBA
from attn.nsa import NSA
from attn.nystrom import Nystrom
from attn.pasta import Pasta
from attn.performer import Performer
from attn.positional import Positional
from attn.positions import ALiBi, RoPE
from attn.prflash import PrFlash
from attn.probsparse import ProbSparse
from attn.pyramidkv import PyramidKV
from attn.quest import Quest
from attn.rat import RAT
from attn.razor import Razor
from attn.recycled import Recycled
from attn.relative import Relative
from attn.retnet import RetNet
from attn.retrieval import Retrieval
from attn.routing import Routing
from attn.s2 import S2
from attn.s4d import S4D
from attn.saq import SAQ
from attn.sinklora import SinkLoRA
from attn.sea import SEA
from attn.seer import Seer
from attn.seerr import SeerR
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from attn.streaming import Streaming
from attn.titans import Titans
from attn.topk import TopK
from attn.tova import TOVA
from experiments.measure import cost
from models import placement

# relative errors; never loosened in a test of one attention
TOLERANCE = {"float32": 1e-5, "gradient": 2e-5, "low": 2.0, "rounding": 2.5}
B, T, H, K, D, V = 2, 16, 4, 2, 8, 12
LONG = 257  # tokens, one more than a tile has
MESHES = ((1, 4, 2), (2, 4, 1), (1, 2, 4), (1, 8, 1))
# sequences of two lengths, so that each length is compiled once
SEGMENTS = np.array([[1] * 5 + [2] * 8 + [0] * 3, [0] * 3 + [1] * 5 + [3] * 8])


@dataclasses.dataclass(frozen=True)
class Learned:
    """A linen attention as the laws call one: its parameters are drawn once, and the
    tokens x that it gates on are made of q, k and v, one by one."""

    module: nn.Module

    def __call__(self, q, k, v, *, segments=None):
        x = self._tokens(q, k, v)
        return self.module.apply(self._params, q, k, v, x=x, segments=segments)

    def init_state(self, size, q, k, v):
        x = jax.eval_shape(self._tokens, q, k, v)
        return self.module.init_state(size, q, k, v, x=x)

    def step(self, state, q, k, v, *, segments=None):
        x = self._tokens(q, k, v)
        return self.module.apply(
            self._params, state, q, k, v, x=x, segments=segments, method="step"
        )

    @property
    def causal(self) -> bool:
        return hasattr(self.module, "step") and getattr(self.module, "causal", True)

    @staticmethod
    def _tokens(q, k, v):
        if any(a.ndim != 4 or 0 in a.shape for a in (q, k, v)):
            return None  # a wrong call, which has to be refused for q, k and v
        if len({a.shape[:2] for a in (q, k, v)}) > 1:
            return None
        # the mean over heads is the same for repeated ones
        each = q.reshape(*q.shape[:2], -1), k.mean(2), v.mean(2)
        return jnp.concatenate([a.astype(q.dtype) for a in each], -1)

    @property
    def _params(self):
        plain = self.module.clone(axis=None, implementation=None, parent=None)
        return jax.tree.map(jnp.asarray, drawn(plain))


@functools.cache
def plain_error():
    """The relative error of plain jnp in bfloat16."""
    low = inputs(dtype=jnp.bfloat16)
    exact = tuple(a.astype(jnp.float32) for a in low)
    return relative(jax.jit(plain)(*low), jax.jit(plain)(*exact))


def relative(a, b):
    """Relative error in the norm, in float64."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@functools.cache
def drawn(module):
    """Parameters of a module, computed once even if that happens inside of a trace."""
    with jax.ensure_compile_time_eval():
        q, k, v = inputs(t=4)
        x = Learned._tokens(q, k, v)
        params = jax.jit(module.init)(jax.random.key(3), q, k, v, x=x)
        # away from zeros and ones, where a parameter may have no effect
        params = jax.tree.map(
            lambda a: a + 0.1 * jax.random.normal(jax.random.key(4), a.shape), params
        )
        return jax.device_get(params)  # of no mesh, whichever was in force


@dataclasses.dataclass(frozen=True)
class Entry:
    """An attention and what it claims.

    limit: an attention with the setting of the limit that the paper names, and the one
    that it then equals. same: two settings of which the paper, or its docstring, says
    that they do not differ. flops: the exponent of T. decode: the exponent of the size
    of a full memory in the flops of one more token; held: in the bytes of that
    memory, None for the same. kernel: whether one runs it. slot:
    tokens that a slot of its memory stands for; ends: whether that memory can be full.
    long: the settings whose cost is counted, at lengths of up to 2^17. packed: streams
    over a mesh are of packed segments; segmented: it takes segments, and if not refuses
    them with the reason. spread: K heads may be repeated to H without a
    change of the result. in_v: its result is linear in v. default: the exponent of T
    with default settings, if those are of another kind than the settings here. wraps:
    the row whose mechanism it is a thin wrapper of: that row is proved on all meshes,
    its wrappers take one each, in turn. split: over how many devices its heads can be
    split.
    """

    attention: Any
    limit: tuple[Any, Any] | None = None
    same: tuple[Any, Any] | None = None
    flops: float = 2.0
    decode: float = 1.0
    held: float | None = None
    kernel: bool = True
    slot: int = 1
    ends: bool | None = None
    long: Any = None
    packed: bool = False
    segmented: bool = True
    spread: bool = True
    in_v: bool = True
    default: float | None = None
    wraps: str | None = None
    split: int = H

    def __post_init__(self):
        ready = lambda a: Learned(a) if isinstance(a, nn.Module) else a
        long = self.attention if self.long is None else self.long
        ends = self.decode > 0 if self.ends is None else self.ends
        object.__setattr__(self, "ends", ends)
        for name, a in (("attention", self.attention), ("long", long)):
            object.__setattr__(self, name, ready(a))
        for name in ("limit", "same"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(map(ready, getattr(self, name))))

    @property
    def ordered(self) -> bool:
        """Whether it has a causal order, and so can be streamed."""
        a = self.attention
        return hasattr(a, "step") and getattr(a, "causal", True)


def given(attention, **fields):
    """The attention with other settings."""
    if isinstance(attention, Learned):
        return Learned(attention.module.clone(**fields, parent=None))
    return dataclasses.replace(attention, **fields)


def stateless(name):
    """Skips a law about order and streams for what has none."""
    if not ENTRIES[name].ordered:
        pytest.skip("it has no causal order")


def refuses_segments(name):
    """Whether it has no use for segments, which it then says."""
    if ENTRIES[name].segmented:
        return False
    with pytest.raises(NotImplementedError, match="segments: "):
        ENTRIES[name].attention(*inputs(), segments=jnp.asarray(SEGMENTS))
    return True


LINEAR = Miras(
    memory="linear", bias="dot", retention="none", steps="one", initial="zero",
    short=False, scale=D ** -0.5, chunk=4,
)
SINKS = Causal() & (Window(5) | Sink(2))
ENTRIES = {
    # a window that reaches the first token
    "softmax": Entry(
        Softmax(exchange="zigzag"), (Softmax(mask=Causal() & Window(99)), Softmax())
    ),
    "window": Entry(
        Softmax(SINKS, softcap=5.0, score=ALiBi(4), exchange="ring"), flops=1, decode=0
    ),
    # windows that reach every token
    "local": Entry(
        Local(window=5), (Local(window=T), Softmax()), flops=1, decode=0,
        wraps="softmax",
    ),
    "local_normal": Entry(
        Local(window=3, causal=False),
        (Local(window=T, causal=False), Softmax(mask=Full())), flops=1,
        wraps="softmax",
    ),
    "lightning": Entry(
        Lightning(), same=(Lightning(), Lightning(chunk=4)), flops=1, decode=0
    ),
    # without decay
    "retnet": Entry(
        RetNet(), (RetNet(first=99), Lightning(slopes="none", scale=D ** -0.5)),
        flops=1, decode=0, wraps="lightning",
    ),
    # gates of 1
    "gla": Entry(
        GLA(), (GLA(temperature=1e9), Lightning(slopes="none", scale=D ** -0.5)),
        flops=1, decode=0, wraps="lightning",
    ),
    "flow": Entry(
        Flow(), same=(Flow(chunk=3), Flow()), flops=1, decode=0, packed=True
    ),
    "flow_normal": Entry(
        Flow(causal=False), same=(Flow(causal=False, eps=1e-9), Flow(causal=False)),
        flops=1, kernel=False,
    ),
    "lightnet": Entry(
        LightNet(), (LightNet(init_lse=-40.0, chunk=3), LightNet()), flops=1, decode=0,
        packed=True,
    ),
    "lightnet_normal": Entry(
        LightNet(causal=False),
        (LightNet(causal=False, init_lse=-40.0), LightNet(causal=False)), flops=1,
        kernel=False, wraps="flow_normal",
    ),
    "rat": Entry(RAT(chunk=4), slot=4),
    "essa": Entry(Essa(), flops=1, kernel=False, wraps="flow_normal"),
    "based": Entry(
        Based(), same=(Based(compact=True), Based()), flops=1, decode=0, kernel=False,
        wraps="lightning",
    ),
    "aaren": Entry(
        Aaren(), same=(Aaren(chunk=4), Aaren()), flops=1, decode=0, packed=True
    ),
    "aaren_pool": Entry(Aaren(causal=False), flops=1, kernel=False),
    "abc": Entry(
        ABC(landmarks=3), same=(ABC(landmarks=3, chunk=4), ABC(landmarks=3)), flops=1,
        decode=0, packed=True, in_v=False,
    ),
    "abc_normal": Entry(
        ABC(landmarks=3, causal=False), flops=1, kernel=False, wraps="aaren_pool",
        in_v=False,
    ),
    # the convolutions of the delta rule have weights for the channels of K heads
    "delta": Entry(
        Delta(), same=(Delta(chunk=4), Delta()), flops=1, decode=0, spread=False,
        in_v=False,
    ),
    "delta_gated": Entry(
        Delta(gated=True, negative=True, conv=2), flops=1, decode=0, packed=True,
        spread=False, wraps="delta",
        in_v=False,
    ),
    "delta_channels": Entry(
        Delta(gated=True, channels=True, rank=4, conv=2, chunk=8), flops=1, decode=0,
        spread=False, wraps="delta", in_v=False,
    ),
    "titans": Entry(
        Titans(depth=1, chunk=4), flops=1, decode=0, spread=False, packed=True,
        in_v=False,
    ),
    # small steps: of larger ones on random tokens, gradients grow with every chunk
    "titans_mlp": Entry(
        Titans(chunk=4, by_chunk=True, expansion=2, norm=True, theta_max=0.03), flops=1,
        decode=0, kernel=False, spread=False, packed=True, wraps="titans",
        in_v=False,
    ),
    # a linear memory that is told values, whatever it answers
    "miras": Entry(
        LINEAR, (LINEAR, Lightning(slopes="none", scale=D ** -0.5)), flops=1, decode=0,
        kernel=False, wraps="titans",
    ),
    "moneta": Entry(
        Moneta(chunk=4, expansion=2, eta_max=0.01), flops=1, decode=0, kernel=False,
        spread=False, packed=True, wraps="titans",
        in_v=False,
    ),
    "yaad": Entry(
        Yaad(chunk=4, expansion=2, eta_max=0.001), flops=1, decode=0, kernel=False,
        spread=False, packed=True, wraps="titans",
        in_v=False,
    ),
    "memora": Entry(
        Memora(chunk=4, expansion=2, eta_max=0.01), flops=1, decode=0, kernel=False,
        spread=False, packed=True, wraps="titans",
        in_v=False,
    ),
    # as many landmarks as tokens are exact attention
    "nystrom": Entry(
        Nystrom(landmarks=3), (Nystrom(landmarks=T), Softmax(mask=Full())), flops=1,
        kernel=False, segmented=False, wraps="linformer",
    ),
    "lara": Entry(
        LARA(landmarks=3), flops=1, kernel=False, segmented=False, wraps="linformer",
    ),
    # as many queries as there are
    "probsparse": Entry(
        ProbSparse(), (ProbSparse(factor=T), Softmax(mask=Full())), flops=1,
        kernel=False, segmented=False, wraps="linformer",
    ),
    # norms are over the channels of K heads
    "longshort": Entry(
        LongShort(window=3, chunk=4, memory=4), slot=4, kernel=False, segmented=False,
        spread=False, in_v=False, long=LongShort(window=8, chunk=64, memory=64),
    ),
    "longshort_normal": Entry(
        LongShort(window=3, rank=2, causal=False), flops=1, kernel=False,
        segmented=False, spread=False, in_v=False, wraps="linformer", default=2,
    ),
    # it reads neither q nor k
    "s4d": Entry(
        S4D(state=4), same=(S4D(state=4, fft=True), S4D(state=4)), flops=1, decode=0,
        kernel=False, packed=True, in_v=False,
    ),
    "s4d_normal": Entry(
        S4D(state=4, causal=False), flops=1, kernel=False, in_v=False, wraps="s4d",
    ),
    # directions are of K heads
    "performer": Entry(
        Performer(features=6), same=(Performer(features=6, chunk=4),
                                     Performer(features=6)),
        flops=1, decode=0, spread=False, packed=True, wraps="lightnet",
    ),
    "performer_normal": Entry(
        Performer(features=6, causal=False), flops=1, kernel=False, spread=False,
        wraps="lightnet_normal",
    ),
    "performer_code": Entry(
        Performer(features=6, causal=False, eps=1e-4, least=0.1),
        same=(Performer(features=6, causal=False, eps=1e-12),
              Performer(features=6, causal=False)),
        flops=1, kernel=False, spread=False, wraps="lightnet_normal",
    ),
    "cosformer": Entry(
        CosFormer(length=512), same=(CosFormer(chunk=3), CosFormer()), flops=1,
        decode=0, wraps="lightning", long=CosFormer(length=2**17),
    ),
    "cosformer_normal": Entry(
        CosFormer(causal=False, length=None),
        same=(CosFormer(causal=False, length=T), CosFormer(causal=False, length=None)),
        flops=1, kernel=False, wraps="flow_normal",
    ),
    "lineartransformer": Entry(
        LinearTransformer(), same=(LinearTransformer(chunk=3), LinearTransformer()),
        flops=1, decode=0, wraps="lightning",
    ),
    "lineartransformer_normal": Entry(
        LinearTransformer(causal=False), flops=1, kernel=False, wraps="flow_normal"
    ),
    "linformer": Entry(
        Linformer(length=2**14, rank=4), flops=1, kernel=False,
        long=Linformer(length=2**17, rank=4),
    ),
    # one block is exact attention
    "landmark": Entry(
        Landmark(block=3), (Landmark(block=T), Softmax()), kernel=False,
        long=Landmark(block=63),
    ),
    "landmark_rope": Entry(
        Landmark(block=3, rope=RoPE()), kernel=False, long=Landmark(block=63),
        wraps="landmark",
    ),
    "landmark_top": Entry(
        Landmark(block=3, top_k=9), decode=1.0, kernel=False, long=Landmark(block=63),
        wraps="landmark",
    ),
    # nothing is marked
    "pasta": Entry(
        Pasta(heads=(0, 1)), same=(Pasta(), Softmax()), wraps="softmax"
    ),
    # all of a sink's share stays: which tokens are sinks depends on how a text comes
    "act": Entry(
        ACT(beta=1.0, factor=1.0), (ACT(beta=1.0), Softmax()), wraps="softmax"
    ),
    # a call is not compressed
    "snapkv": Entry(
        SnapKV(capacity=2 * T, window=4), same=(SnapKV(), Softmax()), decode=0,
        ends=True, wraps="softmax",
    ),
    "pyramidkv": Entry(
        PyramidKV(capacity=2 * T, window=4, layers=3, layer=2),
        same=(PyramidKV(), Softmax()), decode=0, ends=True, wraps="softmax",
    ),
    "adakv": Entry(
        AdaKV(capacity=2 * T, window=4), same=(AdaKV(), Softmax()), decode=0,
        ends=True, wraps="softmax",
    ),
    "streaming": Entry(
        Streaming(sinks=2, window=2 * T), same=(Streaming(), Softmax()), decode=0,
        ends=True, wraps="softmax",
    ),
    "h2o": Entry(
        H2O(heavy=T, recent=T), same=(H2O(), Softmax()), decode=0, ends=True,
        wraps="softmax",
    ),
    "tova": Entry(
        TOVA(capacity=2 * T), same=(TOVA(), Softmax()), decode=0, ends=True,
        wraps="softmax",
    ),
    # as many pages as there are
    "quest": Entry(
        Quest(page=4, budget=2 * T), same=(Quest(), Softmax()), wraps="softmax",
    ),
    # what has not filled a block stays as it is
    "kivi": Entry(
        KIVI(bits=8, group=4, residual=64), same=(KIVI(), Softmax()),
        wraps="softmax",
    ),
    "recycled": Entry(
        Recycled(capacity=2 * T, stride=3), same=(Recycled(), Softmax()),
        wraps="softmax",
    ),
    # what has not filled a segment stays as it is
    "saq": Entry(
        SAQ(bits=(8, 4), group=4, tokens=64), same=(SAQ(), Softmax()),
        wraps="softmax",
    ),
    # as many keys are looked up as there are
    "retrieval": Entry(
        Retrieval(sinks=2, recent=3, top_k=T, index="flat"),
        same=(Retrieval(), Softmax()), wraps="softmax", decode=0, held=1, ends=True,
    ),
    # all is near
    "actqkv": Entry(
        ActQKV(sinks=2, local=2 * T, block=4, top_k=2),
        same=(ActQKV(), Softmax()), wraps="softmax",
    ),
    # buffers that hold all
    "razor": Entry(
        Razor(sinks=2, buffer=2 * T, share=0.0), same=(Razor(), Softmax()),
        wraps="softmax",
    ),
    "duo": Entry(
        Duo(sinks=2, recent=2 * T), same=(Duo(), Softmax()),
        wraps="softmax",
    ),
    # a window that reaches the first token
    "s2": Entry(
        S2(block=2, local=2, stride=2, offset=1, dense=1),
        (S2(block=2, local=8), Softmax()),
    ),
    # a member is chosen among earlier tokens; k is read
    "routing": Entry(
        Routing(clusters=3, window=6, members="prefix", share_qk=False), (
            Routing(clusters=1, window=T, norm="unit", share_qk=False, eps=0.0),
            Softmax()), flops=1, decode=0, kernel=False, default=2,
    ),
    # windows that hold all tokens: no later one takes the place of an earlier one
    "routing_whole": Entry(
        Routing(clusters=2, window=512, share_qk=False, local=2, local_block=3), (
            Routing(clusters=2, window=T, norm="unit", share_qk=False, eps=0.0,
                    local=1, local_block=T), Softmax()),
        flops=1, decode=0, kernel=False, wraps="routing", default=2, split=2,
    ),
    # one block is exact attention, and so are blocks of one token; spans never are
    "combiner": Entry(
        Combiner(block=4), (Combiner(block=T), Softmax()),
        same=(Combiner(block=1), Softmax()), slot=4,
    ),
    "combiner_spans": Entry(Combiner("logsparse"), flops=1, kernel=False, default=2),
    # shifted groups of twice the text: its first half is all of it
    "sinklora": Entry(
        SinkLoRA(group=4, sinks=2), (SinkLoRA(group=2 * T), Softmax()), flops=1,
        decode=0, wraps="softmax",
    ),
    # few keys in the middle of a sequence, and of a call too
    "topk": Entry(
        TopK(top_k=2, block=2, sink=1, local=3, prefill="sparse"),
        (TopK(prefill="sparse"), Softmax()), kernel=False,
    ),
    # as many blocks as there are
    "moba": Entry(
        MoBA(block=4, top_k=2), (MoBA(block=4, top_k=4), Softmax()), flops=1,
        decode=1, long=MoBA(),
    ),
    # all blocks are read, and nothing else
    "nsa": Entry(
        NSA(compress=4, stride=2, block=4, top_k=2, local=1, window=3), (
            NSA(compress=4, stride=2, block=4, top_k=4, gated=False,
                branches=("selected",)), Softmax()),
        spread=False, in_v=False, wraps="moba", split=2,
        long=NSA(compress=4, stride=2, block=32, top_k=3, window=32),
    ),
    # a search that finds all: its stream has other blocks of queries than its call
    "hip": Entry(
        HiP(keys=64, block_q=4, window=3, sink=1, refresh=3),
        (HiP(keys=6, block_q=4, window=T), Softmax()), flops=1, decode=0, held=1,
        ends=True, long=HiP(keys=64, block_q=64, block_k=8, window=64),
    ),
    # all weights are asked for, and there is room for all blocks
    "flexprefill": Entry(
        FlexPrefill(block=2, gamma=1.5, min_budget=2, vs_divisor=2, capacity=8),
        (FlexPrefill(), Softmax()), flops=1, segmented=False,
        long=FlexPrefill(block=128, min_budget=128, capacity=8),
    ),
    # without a draw, the nearest blocks
    "prflash": Entry(
        PrFlash(block=2, blocks=3), (PrFlash(block=2, blocks=8), Softmax()), flops=1,
        decode=0, wraps="softmax", long=PrFlash(),
    ),
    # as many keys as there are, and no gates; else few, for both of its ways
    "sea": Entry(
        SEA(columns=16, keep=2, length=2**11),
        (SEA(columns=8, keep=T, length=T, gated=False), Softmax()), flops=1,
        kernel=False, segmented=False, long=SEA(columns=512, keep=16, length=2**17),
        in_v=False,
    ),
    "sea_normal": Entry(
        SEA(columns=16, keep=2, causal=False),
        (SEA(columns=8, keep=T, causal=False, gated=False), Softmax(mask=Full())),
        flops=1, kernel=False, segmented=False, wraps="sea",
        long=SEA(columns=512, keep=16, causal=False),
        in_v=False,
    ),
    "relative": Entry(
        Relative(32), kernel=False, long=Relative(2048),
    ),
    "relative_local": Entry(
        Relative(8, block=3, by_value=True, shared=True), flops=1, decode=0,
        kernel=False, wraps="relative", long=Relative(512, block=256), in_v=False,
    ),
    "relative_normal": Entry(
        Relative(12, causal=False), kernel=False, wraps="relative",
        long=Relative(2048, causal=False),
    ),
    # of P alone: neither q nor k is read
    "positional": Entry(
        Positional(encoding="sinusoid", width=8, length=2**12), wraps="softmax",
        long=Positional(encoding="sinusoid", width=8, length=2**17),
    ),
    "positional_causal": Entry(
        Positional(encoding="sinusoid", width=8, length=2**12, causal=True),
        wraps="softmax",
        long=Positional(encoding="sinusoid", width=8, length=2**17, causal=True),
    ),
    # a budget of all tokens, for which the gate has no say
    "seerr": Entry(
        SeerR(block=4, gate_dim=6, budget=4 * T, rope=None), (
            SeerR(block=4, gate_dim=6, rope=None), Softmax()), spread=False,
        wraps="softmax", split=2,
    ),
    # all pairs of blocks are read
    "seer": Entry(
        Seer(block=2, gate_dim=D, ratio=1.0, last_dense=False, diagonal=True),
        (Seer(block=4, gate_dim=6, threshold=-1.0, rope=None), Softmax()), flops=1,
        long=Seer(gate_dim=D, threshold=0.1, capacity=4, last_dense=False),
    ),
}
LAW = pytest.mark.parametrize("name", ENTRIES)


def on_meshes():
    """(mesh, row): all meshes for a mechanism, one in turn for what wraps it."""
    turn = {}
    for name, entry in ENTRIES.items():
        if entry.wraps:
            fits = [sizes for sizes in MESHES if sizes[2] <= entry.split]
            turn[name] = fits[len(turn) % len(fits)]
    return [(sizes, name) for name in ENTRIES for sizes in MESHES
            if turn.get(name, sizes) == sizes]


def inputs(seed=0, t=T, b=B, dtype=jnp.float32, d=D, v=V):
    """q [B,T,H,D], k [B,T,K,D], v [B,T,K,V]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (b, t, H, d), (b, t, K, d), (b, t, K, v)
    return tuple(
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes)
    )


def close(a, b, kind="float32"):
    """Relative error in the norm within the kind's bound."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert a.shape == b.shape, (a.shape, b.shape)
    assert np.isfinite(a).all()
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6)
    assert error <= TOLERANCE[kind], f"{error:.2e}"


def plain(q, k, v):
    """Causal softmax attention in plain jnp, every step in the dtype of q."""
    k, v = (jnp.repeat(a, H // K, 2) for a in (k, v))
    s = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(s.shape[-2:], bool))[None, None]
    p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf))
    return jnp.einsum("bhts,bshv->bthv", p, v)


def compiled(attention):
    """One program: (q, k, v, segments, do) -> o [B,T,H,V] and the gradients of
    sum(o * do) with respect to q, k and v."""
    @jax.jit
    def run(q, k, v, segments, do):
        def product(q, k, v):
            o = attention(q, k, v, segments=segments)
            return (do * o.astype(jnp.float32)).sum(), o

        (_, o), grads = jax.value_and_grad(product, (0, 1, 2), has_aux=True)(q, k, v)
        return o, grads

    return run


program = functools.cache(compiled)


def run(attention, q, k, v, segments=None, do=None, program=program):
    """(o, gradients) of an attention; do [B,T,H,V], by default a fixed random one."""
    if do is None:
        shape = (*q.shape[:3], v.shape[-1])
        do = jax.random.normal(jax.random.key(9), shape)
    return program(attention)(q, k, v, segments, do)


@functools.cache
def whole(name, packed=False, repeated=False):
    """(o, gradients) of a row on one device, all as numpy: of plain or packed tokens,
    with K or, `repeated`, H key heads."""
    q, k, v = repeat(*inputs()) if repeated else inputs()
    segments = jnp.asarray(SEGMENTS) if packed else None
    return jax.device_get(run(ENTRIES[name].attention, q, k, v, segments))


def repeat(q, k, v):
    """q [B,T,H,D], and k and v with a head for each of q's."""
    return q, *(jnp.repeat(a, H // a.shape[2], 2) for a in (k, v))


@functools.cache
def _compilations():
    count = [0]

    def heard(event, seconds, **named):
        count[0] += event.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(heard)
    return count


def compilations():
    """How many programs this process has compiled since it was first asked."""
    return _compilations()[0]


def gradients(f, *args):
    """Gradients of a fixed random projection of f(*args)."""
    def scalar(*args):
        o = f(*args)
        w = jax.random.normal(jax.random.key(9), o.shape)
        return (w * o.astype(jnp.float32)).sum()

    return jax.jit(jax.grad(scalar, tuple(range(len(args)))))(*args)


@functools.cache
def stepper(attention):
    """The compiled `step`, (state, q, k, v, segments) -> state, o."""
    return jax.jit(lambda s, q, k, v, seg: attention.step(s, q, k, v, segments=seg))


def stream(attention, q, k, v, size, piece, segments=None):
    """o [B,T,H,V] by steps of `piece` tokens, and the last state."""
    step = stepper(attention)
    state, outs = attention.init_state(size, q[:, :piece], k, v), []
    for at in range(0, q.shape[1], piece):
        part = slice(at, at + piece)
        seg = None if segments is None else segments[:, part]
        state, o = step(state, q[:, part], k[:, part], v[:, part], seg)
        outs.append(o)
    return jnp.concatenate(outs, 1), state


@LAW
@pytest.mark.parametrize("t", [1, 7])
def test_shape_dtype_and_finite(name, t):
    q, k, v = inputs(t=t)
    for scale in (1.0, 100.0):
        o, grads = run(ENTRIES[name].attention, q * scale, k, v)
        chex.assert_shape(o, (B, t, H, V))
        chex.assert_type(o, jnp.float32)
        chex.assert_tree_all_finite((o, grads))


@LAW
def test_padding_gives_nothing_and_takes_nothing(name):
    if refuses_segments(name):
        return
    for segments in (np.zeros_like(SEGMENTS), SEGMENTS):
        o, grads = run(ENTRIES[name].attention, *inputs(), jnp.asarray(segments))
        chex.assert_tree_all_finite((o, grads))
        for a in (o, *grads):
            assert (np.asarray(a)[segments == 0] == 0).all()


@LAW
def test_padding_may_hold_anything(name):
    """What stands at padding changes no bit; what is no number at a token is seen."""
    attention, segments = ENTRIES[name].attention, jnp.asarray(SEGMENTS)
    ordered = ENTRIES[name].ordered
    if refuses_segments(name):
        return
    want, pad = whole(name, packed=True), SEGMENTS == 0

    def spoilt(value, where=pad, which=(0, 1, 2)):
        return tuple(
            jnp.where(where[..., None, None], value, a) if n in which else a
            for n, a in enumerate(inputs()))

    for value in (np.nan, -np.inf, 1e30):
        have = run(attention, *spoilt(value), segments)
        chex.assert_trees_all_equal(jax.device_get(have), want)
    if ordered:
        have, want = (stream(attention, *args, 2 * T, 4, segments)
                      for args in (spoilt(np.nan), inputs()))
        chex.assert_trees_all_equal(have, want)
    own = getattr(attention, "module", attention)
    reads = [n for n, name in enumerate(("needs_query", "needs_key"))
             if said(own, name)]
    token = np.arange(T)[None] == np.array([[5], [5]])
    for which in (*reads, 2):
        o, _ = run(attention, *spoilt(np.nan, token, (which,)), segments)
        assert np.isnan(o[:, 5]).any((1, 2)).all(), which


@LAW
def test_transforms_commute(name):
    """vmap of a gradient, of what is computed again, inside a scan, in one program and
    over more than one tile, under jax_debug_nans: the gradients of a plain call."""
    attention, args = ENTRIES[name].attention, inputs(t=LONG)
    do = jax.random.normal(jax.random.key(9), (B, LONG, H, V))

    @jax.checkpoint
    def product(q, k, v, do):  # of one row
        o = attention(*(a[None] for a in (q, k, v)))
        return (do * o[0]).sum()

    def step(turn, args):
        return turn + 1, jax.vmap(jax.grad(product, (0, 1, 2)))(*args)

    rows = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), (*args, do))
    with jax.debug_nans(True):
        have = jax.jit(lambda rows: jax.lax.scan(step, 0, rows)[1])(rows)
    want = jax.jit(jax.grad(
        lambda *args: (do * attention(*args)).sum(), (0, 1, 2)))(*args)
    for a, b in zip(have, want, strict=True):
        close(a[0], b, "gradient")
        close(a[1], b[::-1], "gradient")


def traced(attention, ordered, args, segments=None):
    """(o, gradients) and, if it is `ordered`, (state, o) of a step, as shapes."""
    def product(q, k, v, segments):
        o = attention(q, k, v, segments=segments)
        return o.astype(jnp.float32).sum(), o

    def both(q, k, v, segments):
        (_, o), grads = jax.value_and_grad(product, (0, 1, 2), has_aux=True)(
            q, k, v, segments)
        return o, grads

    def step(state, q, k, v, segments):
        return attention.step(state, q, k, v, segments=segments)

    found = both(*args, segments)
    if not ordered:
        return found, None
    state = attention.init_state(2 * LONG, *args)
    return found, (state, step(state, *args, segments))


@LAW
@pytest.mark.parametrize("settings", ["x64 explicit", "strict check_vma"])
def test_any_setting_of_jax_will_do(name, settings):
    """Traced, not run, over more than one tile, plain and packed, with gradients and a
    step: under jax_enable_x64 on a mesh with explicit axes, and under strict promotion
    of types inside a user's own shard_map that checks what varies. What types are
    promoted to and what a mesh asks for do not meet, so two are asked at once."""
    attention, ordered = ENTRIES[name].attention, ENTRIES[name].ordered
    if isinstance(attention, Learned):
        drawn(attention.module.clone(parent=None))  # as no setting wants them
    f = functools.partial(traced, attention, ordered)
    plain, packed = inputs(t=LONG), (inputs(t=LONG), jnp.ones((B, LONG), jnp.int32))
    rows = jax.sharding.PartitionSpec("data")
    with contextlib.ExitStack() as stack:
        strict = settings == "strict check_vma"
        stack.enter_context(
            jax.numpy_dtype_promotion("strict") if strict else jax.enable_x64(True))
        plain = tuple(a.astype(jnp.bfloat16) for a in plain)
        wide = jnp.bfloat16 if strict else jnp.float64
        packed = tuple(a.astype(wide) for a in packed[0]), packed[1]
        kind = getattr(jax.sharding.AxisType, "Auto" if strict else "Explicit")
        mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
        stack.enter_context(jax.set_mesh(mesh))
        if strict:
            f = jax.shard_map(f, in_specs=rows, out_specs=rows)
        else:
            plain, packed = jax.device_put((plain, packed), rows)
        both = ((plain, None), packed)
        for args, segments in both[:1] if refuses_segments(name) else both:
            (o, grads), stepped = jax.eval_shape(f, args, segments)
            chex.assert_trees_all_equal_shapes_and_dtypes(grads, like(args))
            assert o.dtype == args[0].dtype and o.shape == (B, LONG, H, V)
            if stepped is not None:
                state, (after, last) = stepped
                chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
                chex.assert_trees_all_equal_shapes_and_dtypes(o, last)


def like(tree):
    """The shapes and types of a tree."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


@LAW
def test_it_is_exported(name):
    attention = ENTRIES[name].attention
    b, = jax.export.symbolic_shape("b")
    args = tuple(
        jax.ShapeDtypeStruct((b, *a.shape[1:]), a.dtype) for a in inputs(t=LONG))
    exported = jax.export.export(jax.jit(lambda *args: attention(*args)))(*args)
    assert str(exported.out_avals[0].shape) == f"(b, {LONG}, {H}, {V})"


@LAW
def test_every_large_parameter_is_split(name):
    attention = ENTRIES[name].attention
    if not isinstance(attention, Learned):
        pytest.skip("it learns nothing")
    layer = MultiHead(attention.module, heads=8)
    x = jax.ShapeDtypeStruct((1, T, 256), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "seq", "model"))
    for path, a in jax.tree_util.tree_leaves_with_path(params):
        path = "/".join(key.key for key in path)
        assert placement.letters_of(path, a.shape) or "/out_norm" in path, path
        if a.size >= placement.SMALL:
            assert any(placement.spec(path, a.shape, mesh)), f"{path} {a.shape}"


@LAW
def test_low_precision_is_as_good_as_plain_jnp(name):
    """No worse than twice plain jnp, nor than 2.5 times what the rounding of the result
    alone would be; packed rows, too."""
    low = inputs(dtype=jnp.bfloat16)
    exact = tuple(a.astype(jnp.float32) for a in low)
    attention = ENTRIES[name].attention
    both = (None, jnp.asarray(SEGMENTS))
    for segments in both[:1] if refuses_segments(name) else both:
        with jax.numpy_dtype_promotion("strict"):
            o = jax.jit(attention)(*low, segments=segments)
        assert o.dtype == jnp.bfloat16
        want = run(attention, *exact, segments)[0]
        have = relative(o, want)
        assert have <= TOLERANCE["low"] * plain_error(), f"{have:.2e}"
        rounded = relative(want.astype(jnp.bfloat16), want)
        assert have <= TOLERANCE["rounding"] * rounded, f"{have:.2e} of {rounded:.2e}"


@LAW
def test_no_token_sees_the_future(name):
    stateless(name)
    for i in (0, 6, 11):
        seen = jnp.arange(T)[None, :, None, None] <= i
        do = jnp.broadcast_to(seen, (B, T, H, V)).astype(jnp.float32)
        _, grads = run(ENTRIES[name].attention, *inputs(), do=do)
        for grad in grads:  # of q too, which gates are made from, as of k and v
            assert (np.asarray(grad)[:, i + 1:] == 0).all()
        assert np.abs(grads[2]).max() > 0


@LAW
def test_what_is_read_is_not_chosen_by_the_future(name):
    """A choice has no gradient: tokens behind a cut are others, and what stands before
    it is the same, but for those whose block the attention says is led as a whole."""
    stateless(name)
    attention = ENTRIES[name].attention
    ahead = said(getattr(attention, "module", attention), "ahead")
    if ahead is None:
        pytest.skip("it says that all tokens of a row lead its choice")
    others = tuple(3 * a for a in inputs(seed=5))
    for cut in (4, 12):
        cut -= cut % max(ahead, 1)
        behind = (jnp.arange(T) >= cut)[None, :, None, None]
        mixed = (jnp.where(behind, b, a) for a, b in zip(inputs(), others))
        o, _ = run(attention, *mixed)
        close(o[:, :cut], whole(name)[0][:, :cut])
        assert relative(o[:, cut:], whole(name)[0][:, cut:]) > 0.1


@LAW
@pytest.mark.parametrize("piece", [1, 4, T])
def test_stepping_is_attending(name, piece):
    stateless(name)
    q, k, v = inputs()
    o, state = stream(ENTRIES[name].attention, q, k, v, 2 * T, piece)
    close(o, whole(name)[0])
    assert state.end.shape == (B,)


@LAW
@pytest.mark.parametrize("piece", [1, 4])
def test_stepping_through_packed_segments(name, piece):
    stateless(name)
    if refuses_segments(name):
        return
    q, k, v = inputs()
    segments = jnp.asarray(SEGMENTS)
    o, state = stream(ENTRIES[name].attention, q, k, v, 2 * T, piece, segments)
    close(o, whole(name, packed=True)[0])
    assert state.end.tolist() == [8, 8]


@LAW
def test_without_a_matrix_of_weights_it_says_so(name):
    """What is not linear in v has no A with o = A v, and a look inside says why."""
    entry = ENTRIES[name]
    attention = getattr(entry.attention, "module", entry.attention)
    assert entry.in_v or said(attention, "weightless")


@LAW
def test_the_patterns_are_those_it_says(name):
    """Of the four of `attn/contract/patterns.py` it has those and no other: prefixes
    end as the whole does, a context is seen whole, its queries are read one by one."""
    attention = ENTRIES[name].attention
    module = getattr(attention, "module", attention)
    found, (q, k, v) = patterns(module), inputs()
    assert ("CS" in found) != ("NS" in found)
    o, whole_grads = whole(name)
    if "CS" in found and said(module, "ahead") is not None:
        for n in (1, 7):  # of lengths that are no multiple of a chunk
            prefix, _ = run(attention, *(a[:, :n] for a in (q, k, v)))
            close(prefix[:, -1], o[:, n - 1])
        if ENTRIES[name].segmented:  # and longer ones, with padding behind
            ends = np.array([9, 15])
            only = jnp.asarray(np.arange(T) < ends[:, None], jnp.int32)
            prefix, _ = run(attention, q, k, v, only)
            rows = np.arange(B)
            close(prefix[rows, ends - 1], o[rows, ends - 1])
    elif "NS" in found:
        first = (jnp.arange(T) == 0)[None, :, None, None]
        do = jnp.broadcast_to(first, o.shape).astype(jnp.float32)
        _, grads = run(attention, q, k, v, do=do)
        assert np.abs(grads[2][:, 1:]).max() > 0  # a later one is seen by the first
    reads = of_context(module)
    if reads is None or ENTRIES[name].ordered and not hasattr(module, "of_context"):
        assert not {"NC", "CC"} & set(found)
        x, context = jnp.zeros((1, T, 16)), jnp.zeros((1, 5, 16))
        if getattr(module, "mask", None) is None:  # a mask of its own reads a part
            with pytest.raises(ValueError, match="context: |expected|mask="):
                jax.eval_shape(
                    functools.partial(MultiHead(module, heads=H).init, context=context),
                    jax.random.key(0), x)
        return
    crossing = Learned(reads) if isinstance(attention, Learned) else reads
    # a few queries of another sequence, of which the last is then another one
    few, other = inputs(seed=3, t=5)[0], inputs(seed=4, t=5)[0]
    last = (jnp.arange(5) == 4)[None, :, None, None]
    do = jnp.ones((B, 5, H, V))
    o, grads = run(crossing, few, k, v, do=do)
    assert (np.abs(grads[2]).max((2, 3)) > 0).all()  # every key is seen
    moved, _ = run(crossing, jnp.where(last, other, few), k, v, do=do)
    assert ("CC" in found) == bool((moved[:, :-1] == o[:, :-1]).all())


@LAW
def test_packing_changes_nothing(name):
    if refuses_segments(name):
        return
    packed, alone = whole(name, packed=True)[0], jax.jit(ENTRIES[name].attention)
    for row in range(B):
        for segment in set(SEGMENTS[row].tolist()) - {0}:
            at = np.nonzero(SEGMENTS[row] == segment)[0]
            own = alone(*(a[row:row + 1, at] for a in inputs()))
            close(packed[row:row + 1, at], own)


@LAW
def test_a_second_call_outside_of_jit_compiles_nothing(name):
    q, k, v = inputs(t=7)

    def calls():
        # made anew each time, as a user does who writes Softmax()(q, k, v)
        attention = given(ENTRIES[name].attention)
        f = lambda q, k, v: attention(q, k, v).sum()
        found = [attention(q, k, v), jax.grad(f, (0, 1, 2))(q, k, v)]
        if ENTRIES[name].ordered:
            state = attention.init_state(T, q, k, v)
            found += [attention.step(state, *(a[:, :1] for a in (q, k, v)))]
        return found

    want, before = calls(), compilations()
    chex.assert_trees_all_equal(calls(), want)
    assert compilations() == before


@LAW
def test_one_trace(name):
    stateless(name)
    q, k, v = inputs()
    attention = ENTRIES[name].attention
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(attention.step, n=1))
    state = attention.init_state(T, q[:, :1], k, v)
    for t in range(3):
        state, _ = step(state, *(a[:, t:t + 1] for a in (q, k, v)))


@LAW
@pytest.mark.parametrize("claim", ["limit", "same"])
def test_the_limit(name, claim):
    pair = getattr(ENTRIES[name], claim)
    if pair is None:
        pytest.skip("it claims none")
    q, k, v = inputs()
    close(*(jax.jit(a)(q, k, v) for a in pair))


@pytest.mark.parametrize("sizes, name", on_meshes())
def test_sharding_changes_nothing(name, sizes):
    # grouped heads and packed segments take turns on the meshes
    packed = sizes == MESHES[0] and ENTRIES[name].segmented
    repeated = sizes != MESHES[1] and ENTRIES[name].spread
    segments = jnp.asarray(SEGMENTS) if packed else None
    args = repeat(*inputs()) if repeated else inputs()
    # the last one as jax makes it, with types that say where arrays lie
    types = None if sizes == MESHES[3] else (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(sizes, ("data", "seq", "model"), axis_types=types)
    split = given(ENTRIES[name].attention, axis="seq")
    with jax.set_mesh(mesh):
        o, grads = run(split, *args, segments, program=compiled)
    want = whole(name, packed, repeated)
    close(o, want[0])
    for a, b in zip(grads, want[1], strict=True):
        close(a, b, "gradient")


@LAW
def test_stepping_over_a_mesh_is_stepping(name):
    """A prompt is split over eight devices, and single tokens follow it."""
    stateless(name)
    q, k, v = inputs(t=T + 3)
    segments = jnp.concatenate(
        [jnp.asarray(SEGMENTS), jnp.asarray([[4] * 3, [3] * 3])], 1)
    attention = ENTRIES[name].attention

    def streamed(attention, segments):
        f = stepper(attention)
        state, outs = attention.init_state(2 * T, q[:, :1], k, v), []
        for part in (slice(0, T), *(slice(T + i, T + i + 1) for i in range(3))):
            seg = None if segments is None else segments[:, part]
            state, o = f(state, *(a[:, part] for a in (q, k, v)), seg)
            outs.append(o)
        return jnp.concatenate(outs, 1), state

    seg = segments if ENTRIES[name].packed else None
    want, held = streamed(attention, seg)
    mesh = jax.make_mesh(
        (1, 8, 1), ("data", "seq", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
    with jax.set_mesh(mesh):
        have, state = streamed(given(attention, axis="seq"), seg)
    close(have, want)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(held), strict=True):
        close(np.nan_to_num(a, neginf=-1e9), np.nan_to_num(b, neginf=-1e9))


@LAW
def test_an_axis_without_a_mesh_is_refused(name):
    with pytest.raises(ValueError, match="axis='seq'"):
        given(ENTRIES[name].attention, axis="seq")(*inputs())


@LAW
@pytest.mark.parametrize("platform", ("tpu", "gpu"))
def test_the_kernel_is_the_function(name, platform, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", platform)
    kernel = given(ENTRIES[name].attention, implementation="pallas")
    if not ENTRIES[name].kernel:
        with pytest.raises(NotImplementedError, match="no kernel"):
            kernel(*inputs())
        return
    of_this_platform = functools.cache(compiled)
    have, again = (run(kernel, *inputs(), program=of_this_platform) for _ in range(2))
    want = whole(name)
    close(have[0], want[0])
    for a, b in zip(have[1], want[1], strict=True):
        close(a, b, "gradient")
    chex.assert_trees_all_equal(have, again)


@LAW
def test_the_cost_is_the_claim(name):
    # at shorter ones XLA schedules one length in another way than the next
    entry, lengths = ENTRIES[name], (32768, 65536, 131072)
    shapes = [jax.eval_shape(lambda t=t: inputs(t=t, b=1)) for t in lengths]
    f = lambda q, k, v: (entry.long(q, k, v) ** 2).sum()
    both = jax.jit(jax.grad(f, (0, 1, 2)))
    work = cost.slope([cost.flops(both, *s) for s in shapes])
    assert abs(work - entry.flops) < 0.15, work
    space = cost.slope([cost.memory(both, *s) for s in shapes])
    assert space < 1.1, space


@LAW
def test_the_cost_of_one_more_token(name):
    stateless(name)
    attention = ENTRIES[name].attention
    one = jax.eval_shape(lambda: inputs(t=1, b=1))
    work, space = [], []
    for size in (1024, 2048, 4096):
        prompt = jax.eval_shape(lambda size=size: inputs(t=size, b=1))
        state = jax.eval_shape(lambda p=prompt: attention.init_state(p[0].shape[1], *p))
        work.append(cost.flops(attention.step, state, *one))
        space.append(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state)))
    claim, held = ENTRIES[name].decode, ENTRIES[name].held
    held = claim if held is None else held
    for found, claim in ((cost.slope(work), claim), (cost.slope(space), held)):
        assert abs(found - claim) < 0.15, (work, space)


@LAW
def test_training_free_adds_no_parameters(name):
    if isinstance(ENTRIES[name].attention, Learned):
        pytest.skip("it learns")
    x = jnp.zeros((1, T, 16))
    tree = lambda a: jax.eval_shape(
        MultiHead(a, heads=H).init, jax.random.key(0), x
    )
    chex.assert_trees_all_equal_shapes(tree(ENTRIES[name].attention), tree(Softmax()))


@LAW
def test_wrong_calls_say_what_was_expected(name):
    attention = ENTRIES[name].attention
    q, k, v = inputs()
    wrong = {
        "H=4": (q, *(jnp.concatenate([a, a[:, :, :1]], 2) for a in (k, v))),
        "D=": (q, k[..., :4], v),
        "batch": (q, k[:1], v[:1]),
        "k .* v ": (q, k, v[:, :5]),
        "float16": (q, k.astype(jnp.float16), v),
        "empty": (q[:, :0], k[:, :0], v[:, :0]),
        r"\[B,T,H,D\]": (q[0], k, v),
    }
    for message, args in wrong.items():
        with pytest.raises(ValueError, match=message):
            attention(*args)
    with pytest.raises(ValueError, match="segments.*expected"):
        attention(q, k, v, segments=jnp.ones((B, T + 1), jnp.int32))
    with pytest.raises(ValueError, match="implementation='cuda'"):
        given(attention, implementation="cuda")(q, k, v)
    if ENTRIES[name].ordered:
        with pytest.raises(ValueError, match="size|memory"):
            attention.init_state(0, q, k, v)


@LAW
def test_a_state_of_other_tokens_is_refused(name):
    stateless(name)
    attention = ENTRIES[name].attention
    module, (q, k, v) = getattr(attention, "module", attention), inputs()
    for state in (None, (1, 2), {}):
        with pytest.raises(ValueError, match=f"state is a {type(state).__name__}: exp"):
            attention.step(state, q, k, v)
    for others in ((q[:1], k[:1], v[:1]), (q, k, v[..., :5]),
                   (q[:, :, :2], k[:, :, :1], v[:, :, :1])):
        state = attention.init_state(T, *others)
        with pytest.raises(ValueError, match="state holds .*: expected"):
            attention.step(state, q, k, v)
    for args, message in (((q, k, v, T), "size is an array"), ((T, q, k, 7), "v is 7"),
                          ((2.5, q, k, v), "size is 2.5")):
        with pytest.raises(ValueError, match=message):
            module.init_state(*args)


@LAW
def test_a_stream_keeps_its_types(name):
    """Told tokens of another type than it began with, a state stays what it is, and
    the output has the type of v; under strict promotion, traced and not run."""
    stateless(name)
    attention, low = ENTRIES[name].attention, inputs(dtype=jnp.bfloat16)
    for held, told in ((low, inputs()), (inputs(), low)):
        with jax.numpy_dtype_promotion("strict"):
            state = jax.eval_shape(lambda *a: attention.init_state(T, *a), *held)
            after, o = jax.eval_shape(attention.step, state, *told)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
        assert o.dtype == told[2].dtype


@LAW
def test_a_step_past_the_memory_is_never_silent(name):
    stateless(name)
    q, k, v = inputs()
    attention = ENTRIES[name].attention
    if not ENTRIES[name].ends:
        pytest.skip("its memory has no end")
    state = attention.init_state(4, q[:, :1], k, v)
    room = state.k.shape[1] * ENTRIES[name].slot  # 4, or as many as make whole blocks
    o, _ = stream(attention, q[:, :room + 2], k, v, 4, 1)
    _, state = stream(attention, q[:, :room - 1], k, v, 4, 1)
    # not compiled, the last that fits is taken and the next one refused
    last, past = ([a[:, t:t + 1] for a in (q, k, v)] for t in (room - 1, room))
    state, _ = attention.step(state, *last)
    with pytest.raises(ValueError, match=f"memory of {room}"):
        attention.step(state, *past)
    assert np.isfinite(o[:, :room]).all() and np.isnan(o[:, room:]).all()


# of an attention's own fields, in one shared way
WRONG_FIELDS = {
    "scale": (0.0, float("nan"), "1", True), "chunk": (0, 2.0, True),
    "implementation": ("cuda",), "axis": (), "causal": (1, None), "eps": (-1.0, "0"),
    "dropout": (1.0, -0.1), "mask": (5, np.ones((T, T), bool), Causal),
    "softcap": (0.0,), "top_k": (0, 1.5), "block": (0,), "capacity": (2.5,),
    "feature_dim": (0,), "rank": (0,), "length": (0,), "exchange": ("tree", None),
    "conv": (-1, 1.0), "temperature": (0.0,), "kernel": (4,), "pool": ("sum",),
}


@LAW
def test_wrong_fields_are_refused_where_it_is_made(name):
    attention = ENTRIES[name].attention
    fields = getattr(attention, "module", attention).__dataclass_fields__
    for field in WRONG_FIELDS.keys() & fields.keys():
        for value in WRONG_FIELDS[field]:
            with pytest.raises(ValueError, match=f"{field}.*expected"):
                given(attention, **{field: value})
    with pytest.raises(ValueError, match=r"array of shape .*\(q, k, v"):
        type(getattr(attention, "module", attention))(*inputs())


@LAW
def test_malformed_tokens_and_segments_are_refused(name):
    attention, (q, k, v) = ENTRIES[name].attention, inputs()
    for args, message in (
        ((q.tolist(), k, v), r"q is a list: expected an array \[B,T,H,D\]"),
        ((q.astype(jnp.int32), k, v), "q is int32: expected a floating"),
    ):
        if not isinstance(attention, Learned):  # it makes x of q, k and v
            with pytest.raises(ValueError, match=message):
                attention(*args)
    ids = jnp.ones((B, T), jnp.int32)
    for segments, message in (
        ([ids, ids], "segments is a list"), ((ids, ids, ids), "a tuple of 3"),
        (ids.astype(jnp.float32), "float32: expected integers"),
        (np.full((B, T), 2**31, np.uint32), "ids that int32 holds"),
        (np.full((B, T), 2**31), "ids that int32 holds"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, segments=segments)


@LAW
def test_heads_in_the_place_of_tokens_are_warned_of(name):
    q, k, v = (jax.ShapeDtypeStruct((B, 3, 8, n), jnp.float32) for n in (D, D, V))
    attention = ENTRIES[name].attention
    if isinstance(attention, Learned):
        pytest.skip("its parameters are for H heads")
    if getattr(attention, "score", None) is not None:
        attention = given(attention, score=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # ends the trace where it is given
        with pytest.raises(UserWarning, match=r"swap axes 1 and 2"):
            jax.eval_shape(attention, q, k, v)
