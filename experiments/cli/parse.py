"""Parse: text as values, as they are printed: `(Lightning(), Softmax()) * 2`.

The text is read with `ast`, never evaluated. It holds literals, tuples, lists and
dicts, `+` and `* n` of tuples, `&`, `|` and `~` of masks, element types as
`jnp.bfloat16` or `bfloat16`, and names and calls of dataclasses: a name `Landmark` is
the class `Landmark` in `attn/landmark.py` (or in `models/landmark.py`), a mask, a
mixer, a position, a dataset, or a class of the module that reads.
"""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import functools
import importlib
import math
import operator
import pathlib
import re
import types
from typing import Any

import numpy as np

from experiments.cli.fields import construct, unknown

ROOT = pathlib.Path(__file__).resolve().parents[2]
# every class of these files has a name; of the packages, one class a file
FILES = (
    "attn/cache/host_keys.py",
    "attn/masks.py",
    "attn/miras.py",
    "attn/mixers.py",
    "attn/positions.py",
    "experiments/data/text.py",
    "experiments/data/synthetic.py",
    "experiments/data/majority.py",
)
PACKAGES = ("attn", "models")
LONGEST = 10_000  # elements of a repeated tuple
NUMBERS = {"inf": math.inf, "nan": math.nan}
# element types that go without `jnp.`
DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "int32")
Module = types.ModuleType | None


def parse(text: str, module: Module = None) -> Any:
    """The value that `text` describes; `module` is where unknown names are looked up.

    Raises ValueError, one sentence, for text that cannot be read, a name or a field
    that is not there, and values that a class refuses.
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, module)
    except SyntaxError as error:
        raise ValueError(f"cannot read {text!r}: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"cannot read {text[:40]!r}...: nested too deep") from None
    except OverflowError as error:  # "9" * 5000 and its like
        raise ValueError(f"cannot read {text[:40]!r}...: {error}") from None


def _value(node: ast.AST, module: Module) -> Any:
    read = functools.partial(_value, module=module)
    match node:
        case ast.Constant(value=value) if value is not Ellipsis:
            return _constant(value)
        case ast.Tuple(elts=items):
            return tuple(map(read, items))
        case ast.List(elts=items):
            return list(map(read, items))
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = zip(keys, values)
            return {_key(read(k)): read(v) for k, v in pairs if k is not None}
        case ast.UnaryOp(op=op, operand=operand):
            return _unary(op, read(operand), node)
        case ast.BinOp(left=left, op=op, right=right):
            return _binary(read(left), op, read(right), node)
        case ast.Name(id=name):
            if name in DTYPES:
                return _dtype(name)
            return NUMBERS[name] if name in NUMBERS else find(name, module)
        case ast.Attribute(value=ast.Name(id="jnp"), attr=name):
            return _dtype(name)
        case ast.Call(func=ast.Name(id=name)):
            return _call(name, node, module)
    raise ValueError(f"cannot read {ast.unparse(node)!r}: expected a literal, a tuple, "
                     "or a class with its fields")


def _constant(value: Any) -> Any:
    if type(value) is int and abs(value) >= 2**63:
        raise ValueError(f"{str(value)[:20]}...: expected an integer of 64 bits")
    return value


def _key(value: Any) -> Any:
    if not isinstance(value, collections.abc.Hashable):
        raise ValueError(f"{value!r} cannot be a key: expected a string or a number")
    return value


def _unary(op: ast.unaryop, value: Any, node: ast.AST) -> Any:
    if isinstance(op, ast.USub) and type(value) in (int, float):
        return -value
    if isinstance(op, ast.Invert) and _is_mask(value):
        return ~value
    raise ValueError(f"cannot read {ast.unparse(node)!r}: expected minus a number or "
                     "~ a mask")


def _binary(a: Any, op: ast.operator, b: Any, node: ast.AST) -> Any:
    symbols = {ast.BitAnd: operator.and_, ast.BitOr: operator.or_}
    if type(op) in symbols and _is_mask(a) and _is_mask(b):
        return symbols[type(op)](a, b)
    if isinstance(op, ast.Add) and type(a) in (tuple, list) and type(a) is type(b):
        return operator.add(a, b)
    if isinstance(op, ast.Mult):
        a, b = (b, a) if type(a) is int else (a, b)
        if isinstance(a, (tuple, list)) and type(b) is int:
            if not 0 <= b * max(len(a), 1) <= LONGEST:
                raise ValueError(f"* {b}: expected 0 to {LONGEST} elements in all")
            return a * b
    raise ValueError(f"cannot read {ast.unparse(node)!r}: expected + or * n of tuples, "
                     "or & or | of masks")


def _is_mask(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and hasattr(type(value), "__invert__")


def _dtype(name: str) -> Any:
    jnp = importlib.import_module("jax.numpy")
    value = getattr(jnp, name, None)
    if not isinstance(getattr(value, "dtype", None), np.dtype):
        raise ValueError(f"jnp.{name} is not an element type such as jnp.bfloat16")
    return value


def _call(name: str, node: ast.Call, module: Module) -> Any:
    cls = find(name, module)
    if not dataclasses.is_dataclass(cls):
        raise ValueError(f"{name} is not a class with fields, so it cannot be called")
    args = [_value(a, module) for a in node.args]
    keywords: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in keywords:
            raise ValueError(f"cannot read {ast.unparse(node)!r}: expected each field "
                             "once, as name=value")
        keywords[keyword.arg] = _value(keyword.value, module)
    return construct(cls, args, keywords)


@functools.cache
def names() -> dict[str, str]:
    """Class name -> the module that has it, read off the files without importing."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            for name in _classes(path):
                if name.lower() == path.stem:
                    found.setdefault(name, f"{package}.{path.stem}")
    for file in FILES:
        for name in _classes(ROOT / file):
            module = file.removesuffix(".py").removesuffix("/__init__")
            found.setdefault(name, module.replace("/", "."))
    return found


def _classes(path: pathlib.Path) -> list[str]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return re.findall(r"^class ([A-Z]\w*)", text, re.MULTILINE)


def find(name: str, module: Module = None) -> type:
    """The class called `name`. ValueError, with the nearest name, if there is none."""
    own = {k: v for k, v in vars(module).items() if dataclasses.is_dataclass(v)
           and isinstance(v, type)} if module else {}
    if name in own:
        return own[name]
    if name not in names():
        raise ValueError(unknown("name", name, {*names(), *own}))
    return getattr(importlib.import_module(names()[name]), name)
