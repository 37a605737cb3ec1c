"""The decode kernel is the function: caches, pages, quantised numbers, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Causal, Sink, Window
from attn.positions import ALiBi
from attn.softmax import Softmax
from attn.tiles import attend
from pallas_kernels import Refused
from pallas_kernels.decode import decode, packed, unpacked
from tests.test_flash import BACKENDS, close, normal, results

B, T, S, H, K, D, V = 2, 3, 41, 4, 2, 8, 12


def arrays(t=T, k=K, dtype=jnp.float32):
    shapes = (B, t, H, D), (B, S, k, D), (B, S, k, V)
    return {n: normal(i, *shapes[i]).astype(dtype) for i, n in enumerate("qkv")}


def slots():
    """Positions [B,S,K] of slots that differ by head, some of them empty."""
    pos = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    return jnp.asarray(np.stack([pos, np.where(pos % 3 == 0, -1, pos)], -1))


def last(t=T):
    return jnp.broadcast_to(jnp.arange(S - t, S, dtype=jnp.int32), (B, t))


CASES = {
    "causal": lambda: {"mask": Causal()},
    "window": lambda: {"mask": Causal() & (Window(9) | Sink(2)), "softcap": 3.0,
                       "score": ALiBi(H)},
    "sink": lambda: {"mask": Causal(), "sink": normal(5, H)},
    "slots": lambda: {"mask": Causal(), "q_pos": last(), "kv_pos": slots()},
    "runs": lambda: {
        "mask": Causal(), "q_pos": last(), "kv_pos": slots(),
        "q_run": jnp.asarray([[1, 1, 1], [0, 2, 2]]),
        "kv_run": jnp.asarray(np.where(np.arange(S) < 9, 1, [[1], [2]])),
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", (None, 16))
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_function(name, tile, backend):
    options, given = CASES[name](), arrays()
    given |= {n: options.pop(n) for n in ("sink",) if n in options}
    kernel = functools.partial(decode, tile=tile, backend=backend, interpret=True)
    found = results(kernel, given, options)
    close(found, results(attend, given, options))
    again = results(kernel, given, options)
    for n in found:
        np.testing.assert_array_equal(found[n], again[n])


def run(a, **options):
    return jax.jit(functools.partial(decode, interpret=True, **options))(**a)


def same(found, expected, bound=1e-5):
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", (1, 4))
def test_one_query_and_lengths_by_head(k, backend):
    a = arrays(1, k)
    lengths = np.array([[5, 41, 0, 17], [0, 0, 0, 0]], np.int32)[:, :k]
    filled = np.arange(S)[None, :, None] < lengths[:, None]
    pos = jnp.asarray(np.where(filled, np.arange(S)[None, :, None], -1), jnp.int32)
    found = run(a, lengths=jnp.asarray(lengths), tile=16, backend=backend)
    same(found, attend(*a.values(), q_pos=last(1), kv_pos=pos))
    assert (np.asarray(found[0][1]) == 0).all()


def paged(a, page=8, seed=0):
    """k and v of `a` scattered over pages, and the table; the last page is part empty.
    """
    rng = np.random.default_rng(seed)
    many = -(-S // page)
    table = rng.permutation(B * many + 3)[:B * many].reshape(B, many)
    pages = {}
    for n in "kv":
        fill = (0, 0), (0, many * page - S), (0, 0), (0, 0)
        rows = np.pad(np.asarray(a[n]), fill)
        pages[n] = np.full((B * many + 3, page, *rows.shape[2:]), 7, np.float32)
        pages[n][table] = rows.reshape(B, many, page, *rows.shape[2:])
    return {"q": a["q"]} | {n: jnp.asarray(x) for n, x in pages.items()}, table


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile, page", ((8, 8), (24, 8), (16, 16), (16, 32), (32, 24)))
def test_pages_hold_the_same_cache(tile, page, backend):
    a = arrays()
    pages, table = paged(a, page)
    lengths = jnp.full((B,), S, jnp.int32)
    options = {"mask": Causal(), "q_pos": last(), "backend": backend}
    found = run(pages, table=jnp.asarray(table, jnp.int32), lengths=lengths, tile=tile,
                **options)
    same(found, run(a, **options))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("page", (8, 16))
def test_a_page_that_is_not_there_is_not_seen(page, backend):
    a = arrays(1)
    pages, table = paged(a, page)
    table[:, 1] = -1
    seen = (np.arange(S) // page != 1)[None, :, None]
    pos = jnp.asarray(np.where(seen, np.arange(S)[None, :, None], -1), jnp.int32)
    found = run(pages, table=jnp.asarray(table, jnp.int32), q_pos=last(1),
                lengths=jnp.full((B,), S), backend=backend)
    pos = jnp.broadcast_to(pos, (B, S, K))
    same(found, attend(*a.values(), q_pos=last(1), kv_pos=pos))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", (8, 4))
def test_quantised_numbers(bits, backend):
    a = arrays()
    top = 2 ** (bits - 1) - 1
    low, scales = {}, {}
    for n in "kv":
        scale = jnp.abs(a[n]).max(-1) / top
        whole = jnp.round(a[n] / scale[..., None]).astype(jnp.int8)
        low[n], scales[f"{n}_scale"] = packed(whole) if bits == 4 else whole, scale
        a[n] = whole * scale[..., None]
        np.testing.assert_array_equal(unpacked(low[n], bits), whole)
    options = {"mask": Causal(), "tile": 16, "backend": backend}
    found = run({"q": a["q"]} | low, bits=bits, **scales, **options)
    same(found, run(a, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_the_sums_of_weights(backend):
    a = arrays()
    bias = normal(6, B, S, K)
    o, lse, found = run(a, mask=Causal(), statistics=True, tile=16, bias=bias,
                        backend=backend)
    k = jnp.repeat(a["k"], H // K, 2)
    s = jnp.einsum("bthd,bshd->bhts", a["q"], k) * D**-0.5
    s = s + jnp.repeat(bias, H // K, 2).transpose(0, 2, 1)[:, :, None]
    seen = jnp.arange(S)[None] <= jnp.arange(S - T, S)[:, None]
    p = jnp.where(seen, jnp.exp(s - lse[..., None]), 0)
    want = p.reshape(B, K, H // K, T, S).sum((2, 3)).transpose(0, 2, 1)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), np.full((B, K), T * H / K), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bias_of_a_key_has_a_gradient(backend):
    a, bias = arrays(), normal(6, B, S, K)
    kernel = results(functools.partial(decode, backend=backend, interpret=True),
                     a | {"bias": bias}, {})
    full = lambda q, k, v, bias: attend(
        q, k, v, bias=jnp.repeat(bias, H // K, 2).transpose(0, 2, 1)[:, :, None])
    close(kernel, results(full, a | {"bias": bias}, {}))


@pytest.mark.parametrize("change, error, reason", [
    ({"bits": 3}, ValueError, "bits=3: expected 4, 8 or 16"),
    ({"bits": 8}, Refused, "k is float32 at bits=8"),
    ({"q": (1, 200, 4, 8)}, Refused, "T=200, H=4: at most 512"),
])
def test_refusals_name_their_reason(change, error, reason):
    a = arrays()
    if "q" in change:
        a["q"] = normal(0, *change.pop("q"))
    with pytest.raises(error, match=reason):
        decode(**a, interpret=True, **change)


def test_a_stream_runs_the_kernel_by_name():
    a = arrays(S, K)
    outs = []
    for how in ("pallas", "xla"):
        attention = Softmax(implementation=how)
        state = attention.init_state(S, **a)
        step = jax.jit(attention.step)
        prompt = {n: x[:, :S - 3] for n, x in a.items()}
        state, first = step(state, *prompt.values())
        state, rest = step(state, *(x[:, S - 3:] for x in a.values()))
        outs.append(jnp.concatenate([first, rest], 1))
    np.testing.assert_allclose(*outs, atol=1e-5)
