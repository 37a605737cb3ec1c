"""The content of a traced program: all that a compiler reads in it, as plain values.

Operations stand in order with their parameters, types and operands, these by number;
programs inside of them, constants and the objects that jax keeps there are taken apart
down to numbers, words and types. What only says how a program was written is left out:
files, lines, addresses, and the names of Python functions, variables and our classes.

A kind of value that is not known here raises TypeError: dropped without a word, it
would make two programs one.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import enum
import functools
import hashlib
import itertools
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import AbstractMesh, Mesh, NamedSharding

# what says how a program was written, or how to differentiate what is not any more
UNSEEN = {
    "jit": {"name"}, "pjit": {"name"}, "closed_call": {"name"},
    "custom_vjp_call": {"fwd_jaxpr_thunk", "bwd", "out_trees", "symbolic_zeros"},
    "custom_jvp_call": {"jvp_jaxpr_fun", "symbolic_zeros"},
    "custom_vmap_call": {"rule", "in_tree", "out_tree"},
    "BlockMapping": {"origin", "debug"},
    "GridMapping": {"debug"},
    "pallas_call": {"debug"},
    "mpmd_map": {"debug"},
}
EVERYWHERE = {"debug_info", "source_info", "src_info", "name_stack"}
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))


def short(content: Any) -> str:
    """16 hexadecimal digits of what `Walk` returns."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


class Walk:
    """What a jaxpr and the parameters of its operations hold, as nested tuples of plain
    values; one jaxpr that occurs often is walked once."""

    def __init__(self):
        self.seen: dict[int, tuple[Any, Any]] = {}

    def __call__(self, x: Any, where: str = "") -> Any:
        """The content of `x`; where: what it is a part of, for the error."""
        kind: Any = type(x)
        content = _content(kind)
        if content is not None:
            return content(self, x, where)
        names = _field_names(x)
        if names is None:
            raise TypeError(f"{where}: no digest of {type(x)}: {x!r:.200}")
        hidden = EVERYWHERE | UNSEEN.get(type(x).__qualname__, set())
        return _theirs(type(x)), [(name, self(getattr(x, name), f"{where}.{name}"))
                                  for name in names if name not in hidden]

    def program(self, x: Any, where: str) -> tuple:
        """A digest of its own, and the arrays that it closes over; from jax 0.11 one
        class is both the open and the closed form."""
        inner = getattr(x, "jaxpr", x)
        consts = list(getattr(x, "consts", ()))
        own = self.once(inner, lambda: short(self.operations(inner)))
        return own, self(consts, f"{where} constants")

    def once(self, x: Any, content: Callable[[], Any]) -> Any:
        """content(), made once for one x."""
        if id(x) not in self.seen:
            # x is kept, so that nothing else gets its id
            self.seen[id(x)] = x, content()
        return self.seen[id(x)][1]

    def operations(self, x: core.Jaxpr) -> tuple:
        """Operations in order, their operands by number."""
        numbers: dict[Any, int] = {}

        def atom(v):
            if isinstance(v, core.Literal):
                aval: Any = v.aval
                a = np.asarray(v.val, aval.dtype)
                return self(aval, "literal"), self.array(a, "literal")
            return numbers[v]

        def born(v):
            numbers[v] = len(numbers)
            return self.once(v.aval, lambda: short(self(v.aval, "variable")))

        into = [[born(v) for v in vs] for vs in (x.constvars, x.invars)]
        done = [self.operation(eqn, atom, born) for eqn in x.eqns]
        return into, done, [atom(v) for v in x.outvars]

    def operation(self, eqn: core.JaxprEqn, atom: Callable, born: Callable) -> tuple:
        """One operation with its parameters, operands and results."""
        name = eqn.primitive.name
        params = sorted((key, value) for key, value in eqn.params.items()
                        if key not in EVERYWHERE | UNSEEN.get(name, set()))
        told = [(key, self(value, f"{name}.{key}")) for key, value in params]
        ctx = [self(getattr(eqn.ctx, key, None), key)
               for key in ("compute_type", "threefry_partitionable", "xla_metadata")]
        return (name, told, ctx, [atom(v) for v in eqn.invars],
                [born(v) for v in eqn.outvars])

    def array(self, x: Any, where: str) -> tuple:
        """An array by its bytes."""
        a = np.asarray(x)
        data = hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()
        return "array", str(a.dtype), a.shape, data

    def sequence(self, x: Any, where: str) -> tuple:
        """A tuple or a list, named or not."""
        return tuple(self(a, where) for a in x)

    def mapping(self, x: Any, where: str) -> tuple:
        """What stands by which key, in whatever order."""
        pairs = ((self(key, where), self(value, where)) for key, value in x.items())
        return tuple(sorted(pairs, key=repr))

    def unordered(self, x: Any, where: str) -> tuple:
        """A set."""
        return tuple(sorted((self(a, where) for a in x), key=repr))

    def tree(self, x: Any, where: str) -> tuple:
        """How a tree of arrays is nested; tuples are alike whatever they are called."""
        data = x.node_data()
        if data is None:
            return "leaf",
        kind, more = data
        named = hasattr(kind, "_fields")
        children = tuple(self.tree(child, where) for child in x.children())
        return _theirs(kind), None if named else self(more, where), children

    def mesh(self, x: Any, where: str) -> tuple:
        """Axes; of a mesh of devices, too, since which they are is the target's."""
        return "mesh", self((x.axis_names, x.axis_sizes, x.axis_types), where)

    def sharding(self, x: Any, where: str) -> tuple:
        """How an array lies on a mesh."""
        spec = tuple(x.spec)
        return "sharding", self.mesh(x.mesh, where), self(spec, where), x.memory_kind


def _field_names(x: Any) -> list[str] | None:
    """The fields of an object that has nothing beside them; None for any other."""
    if dataclasses.is_dataclass(x):
        return [field.name for field in dataclasses.fields(x)]
    own = [vars(kind)["__slots__"] for kind in type(x).__mro__
           if "__slots__" in vars(kind)]
    ours = type(x).__module__.partition(".")[0] not in ("jax", "jaxlib")
    if callable(x) and ours or not own and not hasattr(x, "__dict__"):
        return None
    names = {*itertools.chain(*own), *getattr(x, "__dict__", {})}
    return sorted(names - {"__weakref__", "__dict__"})


def _theirs(kind: type) -> str:
    """The name of a type of jax or Python: ours may be called anything."""
    ours = kind.__module__.partition(".")[0] not in ("jax", "jaxlib", "builtins")
    return "" if ours or hasattr(kind, "_fields") else kind.__qualname__


def _named(walk: Walk, x: Any, where: str) -> tuple:
    return type(x).__qualname__, x.name


def _dtype(walk: Walk, x: Any, where: str) -> str:
    return str(jnp.dtype(x))


def _itself(walk: Walk, x: Any, where: str) -> Any:
    return x


def _scalar(walk: Walk, x: Any, where: str) -> Any:
    return x.item()


def _dtype_or_kind(walk: Walk, x: type, where: str) -> str:
    try:
        return str(jnp.dtype(x))
    except TypeError:
        return _theirs(x)


def _tracer(walk: Walk, x: Any, where: str) -> tuple:
    # closed over by an inner program, and an operand of what runs it
    return "operand", walk(x.aval, where)


def _struct(walk: Walk, x: Any, where: str) -> tuple:
    return tuple(x.shape), str(x.dtype)


# the first kind that fits gives the content
KINDS: list[tuple[Any, Callable[[Walk, Any, str], Any]]] = [
    (enum.Enum, _named),
    (PLAIN, _itself),
    ((core.ClosedJaxpr, core.Jaxpr), Walk.program),
    (jax.core.Tracer, _tracer),
    (np.generic, _scalar),
    ((np.ndarray, jax.Array), Walk.array),
    (np.dtype, _dtype),
    (type, _dtype_or_kind),
    ((tuple, list), Walk.sequence),
    (collections.abc.Mapping, Walk.mapping),
    ((set, frozenset), Walk.unordered),
    (jax.ShapeDtypeStruct, _struct),
    (type(jax.tree.structure(None)), Walk.tree),
    ((Mesh, AbstractMesh), Walk.mesh),
    (NamedSharding, Walk.sharding),
]


@functools.cache
def _content(kind: type) -> Callable[[Walk, Any, str], Any] | None:
    """How a kind of value is walked; None for objects that are walked by fields."""
    return next((content for kinds, content in KINDS if issubclass(kind, kinds)), None)
