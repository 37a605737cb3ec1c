"""Right: a kernel's results and all its gradients, against float32 on the same device.

A kernel's error is given as a multiple of that of plain jnp in the same type, and may
be twice that; in float32, where plain jnp is the reference itself, 1e-5 of the norm
(gradients 2e-5). Where the true value is 0, or nearly (gradients of a softmax over one
key), what rounding leaves of the sums in float32 is allowed: `floor`, in units of the
array's natural size. Each program runs twice, into memory that holds NaN, and has to
give the same bits and no NaN.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.measure.device.case import F32, Bench, Row, Wrong

TWICE, CLOSE = 2.0, 1e-5
ROUNDING = 2.0**-20  # of sums in float32, in units of what is summed


class Subject(NamedTuple):
    """kernel(*args), what is proved, and plain(*args), the same in plain jnp in the
    type of its arguments: both return arrays, of which floating ones have gradients
    with respect to the first `inputs` arguments. names: of results, then of inputs.
    exact: the reference, None for `plain`; low: the type that is held against float32,
    None for that of the first argument.
    sizes(*args): the natural size of some gradients, by name, for their floor."""

    kernel: Callable[..., tuple]
    plain: Callable[..., tuple]
    args: tuple
    inputs: int
    names: Sequence[str]
    sizes: Callable[..., dict[str, float]] | None = None
    exact: Callable[..., tuple] | None = None
    low: Any = None


def check(bench: Bench, subject: Subject) -> Row:
    """The row of a subject that is right; raises `Wrong` for another."""
    args, kind = subject.args, jnp.dtype(subject.low or subject.args[0].dtype)
    program, seconds = bench.compiled(
        _poisoned(subject.kernel, subject.inputs), _nans(subject, args), *args,
        donate_argnums=0, keep_unused=True)
    high = tuple(a.astype(F32) if a.dtype == kind else a for a in args)
    exact = subject.exact or subject.plain
    with jax.default_matmul_precision("highest"):
        reference, _ = bench.compiled(
            _both(exact, subject.inputs), *high, reference=True)
    low = None
    if kind != F32:
        low, _ = bench.compiled(_both(subject.plain, subject.inputs), *args,
                                reference=True)
    with bench.alone():
        once, again = (jax.device_get(program(_nans(subject, args), *args))
                       for _ in range(2))
        wanted = jax.device_get(reference(*high))
        rough = None if low is None else jax.device_get(low(*args))
    sizes = subject.sizes(*high) if subject.sizes else {}
    row: Row = {"compile_s": round(seconds, 2), "errors": {},
                "bits": _same(once, again)}
    wrong = [] if row["bits"] else ["two runs differ"]
    for n, name in enumerate(subject.names):
        shown, bad = _judged(name, once[n], wanted[n],
                             None if rough is None else rough[n],
                             ROUNDING * float(sizes.get(name, 0.0)))
        row["errors"][name] = shown
        wrong += [bad] if bad else []
    if wrong:
        raise Wrong("; ".join(wrong))
    return row


def _judged(name: str, have, want, rough, floor: float) -> tuple[str, str | None]:
    """The error as it is shown, and what is wrong with it."""
    have, want = (np.asarray(a, np.float64) for a in (have, want))
    seen = np.isfinite(want)
    if (np.isfinite(have) != seen).all() and seen.any():
        return "nan", f"{name} was not written, or is not finite"
    if (np.isfinite(have) != seen).any():
        return "nan", f"{name} has {(np.isfinite(have) != seen).sum()} wrong infinities"
    error = float(np.linalg.norm((have - want)[seen]))
    size = float(np.linalg.norm(want[seen]))
    if rough is None:
        bound = CLOSE * (2 if name.startswith("d") else 1) * max(size, 1e-6)
        shown = f"{error / max(size, 1e-30):.1e}"
    else:
        plain = float(np.linalg.norm((np.asarray(rough, np.float64) - want)[seen]))
        bound = TWICE * plain + CLOSE * size
        shown = f"{error / plain:.2f}x" if plain > 0 else f"{error:.1e}"
    bound = max(bound, floor)
    return shown, None if error <= bound else (
        f"{name} is {shown} off (error {error:.2e}, allowed {bound:.2e}, norm "
        f"{size:.2e})")


def _both(f: Callable, inputs: int) -> Callable:
    """args -> results of f and the gradients of its first arguments, with cotangents
    that are iid normal."""
    def run(*args):
        fixed = args[inputs:]
        out, back = jax.vjp(lambda *a: f(*a, *fixed), *args[:inputs])
        return (*out, *back(tuple(map(_cotangent, range(len(out)), out))))

    return run


def _cotangent(n: int, a: jax.Array) -> jax.Array:
    drawn = jax.random.normal(jax.random.key(100 + n), a.shape)
    # the same numbers for the reference: rounded as the widest type that is low
    drawn = drawn.astype(jnp.bfloat16).astype(a.dtype)
    return jnp.where(jnp.isfinite(a), drawn, 0)


def _poisoned(f: Callable, inputs: int) -> Callable:
    """The same as a function of the memory that results are written to, too."""
    run = _both(f, inputs)
    return lambda poison, *args: run(*args)


def _nans(subject: Subject, args: tuple) -> Any:
    """NaN in the shape of the results, to be given away for them."""
    shapes = jax.eval_shape(_both(subject.plain, subject.inputs), *args)
    return [jnp.full(a.shape, jnp.nan, a.dtype) for a in shapes]


def _same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y, equal_nan=True) for x, y in
               zip(jax.tree.leaves(a), jax.tree.leaves(b)))
