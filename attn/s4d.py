"""S4D (Gu et al., 2022) arXiv:2206.11893: a diagonal state space model.

Every channel of the values is filtered by a sum of N/2 decaying oscillations, held by
as many complex numbers of state. There is no question and no key: what a token passes
on depends on the distance alone.

    h_t = exp(dt w) h_(t-1) + x_t,    y_t = 2 Re sum_n C~_n h_tn + D x_t,
    C~ = C (exp(dt w) - 1) / w,       o = gelu(y)

C holds C B; a step dt of its own each channel, zero-order hold. All tokens at once are
a convolution with the kernel 2 Re sum_n C~_n exp(dt w_n l), which an FFT makes; or they
are the recurrence, by a scan, as a stream, packed rows and shards are.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from attn.contract.attention import CONV, Attention, TemplateRow
from attn.contract.dispatch import pick
from attn.contract.fields import check_fields
from attn.contract.segments import locate, segment_indices
from attn.contract.shapes import check
from attn.contract.varying import gelu
from attn.parallel.sharding import Axis, over_mesh, splits
from attn.recurrent.scan import prefix_scan


class S4DState(NamedTuple):
    """real, imag [B,H,V,N/2] float32: h of the current sequence; end [B] int32 the next
    token's position; segment [B] int32 the last token's segment, -1 before the first.
    """

    real: jax.Array
    imag: jax.Array
    end: jax.Array
    segment: jax.Array


class Filter(NamedTuple):
    """step: dt w as (real, imag) [V,N/2] or [H,V,N/2]; out: 2 C~ alike, [H,V,N/2]."""

    step: tuple[jax.Array, jax.Array]
    out: tuple[jax.Array, jax.Array]


class S4D(nn.Module, Attention):
    """S4D (Gu et al., 2022) arXiv:2206.11893: long convolutions of few oscillations.

    It reads v alone: q and k give shapes, and `MultiHead` makes no projections for
    them. state: N. dt_min, dt_max: between them steps begin, uniform in their
    logarithms. Of H heads over K < H heads of v each has filters of its own, so that v
    of one head is the layer of the benchmark CAB, with H "heads". w serves all channels
    and begins as S4D-Inv, -1/2 + i N/pi (N/(2n + 1) - 1); C begins as a normal C times
    B = 1 over its norm sqrt(2 sum |B/w|^2); D normal. causal=False adds a second filter
    over the tokens behind, [2H,...] of C. chunk: tokens of a block of the scan. Packed
    segments are proposed here, as states that begin anew. Parameters are named as in
    the authors' code.
    """

    state: int = 16
    causal: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    fft: bool | None = None
    chunk: int = 64
    axis: Axis | None = None
    implementation: str | None = None
    needs_query = False
    needs_key = False
    crosses = False
    row = TemplateRow(CONV, "L D log L", 1)
    weightless = "a gelu and a map of channels follow its convolution"
    parameter_axes = {"C": "HVRR", "D": "HV", "log_dt": "V", "log_w_real": "R",
                      "w_imag": "R"}

    def __post_init__(self):
        check_fields(self, least={"state": 2}, above={"dt_min": 0, "dt_max": 0})
        if self.state % 2 or self.dt_min > self.dt_max:
            raise ValueError(
                f"S4D: state={self.state}, dt_min={self.dt_min}, dt_max={self.dt_max}: "
                "expected an even number, and steps in order"
            )
        super().__post_init__()

    @property
    def by_fft(self) -> bool:
        """`fft`, with its default."""
        return not self.causal if self.fft is None else self.fft

    def __call__(self, q, k, v, *, x=None, segments=None):
        """All tokens at once. q [B,T,H,D], k [B,T,K,D] (shapes), v [B,T,K,V] ->
        [B,T,H,V]."""
        check(q, k, v, segments=segments, aligned=True)
        x, filters, direct = self._made(q, v)
        segment, _ = segment_indices(segments, q)
        if segment is None and self.axis is None and self.by_fft:
            y = pick(
                self.implementation, xla=functools.partial(_convolved, x, filters))
        else:
            y = pick(
                self.implementation, xla=functools.partial(
                    self._scanned, x, filters, segment))
        return gelu(y + direct * x).astype(v.dtype)

    def init_state(self, size, q, k, v, *, x=None) -> S4DState:
        """An empty memory for `size` tokens; q, k, v give shapes."""
        self.check_stream()
        b, _, h, _ = q.shape
        zeros = jnp.zeros((b, h, v.shape[-1], self.state // 2), jnp.float32)
        clock = jnp.zeros((b,), jnp.int32)
        return S4DState(zeros, zeros, clock, clock - 1)

    def step(self, state, q, k, v, *, x=None, segments=None):
        """The next T tokens -> state, [B,T,H,V]; the state does not grow."""
        self.check_stream()
        check(q, k, v, segments=segments, aligned=True)
        b, t = q.shape[:2]
        x, (filt,), direct = self._made(q, v)
        now = locate(segments, b, t, state.end, state.segment)
        segment = None if segments is None else now.segment
        f = functools.partial(
            self._over, x, filt, segment, (state.real, state.imag),
            splits(self.axis, t))
        (real, imag), y = pick(self.implementation, xla=f)
        o = gelu(y + direct * x).astype(v.dtype)
        return S4DState(real, imag, now.next_pos, now.last_segment), o

    @nn.compact
    def _made(self, q, v) -> tuple[jax.Array, list[Filter], jax.Array]:
        """x [B,T,H,V] float32, the filters of one or two directions, D [1,1,H,V]."""
        h, width, n = q.shape[2], v.shape[-1], self.state // 2
        param = functools.partial(self.param)
        log_dt = param("log_dt", self._steps, (width,))
        log_real = param("log_w_real", nn.initializers.constant(math.log(0.5)), (n,))
        imag = param("w_imag", _inverse_frequencies, (n,))
        sides = 1 if self.causal else 2
        c = param("C", _outputs, (sides * h, width, n, 2), log_real, imag)
        direct = param("D", nn.initializers.normal(1.0), (h, width))
        dt = jnp.exp(log_dt)[:, None]  # [V,1]
        real, imag = -jnp.exp(log_real)[None], imag[None]  # w [1,N/2]
        step = dt * real, dt * imag
        # (exp(dt w) - 1) / w
        grown = jnp.exp(step[0])
        top = grown * jnp.cos(step[1]) - 1, grown * jnp.sin(step[1])
        square = real * real + imag * imag
        # 1 / w = conj(w) / |w|^2
        hold = _times(top, (real / square, -imag / square))
        # 2 C~ = 2 C (exp(dt w) - 1) / w: [H,V,N/2] times [1,V,N/2]
        out = _times((2 * c[..., 0], 2 * c[..., 1]), tuple(a[None] for a in hold))
        filters = [Filter(step, (out[0][at:at + h], out[1][at:at + h]))
                   for at in range(0, sides * h, h)]
        x = jnp.repeat(v.astype(jnp.float32), h // v.shape[2], 2)
        return x, filters, direct[None, None]

    def _steps(self, key, shape) -> jax.Array:
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        return jax.random.uniform(key, shape, jnp.float32, low, high)

    def _scanned(self, x, filters, segment) -> jax.Array:
        """y [B,T,H,V] by the recurrence."""
        # h_t = exp(dt w) h_{t-1} + x_t,  y_t = Re(2 C~ h_t)
        y = self._over(x, filters[0], segment, None, self.axis)[1]
        if len(filters) == 1:
            return y
        # the same from the last token to the first; numbers have to rise, too
        flip = functools.partial(jnp.flip, axis=1)
        turned = None if segment is None else flip(
            jnp.where(segment > 0, 2**30 - segment, 0))
        _, back = self._over(flip(x), filters[1], turned, None, self.axis)
        # what is behind token t stands at t + 1, if that is of its segment
        behind = _next(flip(back), "BTHV", self.axis)
        if segment is not None:
            same = segment == _next(segment, "BT", self.axis)
            behind = jnp.where(same[..., None, None], behind, 0)
        return y + behind

    def _over(self, x, filt: Filter, segment, state, axis: Axis | None):
        """The state after all tokens, (real, imag) or None and None for none over an
        axis; and y [B,T,H,V] but for D x."""
        def local(x, step, out, segment, *state):
            # dt w of each token [B,T,1,V,N/2]: what a stretch's state decays by
            form = *x.shape[:2], 1, *step[0].shape[-2:]
            decays = tuple(jnp.broadcast_to(a, form) for a in step)
            some = jnp.broadcast_to(x[..., None], (*x.shape, step[0].shape[-1]))
            if segment is not None:
                some = jnp.where((segment > 0)[..., None, None, None], some, 0)
            leaves = decays, (some, jnp.zeros_like(some))
            first = None
            if state[0] is not None:
                first = tuple(jnp.zeros_like(a[:, 0]) for a in decays), state
            last, (_, h) = prefix_scan(
                _joined, leaves, state=first, segment=segment, chunk=self.chunk,
                axis=axis, ends=first is not None)
            # Re(2 C~ h) [B,T,H,V]
            y = (h[0] * out[0] - h[1] * out[1]).sum(-1)
            return *(last[1] if first is not None else (None, None)), y

        out = tuple(a[None, None] for a in filt.out)  # [1,1,H,V,N/2]
        step = tuple(a[None, None, None] for a in filt.step)  # [1,1,1,V,N/2]
        letters = "BTHV ...V. ..HV. BT BHV. BHV. -> BHV. BHV. BTHV"
        f = over_mesh(local, letters, axis)
        real, imag, y = f(x, step, out, segment, *(state or (None, None)))
        return (real, imag), y


def _joined(a, b):
    """A stretch of tokens and the one behind it, each with the logarithm of its decay
    and its state: those decay by what the second says."""
    (log_a, h_a), (log_b, h_b) = a, b
    decay = jnp.exp(log_b[0])
    # exp(log_b) h_a + h_b
    h = _times(h_a, (decay * jnp.cos(log_b[1]), decay * jnp.sin(log_b[1])))
    return _sum(log_a, log_b), _sum(h, h_b)


def _sum(a, b) -> tuple[jax.Array, jax.Array]:
    return a[0] + b[0], a[1] + b[1]


def _times(a, b) -> tuple[jax.Array, jax.Array]:
    """The product of two complex numbers (real, imag)."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def _next(a: jax.Array, letters: str, axis: Axis | None) -> jax.Array:
    """What stands at t + 1 of a [B,T,...], with axes of these letters; 0 at the end."""
    def local(a):
        first = a[:, :1]
        if axis is None:
            first = jnp.zeros_like(first)
        else:
            # of the shard behind; the last gets 0
            back = [(n, n - 1) for n in range(1, jax.lax.axis_size(axis))]
            first = jax.lax.ppermute(first, axis, back)
        return jnp.concatenate([a[:, 1:], first], 1)

    return over_mesh(local, f"{letters} -> {letters}", axis)(a)


def _kernel(filt: Filter, t: int) -> jax.Array:
    """2 Re sum_n C~_n exp(dt w_n l) [H,V,t] for l < t."""
    at = jnp.arange(t, dtype=jnp.float32)[None, None]  # [1,1,t]
    real, imag = (a[..., None] * at for a in filt.step)  # [V,N/2,t]
    decay = jnp.exp(real)
    kernel = functools.partial(
        jnp.einsum, "hvn,vnl->hvl", precision=jax.lax.Precision.HIGHEST)
    # Re(a b) = Re a Re b - Im a Im b: [H,V,N/2] x [V,N/2,t] -> [H,V,t]
    return kernel(filt.out[0], decay * jnp.cos(imag)) - kernel(
        filt.out[1], decay * jnp.sin(imag))


def _convolved(x: jax.Array, filters: list[Filter]) -> jax.Array:
    """y [B,T,H,V] but for D x, over 2T places, so that nothing wraps around."""
    t = x.shape[1]
    kernel = jnp.pad(_kernel(filters[0], t), ((0, 0), (0, 0), (0, t)))
    if len(filters) > 1:
        # tokens behind: lag -1 is the last place of the circle
        back = jnp.flip(_kernel(filters[1], t), -1)
        kernel = kernel + jnp.pad(back, ((0, 0), (0, 0), (t, 0)))
    spectrum = jnp.moveaxis(jnp.fft.rfft(kernel), -1, 0)[None]  # [1,L,H,V]
    y = jnp.fft.irfft(jnp.fft.rfft(x, 2 * t, axis=1) * spectrum, 2 * t, axis=1)
    return y[:, :t]


def _inverse_frequencies(key, shape) -> jax.Array:
    """S4D-Inv: N/pi (N/(2n + 1) - 1), N = 2 |shape|."""
    n = 2 * shape[0]
    return jnp.asarray(n / np.pi * (n / (2 * np.arange(shape[0]) + 1) - 1), jnp.float32)


def _outputs(key, shape, log_real, imag) -> jax.Array:
    """C B [...,N/2,2]: a normal complex C of variance 1, and B = 1 over its norm."""
    square = jnp.exp(2 * log_real) + imag * imag
    norm = jnp.sqrt(2 * (1 / square).sum())
    return jax.random.normal(key, shape, jnp.float32) * 2**-0.5 / norm
