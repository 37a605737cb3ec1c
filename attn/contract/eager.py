"""Eager: a call outside of `jit` is one program too, which is kept.

Called without `jit`, an attention is hundreds of operations, and its loops and gradient
rules are functions made anew by each call, which jax compiles anew. So outside of a
trace a call runs as one compiled program, kept for the attention and the shapes: the
second call compiles nothing, nor does its gradient. Inside of a trace nothing changes.

What can only be refused when values are known, such as a memory that is full, is asked
by `refuse` and comes back from the program beside its result.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from typing import Any, Callable

import jax
import numpy as np

from attn.contract.explicit import alone
from attn.contract.shapes import concrete

PLAIN = (bool, int, float, complex, str, bytes, type, np.dtype)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["wrong", "value"],
    meta_fields=["error"],
)
@dataclasses.dataclass(frozen=True)
class Question:
    """Whether something is wrong, a boolean array []; if so, error(value)."""

    wrong: Any
    value: Any
    error: Callable[[Any], Exception]

    def answer(self) -> None:
        """Raises its error if it is wrong and that can be known."""
        if concrete(self.wrong) and bool(self.wrong):
            raise self.error(self.value)


# the questions of the program that is being traced
_questions: contextvars.ContextVar = contextvars.ContextVar("questions", default=None)


def refuse(wrong: jax.Array, value: Any, error: Callable[[Any], Exception]) -> None:
    """Raises error(value) if `wrong` [] holds and values can be known: not inside of a
    trace of the user's, where the caller answers with NaN."""
    question, asked = Question(wrong, value, error), _questions.get()
    if asked is None:
        question.answer()
    else:
        asked.append(question)


def compiled_outside(method: Callable) -> Callable:
    """`method(self, ...)` of an attention, which outside of a trace runs as a program
    that is kept. What no program can be kept for runs as it is, such as arguments that
    are no arrays."""
    @functools.wraps(method)
    def call(self, *args, **named):
        leaves, form = jax.tree.flatten((args, named))
        # arrays alone can be arguments of a program that is kept
        known = leaves and all(map(_known, leaves)) and _ids(named.get("segments"))
        # a program is kept for equal fields, not for one object: `_lasting`
        function = _function(self) if known else None
        with _forward_mode_refused(type(self).__name__):
            if function is None:
                return method(self, *args, **named)
            result, asked = _program(function[0], method, form, function[1], *leaves)
        for question in asked:
            question.answer()
        return result

    return call


@contextlib.contextmanager
def _forward_mode_refused(name: str):
    """Says in a sentence what jax says of functions that have a backward pass of their
    own, where jax says it at once."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise NotImplementedError(
            f"forward-mode derivatives (jvp, linearize, hessian): {name} has a backward"
            " pass only, expected implementation='dense' of Softmax or Landmark, or"
            " reverse mode (grad, vjp)"
        ) from error


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _program(attention, method, form, variables, *leaves):
    """The method's result, and the questions that were asked on the way."""
    asked: list = []
    # what `refuse` asks while this is traced comes out with the result, as arrays
    token = _questions.set(asked)
    args, named = jax.tree.unflatten(form, leaves)
    try:
        if variables is None:
            return method(attention, *args, **named), tuple(asked)
        how = {"method": method.__name__, **named}
        return attention.apply(variables, *args, **how), tuple(asked)
    finally:
        _questions.reset(token)


def _function(attention: Any) -> tuple[Any, Any] | None:
    """What a program can be kept for, and its variables, None if it has none; None for
    parameters that are being made, random numbers of a module and what it hands out."""
    variables, scope = None, getattr(attention, "scope", None)
    if scope is not None:
        if scope.mutable is not False or scope.rngs:
            return None
        attention, variables = alone(attention)
    return (attention, variables) if _lasting(attention) else None


def _known(a: Any) -> bool:
    """Whether it is an array outside of `jit`, of a type that a program keeps as it is;
    below a gradient or `vmap` outside of `jit` there is one."""
    # below `grad` and `vmap` the array that is traced is known
    while isinstance(a, jax.core.Tracer):
        a = getattr(a, "primal", getattr(a, "val", None))
    if not isinstance(a, (jax.Array, np.ndarray)):
        return False
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
        return True
    return jax.dtypes.canonicalize_dtype(a.dtype) == a.dtype


def _ids(segments: Any) -> bool:
    """Whether all that their type can say is held by int32; if not, they are looked at.
    """
    wide = ("uint32", "int64", "uint64")
    return not any(a.dtype in wide for a in jax.tree.leaves(segments))


def _lasting(attention: Any) -> bool:
    """Whether equal fields mean an equal function: they are numbers, names, types and
    frozen dataclasses of these. An array is no key, and a function may find another
    value of a variable outside of it at the next call."""
    values = [getattr(attention, field.name) for field in dataclasses.fields(attention)
              if field.name not in ("parent", "name")]
    return all(map(_constant, values))


def _constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_constant, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # what has no hash is no key of a cache
        return type(value).__hash__ is not None and _lasting(value)
    return value is None or isinstance(value, PLAIN)
