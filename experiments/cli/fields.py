"""Fields: what a dataclass can be given, and values coerced to what a field asks for.

Only harmless changes are made: int to float, str to Path, list to tuple. Everything
else that does not fit is refused in one sentence.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import pathlib
import re
import types
import typing
from typing import Any


class Unfit(Exception):
    """The value is not of the annotated type."""


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Field name -> annotation. Empty, so that nothing is checked, for a class whose
    annotations name what only type checkers import."""
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return {}


def coerce(value: Any, hint: Any, where: str, written: str | None = None) -> Any:
    """`value` as the annotation `hint` has it.

    Raises ValueError, which starts with `where` and shows the value as `written`.
    """
    try:
        return _coerce(value, hint)
    except Unfit:
        shown = repr(value) if written is None else written
        raise ValueError(f"{where}={shown}: expected {spelled(hint)}") from None


def spelled(hint: Any) -> str:
    """An annotation as people write it: `int | None`, `tuple[Mask, ...]`."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return re.sub(r"[A-Za-z_][\w.]*\.(\w+)", r"\1", str(hint))


def _coerce(value: Any, hint: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _coerce_one_of(value, args)
    if origin is typing.Literal:
        return _keep(value, any(type(value) is type(a) and value == a for a in args))
    if origin is typing.Annotated:
        return _coerce(value, args[0])
    if origin is tuple or hint is tuple:
        return _coerce_tuple(value, args)
    if hint is Any:
        return value
    if hint is None:
        return _keep(value, value is None)
    if hint is float and type(value) is int:
        return float(value)  # of 64 bits: `parse` takes no larger one
    if hint is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    if hint is collections.abc.Callable or origin is collections.abc.Callable:
        return _keep(value, callable(value))
    cls = hint if origin is None else origin
    if not isinstance(cls, type) or getattr(cls, "_is_protocol", False):
        return value  # a type variable, a protocol: nothing to check against
    if isinstance(value, bool) and cls in (int, float):
        raise Unfit
    return _keep(value, isinstance(value, cls))


def _keep(value: Any, fits: bool) -> Any:
    if not fits:
        raise Unfit
    return value


def _coerce_one_of(value: Any, options: tuple) -> Any:
    # an exact type first, so that 1 stays an int in `float | int`
    for option in sorted(options, key=lambda o: o is not type(value)):
        try:
            return _coerce(value, option)
        except Unfit:
            continue
    raise Unfit


def _coerce_tuple(value: Any, args: tuple) -> tuple:
    if not isinstance(value, (tuple, list)):
        raise Unfit
    if not args:
        return tuple(value)
    if args[-1] is Ellipsis:
        args = args[:1] * len(value)
    if len(args) != len(value):
        raise Unfit
    return tuple(_coerce(v, a) for v, a in zip(value, args))


def construct(cls: type, args: list, keywords: dict[str, Any]) -> Any:
    """`cls(*args, **keywords)`, every value checked against its field's annotation."""
    fields = written_fields(cls)
    names = [f.name for f in fields]
    places = [f.name for f in fields if not f.kw_only]
    title = cls.__name__
    if len(args) > len(places):
        most = f"at most {len(places)} ({', '.join(places)})" if places else "none"
        raise ValueError(f"{title}: {len(args)} values without a name: expected {most}")
    given = dict(zip(places, args))
    for name, value in keywords.items():
        if name not in names:
            raise ValueError(unknown(f"{title}: field", name, names))
        if name in given:
            raise ValueError(f"{title}: {name} is given twice")
        given[name] = value
    for field in fields:
        if field.name not in given and required(field):
            raise ValueError(f"{title}: {field.name} is missing: it has no default")
    known = hints(cls)
    typed = {n: coerce(v, known.get(n, Any), f"{title}: {n}") for n, v in given.items()}
    try:
        return cls(**typed)
    except (ValueError, NotImplementedError):
        raise
    except Exception as error:  # a class that was not asked for such a value
        raise ValueError(f"{title}: {error}") from error


def required(field: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def default(field: dataclasses.Field) -> Any:
    """A field's default value."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def written_fields(cls: type) -> list[dataclasses.Field]:
    """The fields that a reader writes: a linen module's `parent` and `name` are not."""
    linen = any(c.__module__ == "flax.linen.module" for c in cls.__mro__)
    hidden = ("parent", "name") if linen else ()
    return [f for f in dataclasses.fields(cls) if f.init and f.name not in hidden]


def unknown(what: str, name: str, there_is: collections.abc.Iterable[str]) -> str:
    """The sentence for a name that is not there: the nearest one, and what there is."""
    there_is = sorted(there_is)
    plain = {n.lower(): n for n in there_is}
    near = difflib.get_close_matches(name.lower(), plain, n=1, cutoff=0.5)
    hint = f": did you mean {plain[near[0]]}?" if near else ";"
    return f"{what} {name} is not known{hint} there is {', '.join(there_is) or 'none'}"
