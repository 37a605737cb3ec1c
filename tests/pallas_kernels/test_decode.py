"""The decode kernel is the function: caches, pages, quantised numbers, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Causal, Sink, Window
from attn.positions import ALiBi
from attn.softmax import Softmax
from pallas_kernels import Refused
from pallas_kernels.decode import (
    tpu as decode_tpu, triton as decode_triton, triton_unpack as widen_triton
)
from pallas_kernels.decode.plain import packed, unpacked
from pallas_kernels.decode.triton import splits
from tests.on_device import INTERPRET
from tests.oracles.softmax import chunks as attend, decode
from tests.pallas_kernels.test_flash import (
    BACKENDS, close, normal, once, results, twice
)

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
        "q_segment": jnp.asarray([[1, 1, 1], [0, 2, 2]]),
        "kv_segment": jnp.asarray(np.where(np.arange(S) < 9, 1, [[1], [2]])),
    },
}


def given(name):
    """(arrays, options) of a case."""
    options = CASES[name]()
    return arrays() | {n: options.pop(n) for n in ("sink",) if n in options}, options


wanted = once(attend, given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", (None, 16))
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_function(name, tile, backend):
    kernel = functools.partial(decode, tile=tile, backend=backend, interpret=INTERPRET)
    close(twice(kernel, *given(name)), wanted(name))


def run(a, **options):
    return jax.jit(functools.partial(decode, interpret=INTERPRET, **options))(**a)


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
@pytest.mark.parametrize("tile, page", (
    (8, 8), (24, 8), (16, 16), (32, 16), (16, 32), (32, 24)))
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
    kernel = results(functools.partial(decode, backend=backend, interpret=INTERPRET),
                     a | {"bias": bias}, {})
    full = lambda q, k, v, bias: attend(
        q, k, v, bias=jnp.repeat(bias, H // K, 2).transpose(0, 2, 1)[:, :, None])
    close(kernel, results(full, a | {"bias": bias}, {}))


def split(f=decode, **options):
    return functools.partial(f, backend="triton", interpret=INTERPRET, **options)


@pytest.mark.parametrize("splits", (2, 20))
@pytest.mark.parametrize("name", CASES)
def test_splits_change_nothing(name, splits):
    options, given = CASES[name](), arrays()
    given |= {n: options.pop(n) for n in ("sink",) if n in options}
    found = results(split(tile=16, splits=splits), given, options)
    close(found, results(attend, given, options))


def test_splits_of_empty_rows_and_splits_that_see_nothing():
    a = arrays(1)
    lengths = np.array([[0, 0], [3, 20]], np.int32)
    pos = np.where(np.arange(S)[None, :, None] < lengths[:, None],
                   np.arange(S)[None, :, None], -1)
    options = {"mask": Causal() & Window(9), "q_pos": jnp.full((B, 1), 19, jnp.int32)}
    found = jax.jit(split(tile=16, splits=3, lengths=jnp.asarray(lengths), **options))(
        **a)
    same(found, attend(*a.values(), kv_pos=jnp.asarray(pos, jnp.int32), **options))
    assert (np.asarray(found[0][0]) == 0).all() and (found[1][0] == -np.inf).all()
    nothing = jnp.zeros(B, jnp.int32)
    o, lse, w = jax.jit(split(tile=16, lengths=nothing, statistics=True))(**a)
    assert (o == 0).all() and (lse == -np.inf).all() and (w == 0).all()
    grads = jax.grad(lambda a: split(tile=16, lengths=nothing)(**a)[0].sum())(a)
    assert all((g == 0).all() for g in grads.values())


def test_what_lies_beyond_the_length_is_not_read():
    a = arrays(1)
    lengths = jnp.asarray([20, 35], jnp.int32)
    expected = jax.jit(split(tile=16, lengths=lengths, statistics=True))(**a)
    beyond = (jnp.arange(S)[None] >= lengths[:, None])[..., None, None]
    spoilt = a | {n: jnp.where(beyond, jnp.nan, a[n]) for n in "kv"}
    found = jax.jit(split(tile=16, lengths=lengths, statistics=True))(**spoilt)
    for x, y in zip(found, expected):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("holes", ("length", "position", "segment", "page"))
def test_slots_without_a_token_may_hold_anything(holes, backend):
    a, empty = arrays(2), jnp.arange(S) % 5 == 3
    pos = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
    options = {"mask": Causal(), "q_pos": last(2), "statistics": True, "tile": 16,
               "backend": backend}
    if holes == "length":
        empty = jnp.arange(S) >= 30
        options["lengths"] = jnp.full(B, 30, jnp.int32)
    elif holes == "position":
        options["kv_pos"] = jnp.where(empty, -1, pos)
    elif holes == "segment":
        options["q_segment"] = jnp.ones((B, 2), jnp.int32)
        options["kv_segment"] = jnp.where(empty, 0, 1)[None]
    else:  # the first page, which is what is fetched for a page that is not there
        a, table = paged(a)
        empty = np.zeros(len(a["k"]), bool)
        empty[0] = True
        options["lengths"] = jnp.full(B, S, jnp.int32)
        options["table"] = jnp.asarray(np.where(table == 0, 1, table).astype(np.int32)
                                       ).at[:, 1].set(-1)
    kernel = functools.partial(decode, interpret=INTERPRET, **options)

    @jax.jit
    def both(a):
        out, back = jax.vjp(lambda a: kernel(**a), a)
        return out, back(jax.tree.map(jnp.ones_like, out))[0]

    want, wanted_grads = both(a)
    there = ~jnp.broadcast_to(empty[:, None] if holes == "page" else empty,
                              a["k"].shape[:2])[..., None, None]
    for value in (jnp.nan, jnp.inf, 1e30):
        spoilt = a | {n: jnp.where(there, a[n], value) for n in "kv"}
        found, grads = both(spoilt)
        for x, y in zip(found, want, strict=True):
            np.testing.assert_array_equal(x, y)
        for n in "qkv":
            np.testing.assert_array_equal(grads[n], wanted_grads[n])


@pytest.mark.parametrize("h, k, d, v", (
    (1, 1, 8, 12), (3, 1, 12, 8), (2, 2, 24, 24), (2, 1, 136, 16), (2, 1, 16, 200)))
def test_widths_and_heads(h, k, d, v):
    a = {"q": normal(0, B, 1, h, d), "k": normal(1, B, S, k, d),
         "v": normal(2, B, S, k, v)}
    found = jax.jit(split(tile=16, splits=2))(**a)
    same(found, attend(*a.values(), q_pos=last(1), kv_pos=jnp.broadcast_to(
        jnp.arange(S, dtype=jnp.int32), (B, S))))


def test_many_queries_of_a_key_head_are_several_tiles():
    a = {"q": normal(0, 1, 20, 4, D), "k": normal(1, 1, S, 1, D),
         "v": normal(2, 1, S, 1, V)}
    found = run(a, mask=Causal(), backend="triton", tile=16, statistics=True)
    same(found[:2], attend(*a.values(), mask=Causal()))
    np.testing.assert_allclose(found[2].sum(1), [[80]], rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_low_precision_is_as_good_as_plain_jnp(dtype, backend):
    """Against float32 of the same numbers: at most twice the error of plain jnp."""
    low = arrays(k=H, dtype=dtype)
    exact = {n: a.astype(jnp.float32) for n, a in low.items()}

    def rough(q, k, v):
        s = jnp.einsum("bthd,bshd->bhts", q, k) * np.asarray(D**-0.5, dtype)
        seen = jnp.arange(S)[None] <= jnp.arange(S - T, S)[:, None]
        p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf))
        return jnp.einsum("bhts,bshv->bthv", p, v), jax.nn.logsumexp(s, -1, where=seen)

    expected = results(attend, exact, {"mask": Causal()})
    found = results(functools.partial(
        decode, backend=backend, interpret=INTERPRET, tile=16), low, {"mask": Causal()})
    plain = results(rough, low, {})
    for n in ("o", "q", "k", "v"):
        norm = lambda x: np.linalg.norm(np.asarray(x[n], np.float64)
                                        - np.asarray(expected[n], np.float64))
        scale = np.linalg.norm(np.asarray(expected[n], np.float64))
        assert norm(found) <= 2 * norm(plain) + 1e-4 * scale, n


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_quantised_numbers_in_low_precision(bits, dtype):
    """int8 and int4 are exact in 16 bits: as near as the numbers they stand for."""
    a, top = arrays(1), 2 ** (bits - 1) - 1
    low, scales, exact = {}, {}, {"q": a["q"].astype(dtype).astype(jnp.float32)}
    for n in "kv":
        scales[f"{n}_scale"] = scale = jnp.abs(a[n]).max(-1) / top
        whole = jnp.round(a[n] / scale[..., None]).astype(jnp.int8)
        low[n] = packed(whole) if bits == 4 else whole
        exact[n] = whole * scale[..., None]
    found = jax.jit(split(tile=16, splits=2, bits=bits, **scales))(
        a["q"].astype(dtype), **low)
    for x, y in zip(found, run(exact, backend="triton", tile=16)):
        assert np.linalg.norm(x - y) <= jnp.finfo(dtype).eps * np.linalg.norm(y)


def executed(text, word):
    """Registers $0 and $1 after the instructions of `text` with `word` in $2."""
    held = {"$2": word}
    value = lambda name: held[name] if name in held else int(name, 0)
    kinds = {"bf16x2": jnp.bfloat16, "f16x2": jnp.float16}

    def two(word, kind):
        return np.asarray([word & 0xFFFF, word >> 16], np.uint16).view(kinds[kind])

    for line in text.strip("{}\n ").split(";")[1:-1]:
        name, *words = line.replace(",", " ").split()
        out, given = words[0], [value(n) for n in words[1:]]
        if name == "prmt.b32":
            byte = (given[0] | given[1] << 32).to_bytes(8, "little")
            held[out] = sum(byte[given[2] >> 4 * n & 15] << 8 * n for n in range(4))
        elif name.startswith("fma.rn."):
            a, b, c = (two(n, name.split(".")[2]).astype(np.float64) for n in given)
            low, high = (a * b + c).astype(kinds[name.split(".")[2]]).view(np.uint16)
            held[out] = int(low) | int(high) << 16
        else:
            a, *b = given
            held[out] = {"mov.b32": lambda: a, "shr.u32": lambda: a >> b[0],
                         "and.b32": lambda: a & b[0], "xor.b32": lambda: a ^ b[0]
                         }[name]()
    return np.asarray([held["$0"], held["$1"]], np.uint32)


@pytest.mark.parametrize("dtype, bits", widen_triton.KNOWN)
def test_the_instructions_widen_every_byte(dtype, bits):
    every = np.arange(256, dtype=np.uint8).reshape(64, 4)
    wanted = widen_triton.widened(jnp.asarray(every.view(np.int8)), bits,
                                  jnp.dtype(dtype), interpret=True)
    for shift, want in zip((0, 4), wanted):
        text = widen_triton.instructions(dtype, bits, shift)
        found = [executed(text, int(word)) for word in every.view("<u4")[:, 0]]
        found = np.stack(found).view(jnp.dtype(dtype))
        np.testing.assert_array_equal(found.astype(np.float32),
                                      np.asarray(want, np.float32))


def test_the_number_of_splits_fills_the_device():
    assert [splits(n, 512, 132) for n in (1, 8, 64, 256, 320)] == [251, 32, 4, 1, 4]
    assert splits(8, 5, 132) == 5 and splits(10**4, 5, 132) == 1


def test_every_backend_has_the_same_entries():
    for module in (decode_tpu, decode_triton):
        assert all(callable(getattr(module, n)) for n in ("sized", "attend", "weights"))


@pytest.mark.parametrize("change, error, reason", [
    ({"bits": 3}, ValueError, "bits=3: expected 4, 8 or 16"),
    ({"bits": 8}, Refused, "k is float32 at bits=8"),
    ({"q": (B, 200, 4, 8)}, Refused, "T=200, H=4: at most 512"),
    ({"q": (B, 300, 4, 8), "backend": "triton"}, Refused, "K=2: at most 512 queries"),
    ({"splits": 2}, Refused, "splits=2: on TPU"),
])
def test_refusals_name_their_reason(change, error, reason):
    a = arrays()
    if "q" in change:
        a["q"] = normal(0, *change.pop("q"))
    with pytest.raises(error, match=reason):
        decode(**a, interpret=INTERPRET, **change)


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
