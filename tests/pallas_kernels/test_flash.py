"""The flash kernel is the function: every feature, every input's gradient, interpreted.

The reference is `attn.exact.chunked.attend`, which test_softmax holds against float64.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Causal, Full, Mask, Sink, Window
from attn.positions import ALiBi
from attn.softmax import Softmax
from experiments.measure import cost
from pallas_kernels import Refused, refusals, schedule, tables, tile_patterns
from pallas_kernels.flash import (
    blackwell as flash_blackwell, mosaic as flash_mosaic, tpu as flash_tpu,
    tpu_portions as portions_tpu, triton as flash_triton
)
from tests.on_device import INTERPRET
from tests.oracles.softmax import chunks as attend, flash

B, T, S, H, K, D, V = 2, 37, 37, 4, 2, 8, 12
TILE = (16, 16)
SEGMENTS = np.array([[1] * 5 + [2] * 20 + [3] * 9 + [0] * 3,
                     [0] * 2 + [1] * 30 + [2] * 5], np.int32)
SINKS = Causal() & (Window(5) | Sink(3))
BACKENDS = ("tpu", "triton")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def held():
    """Positions of slots that differ by head, some of them empty."""
    pos = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    return jnp.asarray(np.stack([pos, np.where(pos % 3 == 0, -1, pos)], -1))


def packed():
    return {"q_segment": jnp.asarray(SEGMENTS), "kv_segment": jnp.asarray(SEGMENTS)}


def kept():
    return jax.random.bernoulli(jax.random.key(2), 0.7, (B, H, T, S))


def counted():
    return jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))


CASES = {
    "causal": lambda: {"mask": Causal()},
    "full": lambda: {"mask": Full(), "sizes": {"t": 21, "s": 40}},
    "aligned": lambda: {"mask": Causal(), "sizes": {"t": 21, "s": 40}},
    "empty_rows": lambda: {"mask": Causal(), "sizes": {"t": 40, "s": 21}},
    "window": lambda: {"mask": Causal() & Window(9), "softcap": 3.0,
                       "score": ALiBi(H)},
    "sink_tokens": lambda: {"mask": SINKS, "sizes": {"k": 1}},
    "sinks": lambda: {"mask": Causal() & Window(9), "sink": normal(3, H)},
    "runs": lambda: {"mask": Causal(), **packed()},
    "positions": lambda: {"mask": Causal() & Window(9), "q_pos": counted(),
                          "kv_pos": held(), **packed()},
    "dropout": lambda: {"mask": Causal(), "dropout": 0.3, "key": jax.random.key(5)},
    "keep": lambda: {"mask": Full(), "dropout": 0.3, "keep": kept()},
    "pieces": lambda: {"mask": Causal(), "sizes": {"d": 40, "v": 48}},
    "one_token": lambda: {"mask": Causal(), "sizes": {"t": 1, "s": 1}},
    "one_query": lambda: {"mask": Causal(), "sizes": {"t": 1, "k": 4}},
}
BIASES = [(B, H, T, S), (1, H, T, S), (B, 1, T, S), (B, H, 1, S), (1, 1, 1, S),
          (1, H, T, 1), (B, 1, 1, 1)]
CASES |= {
    "bias_" + "x".join(map(str, shape)):
        lambda shape=shape: {"mask": Causal(), "bias": normal(4, *shape)}
    for shape in BIASES
}


def inputs(t=T, s=S, h=H, k=K, d=D, v=V, dtype=jnp.float32):
    shapes = {"q": (B, t, h, d), "k": (B, s, k, d), "v": (B, s, k, v)}
    return {n: normal(i, *a).astype(dtype) for i, (n, a) in enumerate(shapes.items())}


def program(f, options):
    """Compiled: arrays -> o, lse and the gradients of a random projection of both."""
    def scalar(arrays):
        o, lse = f(**arrays, **options)
        wo, wl = normal(8, *o.shape), normal(9, *lse.shape)
        total = (o.astype(jnp.float32) * wo).sum()
        return total + (jnp.where(jnp.isfinite(lse), lse, 0) * wl).sum(), (o, lse)

    def both(arrays):
        (_, (o, lse)), grads = jax.value_and_grad(scalar, has_aux=True)(arrays)
        return {"o": o, "lse": lse} | grads

    return jax.jit(both)


def results(f, arrays, options):
    """What its program gives."""
    return program(f, options)(arrays)


def twice(f, arrays, options):
    """What its program gives, two times the same bits."""
    both = program(f, options)
    found = both(arrays)
    jax.tree.map(np.testing.assert_array_equal, found, both(arrays))
    return found


def close(found, expected, bound=1e-5):
    for name in expected:
        a, b = (np.asarray(x[name], np.float64) for x in (found, expected))
        seen = np.isfinite(b)
        assert (np.isfinite(a) == seen).all(), name
        a, b = np.where(seen, a, 0), np.where(seen, b, 0)
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-6)
        assert error <= (bound if name in ("o", "lse") else 2 * bound), (name, error)


def given(name):
    """(arrays, options) of a case."""
    options = CASES[name]()
    arrays = inputs(**options.pop("sizes", {}))
    arrays |= {n: options.pop(n) for n in ("bias", "sink") if n in options}
    return arrays, options


def once(f, given):
    """What `f` gives of each case (arrays, options) = given(name), computed once for
    all kernels."""
    return functools.cache(lambda name: jax.device_get(results(f, *given(name))))


wanted = once(attend, given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_function(name, backend):
    kernel = functools.partial(flash, tile=TILE, backend=backend, interpret=INTERPRET)
    close(twice(kernel, *given(name)), wanted(name))


@pytest.mark.parametrize("name", ("causal", "aligned", "window", "sink_tokens", "runs",
                                  "keep", "bias_2x4x37x37"))
def test_what_a_mask_cuts_off_a_tile_is_not_missed(name, monkeypatch):
    monkeypatch.setattr(tile_patterns, "LANES", 8)
    kernel = functools.partial(flash, tile=(16, 16, 8), interpret=INTERPRET)
    close(results(kernel, *given(name)), wanted(name))


def test_programs_stay_short():
    """A mask that cuts tiles in many ways, wide heads and data that decide make tiles
    smaller."""
    whole = schedule.Tiling(8192, 8192, 2048, 2048, 0)
    size = lambda mask, width, traced: tile_patterns.shrink_to_fit(
        mask, whole, 256, width, traced, False)[2:4]
    assert size(Causal(), 128, False) == (2048, 2048)
    assert size(Causal(), 128, True) == (2048, 1024)
    assert size(Causal(), 256, False) == (2048, 1024)
    assert size(Causal() & Window(4096), 256, True) == (1024, 1024)
    short = whole._replace(t=200, s=200, rows=256, columns=256)
    assert tile_patterns.shrink_to_fit(Causal(), short, 256, 256, True, True) == short


def test_tiles_on_the_diagonal_are_cut_alike():
    mask, tiling = Causal(), schedule.Tiling(1000, 1000, 256, 256, 0)
    table = schedule.block_mask(mask, tiling)
    ways, codes, _ = tile_patterns.tile_patterns(mask, tiling, 128, table, None)
    assert (np.diag(codes)[:3] == schedule.MASKED + 1).all()
    assert (codes[np.tril_indices(4, -1)] == schedule.FULL).all()
    assert [p[1:] for p in ways.partial[0]] == [(128, 0, 256), (256, 128, 256)]
    assert sum(p.area for p in ways.partial[0]) == 0.75 * 256**2
    # nothing is cut off where the mask is not known before the run
    unknown = schedule.Tiling(1000, 1000, 256, 256, None)
    assert not tile_patterns.tile_patterns(mask, unknown, 128, table, None)[0].partial


@functools.cache
def wanted_low(t, dtype):
    """Inputs, what they give in float32, and what plain jnp makes of them."""
    heads = H if t < 1000 else 1
    low = inputs(t=t, s=t, h=heads, k=heads, d=24, dtype=dtype)
    exact = {n: a.astype(jnp.float32) for n, a in low.items()}

    def plain(q, k, v):
        s = jnp.einsum("bthd,bshd->bhts", q, k) * np.asarray(q.shape[-1] ** -0.5, dtype)
        seen = jnp.tril(jnp.ones(s.shape[-2:], bool))[None, None]
        p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf))
        lse = jax.nn.logsumexp(s, -1, where=seen)
        return jnp.einsum("bhts,bshv->bthv", p, v), lse

    expected = results(attend, exact, {"mask": Causal()})
    return low, expected, results(plain, low, {})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", (1, 63, 250, 4097))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_low_precision_is_as_good_as_plain_jnp(t, dtype, backend):
    """Against float32 of the same numbers: at most twice the error of plain jnp."""
    low, expected, rough = wanted_low(t, dtype)
    kernel = functools.partial(flash, backend=backend, interpret=INTERPRET)
    found = results(kernel, low, {"mask": Causal()})
    for n in ("o", "q", "k", "v"):
        norm = lambda x: np.linalg.norm(np.asarray(x[n], np.float64)
                                        - np.asarray(expected[n], np.float64))
        scale = np.linalg.norm(np.asarray(expected[n], np.float64))
        assert norm(found) <= 2 * norm(rough) + 1e-4 * scale, n


def test_queries_that_do_not_fit_on_the_chip_have_a_kernel_of_their_own(monkeypatch):
    monkeypatch.setattr(tables, "holds_queries", lambda *a: False)
    arrays = inputs()
    options = {"mask": Causal(), "softcap": 3.0}
    kernel = functools.partial(flash, tile=TILE, interpret=INTERPRET)
    close(results(kernel, arrays, options), results(attend, arrays, options))


@pytest.mark.parametrize("case", ("causal", "runs", "sinks", "empty_rows"))
def test_a_list_of_tiles_that_is_too_long_is_shared_out(case, monkeypatch):
    monkeypatch.setattr(tables, "holds_queries", lambda *a: False)
    kernel = functools.partial(flash, tile=(8, 16), interpret=INTERPRET)
    want = results(kernel, *given(case))
    # room for four tiles: some lines have so many, or more with their query heads
    monkeypatch.setattr(portions_tpu, "ROOM", 4 * 16)
    have = results(kernel, *given(case))
    for n in want:
        np.testing.assert_array_equal(have[n], want[n])


def test_lines_stay_whole_in_portions():
    table = np.tril(np.full((40, 40), schedule.FULL))
    seen = schedule.grid_order(table, None)
    parts = portions_tpu.portions(seen)
    assert len(parts) == 1 and parts[0].lines == 40
    cut = portions_tpu.portions(seen, portions_tpu.ROOM // 12 // 100)
    assert sum(p.lines for p in cut) == 40 and len(cut) > 8
    assert [p.first for p in cut] == list(np.cumsum([0] + [p.lines for p in cut])[:-1])
    assert all(p.seen.first[0] and p.seen.last[-1] for p in cut)
    assert all(len(p.seen.order) <= 100 for p in cut)
    order = np.concatenate([p.seen.order for p in cut])
    np.testing.assert_array_equal(order, seen.order)


def test_a_long_odd_length_and_logits_in_the_thousands():
    q, k, v = (normal(n, 1, 4097, 1, 8) for n in range(3))
    run = lambda f, **kw: jax.jit(lambda q: f(q, k, v, mask=Causal() & Window(300),
                                              **kw)[0])(q * 1000)
    found = run(flash, interpret=INTERPRET)
    expected = run(attend)
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_causal_work_is_half_and_a_window_is_linear():
    count = lambda mask, t: cost.flops(
        lambda *a: flash(*a, mask=mask, tile=(64, 64))[0],
        *(jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32),) * 3,
    )
    full = count(Full(), 1024)
    assert 0.5 <= count(Causal(), 1024) / full < 0.57
    windows = [count(Causal() & Window(64), t) for t in (512, 1024, 2048)]
    assert 0.9 < cost.slope(windows) < 1.1


def test_memory_holds_no_matrix():
    def both(q):
        return jax.grad(lambda q: flash(q, q, q, mask=Causal(), tile=(64, 64),
                                        interpret=INTERPRET)[0].sum())(q)

    sizes = [cost.memory(both, jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32))
             for t in (512, 1024, 2048)]
    assert cost.slope(sizes) < 1.2, sizes


class Table(Mask):
    """A mask that reads an array."""

    def __call__(self, h, i, j):
        return jnp.asarray([True, False, True])[j % 3]


@pytest.mark.parametrize("change, reason", [
    ({"d": 320}, "D=320: at most 256"), ({"v": 300}, "V=300: at most 256"),
    ({"dtype": jnp.float64}, "float64|float32"), ({"mask": Table()}, "reads a table"),
])
def test_refusals_name_their_reason(change, reason):
    mask = change.pop("mask", None)
    arrays = inputs(**change)
    if "dtype" in change:
        arrays["v"] = arrays["v"].astype(jnp.bfloat16)
    with pytest.raises(Refused, match=reason):
        flash(**arrays, mask=mask, interpret=INTERPRET)


def test_float16_is_refused_where_it_would_not_compile():
    with pytest.raises(Refused, match="float16: TPUs know bfloat16"):
        flash(**inputs(dtype=jnp.float16), interpret=False)


@pytest.mark.parametrize("found", ("7.5", "gfx942"))
def test_devices_that_nobody_compiled_for_are_refused(monkeypatch, found):
    """An older card of NVIDIA's, one of another maker: XLA's form runs there."""
    monkeypatch.setattr(tables, "capability", lambda: found)
    with pytest.raises(Refused, match=rf"{found}.* compute capability 8.0 or more"):
        flash(**inputs(), backend="triton")
    monkeypatch.setattr(tables, "capability", lambda: "12.0")
    refusals.check_device("triton", (jnp.zeros(1, jnp.bfloat16),), False)


def test_softmax_runs_the_kernel_by_name():
    a = inputs()
    kernel = Softmax(implementation="pallas")
    found = jax.jit(kernel)(a["q"], a["k"], a["v"])
    np.testing.assert_allclose(found, jax.jit(Softmax())(a["q"], a["k"], a["v"]),
                               atol=1e-5)
    with pytest.raises(NotImplementedError, match="D=300: at most 256"):
        kernel(*(normal(n, 1, 4, 1, 300) for n in range(3)))


@pytest.mark.parametrize("module", (
    flash_tpu, flash_triton, flash_mosaic, flash_blackwell))
def test_every_backend_has_the_same_entries(module):
    assert callable(module.forward) and callable(module.backward)
