"""What reads a cache or chosen blocks, on a device: the kernels `decode` and `blocks`.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from attn.masks import Causal
from attn.sparse import chosen_blocks
from experiments.measure.device.case import (
    BF16, F32, LIMIT, Bench, Case, Row, normal
)
from experiments.measure.device.exact import plain
from experiments.measure.device.fast import OURS, Contender, race, with_gradients
from experiments.measure.device.place import Place
from experiments.measure.device.right import Subject, check
from pallas_kernels.blocks.api import blocks
from pallas_kernels.decode.api import decode
from pallas_kernels.decode.plain import packed, unpacked
from pallas_kernels.logits import LogitSpec

RIGHT: dict[str, dict[str, Any]] = {
    "16 bits": {}, "8 bits": {"bits": 8}, "4 bits": {"bits": 4},
    "pages of 128": {"page": 128}, "float32": {"dtype": F32},
    "float32 8 bits": {"dtype": F32, "bits": 8}, "S1": {"s": 1},
    "pages of 16, 4 bits": {"page": 16, "bits": 4}, "S5000 D80": {"s": 5000, "d": 80},
}
SMALL = ("16 bits", "8 bits", "4 bits")
FAST: dict[str, dict[str, Any]] = {
    "B8 S32768 H32 K8 8 bits": {"bits": 8}, "B8 S32768 H32 K8 4 bits": {"bits": 4},
    "B8 S32768 H32 K8": {}, "B8 S32768 H32 K8 pages of 128": {"page": 128},
    "B32 S8192 H32 K8": {"b": 32, "s": 8192}, "B1 S131072 H32 K8": {"b": 1, "s": 2**17},
    "B1 S131072 H32 K8 8 bits": {"b": 1, "s": 2**17, "bits": 8},
    "B1 S131072 H32 K8 4 bits": {"b": 1, "s": 2**17, "bits": 4},
}
TINY = {"B1 S100 H4 K2 8 bits": {"b": 1, "s": 100, "h": 4, "k": 2, "d": 16, "bits": 8}}
FIRST = 2
BLOCK, CHOSEN = 64, 16


def cases(place: Place) -> Iterator[Case]:
    """What is right, on every backend, and what is fast, on the first."""
    for backend in place.others:
        for n, (name, options) in enumerate(RIGHT.items()):
            if not place.tiny or name in SMALL:
                yield Case(f"right decode {backend} {name}",
                           functools.partial(_check, place, backend, options),
                           tier=0 if n == 0 else 1 if name in SMALL else 2)
        yield Case(f"right blocks {backend} causal",
                   functools.partial(_check_blocks, place, backend), tier=0)
    for n, (name, shape) in enumerate((TINY if place.tiny else FAST).items()):
        yield Case(f"fast decode {name}", functools.partial(_race, place, shape),
                   tier=0 if n < FIRST else 1)
    for back in (False, True):
        way = "both" if back else "forward"
        yield Case(f"fast blocks {way} causal {CHOSEN} of {BLOCK}",
                   functools.partial(_race_blocks, place, back), tier=1 + back,
                   seconds=LIMIT)


def cache(b=8, s=32768, h=32, k=8, d=128, bits=16, page=None, dtype=BF16
          ) -> dict[str, Any]:
    """Arrays of a step: one query a row, and a full cache, paged if it is to be; pages
    lie in no order."""
    many = -(-s // page) if page else 1
    lead = (b * many, page) if page else (b, s)
    found: dict[str, Any] = {"q": normal(0, b, 1, h, d, dtype=dtype)}
    for n, name in enumerate("kv"):
        if bits == 16:
            found[name] = normal(1 + n, *lead, k, d, dtype=dtype)
            continue
        top = 2 ** (bits - 1)
        whole = jax.random.randint(
            jax.random.key(1 + n), (*lead, k, d), -top + 1, top, jnp.int8)
        found[name] = packed(whole) if bits == 4 else whole
        found[f"{name}_scale"] = (1 + jax.random.uniform(
            jax.random.key(5 + n), (*lead, k))) / top
    if page:
        order = np.random.default_rng(0).permutation(b * many).reshape(b, many)
        found["table"] = jnp.asarray(order, jnp.int32)
    found["lengths"] = jnp.full((b,), s, jnp.int32)
    return found


def whole(found: dict[str, Any], bits: int) -> tuple:
    """q, k [B,S,K,D] and v of a cache as plain numbers of q's type, in float32 if that
    is. What a cache holds in whole numbers is exact in float32 alone."""
    def read(name):
        a = found[name]
        if bits < 16:
            a = unpacked(a, bits) * found[f"{name}_scale"][..., None]
        if (table := found.get("table")) is not None:
            a = a[table].reshape(table.shape[0], -1, *a.shape[2:])
        return a[:, :found["s"]].astype(found["q"].dtype)

    return found["q"], read("k"), read("v")


def call(place: Place, backend: str, bits: int, names: list[str],
         variant: tuple[str, ...] = ()) -> Callable:
    """(o, lse) of decode as a function of the arrays of these names."""
    def f(*args):
        return decode(**dict(zip(names, args)), bits=bits, variant=variant,
                      backend=backend, interpret=place.interpret)

    return f


def _check(place: Place, backend: str, options: dict, bench: Bench) -> Row:
    return check(bench, subject(place, backend, options))


def subject(place: Place, backend: str, options: dict, variant: tuple[str, ...] = ()
            ) -> Subject:
    """A step of decode, beside the whole row of logits."""
    shape = {"b": 2, "s": 4096, "h": 8, "k": 2} | options
    if place.tiny:
        shape |= {"s": min(shape["s"], 100), "h": 4, "d": 16}
    found, bits, s = cache(**shape), shape.get("bits", 16), shape["s"]
    names = list(found)

    def dense(*args):
        # causal, as the one query is the last token
        return plain(*whole(dict(zip(names, args)) | {"s": s}, bits), mask=Causal())

    args = tuple(found.values())
    inputs = 3 if bits == 16 else 1
    wanted = ("o", "lse", *(f"d{n}" for n in names[:inputs]))
    return Subject(call(place, backend, bits, names, variant), dense, args, inputs,
                   wanted)


def _race(place: Place, shape: dict, bench: Bench) -> Row:
    found, bits = cache(**shape), shape.get("bits", 16)
    names, backend = list(found), place.others[0]
    f = call(place, backend, bits, names)
    peers = []
    if bits == 16 and "page" not in shape:
        kinds = ("cudnn", "xla") if place.platform == "gpu" else ("xla",)
        peers = [Contender({"cudnn": "cuDNN", "xla": "jax.nn"}[kind],
                           functools.partial(_peer, kind)) for kind in kinds]
    moved = sum(a.nbytes for n, a in found.items() if n[0] in "kv")
    found_ = [Contender(f"{OURS} {backend}", lambda *a: f(*a)[0]), *peers]
    return race(bench, found_, tuple(found.values()), moved=moved)


def _peer(kind: Any, q, k, v, lengths):
    return jax.nn.dot_product_attention(
        q, k, v, implementation=kind, key_value_seq_lengths=lengths)


def choice(t: int, k: int, block: int, many: int) -> jax.Array:
    """[1,K,N,many]: each block of queries takes its own and others evenly before it."""
    n = -(-t // block)
    at = np.arange(n)[:, None]
    steps = at - np.arange(many) * np.maximum(at // many, 1)
    found = np.where(steps >= 0, steps, -1).astype(np.int32)
    return jnp.broadcast_to(jnp.asarray(found), (1, k, n, many))


def _blocks(place: Place, backend: str, block: int) -> Callable:
    def f(q, k, v, at):
        return blocks(q, k, v, at, LogitSpec(Causal()), block=block, backend=backend,
                      interpret=place.interpret)

    return f


def _check_blocks(place: Place, backend: str, bench: Bench) -> Row:
    t, h, k, d, block, many = (90, 2, 1, 16, 16, 3) if place.tiny else (
        4096, 8, 2, 128, BLOCK, CHOSEN)
    args = (normal(0, 1, t, h, d), normal(1, 1, t, k, d), normal(2, 1, t, k, d),
            choice(t, k, block, many))

    def xla(q, k, v, at):
        return chosen_blocks.attend(q, k, v, at, LogitSpec(Causal()), block=block,
                                    implementation="xla")

    return check(bench, Subject(_blocks(place, backend, block), xla, args, 3,
                                ("o", "lse", "dq", "dk", "dv")))


def _race_blocks(place: Place, back: bool, bench: Bench) -> Row:
    t, h, k, d, block, many = (90, 2, 1, 16, 16, 3) if place.tiny else (
        32768, 16, 4, 128, BLOCK, CHOSEN)
    at = choice(t, k, block, many)
    args: tuple = (normal(0, 1, t, h, d), normal(1, 1, t, k, d), normal(2, 1, t, k, d),
                   at)
    backend = place.others[0]
    f = _blocks(place, backend, block)
    run: Callable = lambda *a: f(*a)[0]
    if back:
        args, run = (*args, normal(3, 1, t, h, d)), with_gradients(run, 3)
    pairs = int((np.asarray(at[0, 0]) >= 0).sum()) * block * block
    work = 2 * h * pairs * 2 * d * (3.5 if back else 1)
    return race(bench, [Contender(f"{OURS} {backend}", run)], args, flops=work)
