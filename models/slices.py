"""Slices: a network cut at its attention, by the graph of what it computes.

Lamina's converter (Chen et al., 2024, arXiv:2405.01814): attention is taken out of the
graph, and what is left falls into slices, one more than there are attentions. From one
slice to the next go the output of attention and a context: the arrays of least bytes
from which all that comes later can be made, which is a minimum cut. Of a block that
norms first that is the residual stream alone, of the first one the tokens. In a slice,
what the query needs comes first, so that it can be sent before the key and the value
are made.

Attention is found by its name: one call of a jitted function `attention_operator`.
"""

from __future__ import annotations

import collections
from typing import Any, Callable, NamedTuple

import jax

OPERATOR = "attention_operator"


class Slice(NamedTuple):
    """first: {array: value} of what is there -> the query; rest: the same -> the key,
    the value (or the outputs, in the last slice) and the context. Arrays are numbers
    of `Graph`."""

    equations: tuple[list, list]
    needs: tuple[list, list]
    gives: tuple[list, list]
    context: list


class Graph:
    """The equations of f(*args), and those of them that are attention.

    f calls attention as a jitted function of the name `attention_operator`, of q, k and
    v; its calls must stand in f itself, not in a loop. free: how many of the flat
    arguments are there in every slice (parameters); the others are the input of the
    first one.
    """

    def __init__(self, f: Callable, *args: Any, free: int):
        closed = jax.make_jaxpr(f)(*args)
        self.jaxpr, self.consts = closed.jaxpr, closed.consts
        self.free = set(self.jaxpr.invars[:free]) | set(self.jaxpr.constvars)
        self.inputs = list(self.jaxpr.invars[free:])
        self.made = {out: eqn for eqn in self.jaxpr.eqns for out in eqn.outvars}
        self.operators = [eqn for eqn in self.jaxpr.eqns
                          if eqn.params.get("name") == OPERATOR]
        if not self.operators:
            raise ValueError(f"the network calls no {OPERATOR}: expected attention "
                             "outside of loops")
        self.slices = self._slices()

    def _slices(self) -> list[Slice]:
        found, there = [], list(self.inputs)
        for eqn in self.operators:
            q, *others = eqn.invars
            context = self.cut(there, eqn)
            early = self._needed([q], there)
            late = [e for e in self._needed([*others, *context], there)
                    if not any(e is a for a in early)]
            found.append(self._slice(there, early, late, [q], others, context))
            there = [*eqn.outvars, *context]
        outs = [v for v in self.jaxpr.outvars]
        last = self._needed(outs, there)
        found.append(self._slice(there, [], last, [], outs, []))
        return found

    def _slice(self, there, early, late, first, others, context) -> Slice:
        between = [v for e in early for v in e.outvars]
        used = {v for e in late for v in _vars(e.invars)} | set(_vars(
            [*others, *context]))
        handed = [v for v in between if v in used and v not in first]
        return Slice((early, late), (there, [*there, *first, *handed]),
                     ([*first, *handed], [*others, *context]), context)

    def _needed(self, wanted: list, there: list) -> list:
        """The equations that make `wanted` of what is there, in their order."""
        stop, seen, ahead = set(there) | self.free, set(), list(_vars(wanted))
        while ahead:
            v = ahead.pop()
            if v in stop or v not in self.made or id(self.made[v]) in seen:
                continue
            eqn = self.made[v]
            if eqn in self.operators:
                raise ValueError(f"a slice asks for the output of another {OPERATOR}: "
                                 "expected layers one behind the other")
            seen.add(id(eqn))
            ahead += _vars(eqn.invars)
        return [e for e in self.jaxpr.eqns if id(e) in seen]

    def cut(self, there: list, operator: Any) -> list:
        """The arrays of least bytes, of those that do not follow from the operator's
        output, of which all that follows from it can be made."""
        late, uses = set(operator.outvars), set()
        begun = False
        for eqn in self.jaxpr.eqns:
            begun |= eqn is operator
            if begun and eqn is not operator and any(
                    v in late for v in _vars(eqn.invars)):
                late |= set(eqn.outvars)
                uses |= {v for v in _vars(eqn.invars) if v not in late}
        uses |= {v for v in _vars(self.jaxpr.outvars) if v not in late}
        # what follows from what is there, and leads to a use
        after = set(there)
        for eqn in self.jaxpr.eqns:
            if eqn not in self.operators and any(
                    v in after for v in _vars(eqn.invars)) and not (
                    set(eqn.outvars) & late):
                after |= set(eqn.outvars)
        uses &= after
        edges: dict[Any, set] = collections.defaultdict(set)
        for eqn in self.jaxpr.eqns:
            if eqn in self.operators:
                continue
            for v in _vars(eqn.invars):
                edges[v] |= {o for o in eqn.outvars if v in after and o in after}
        return _least(there, uses, edges, {v: _bytes(v) for v in after})

    def compiled(self, n: int, part: int) -> Callable:
        """Part 0 or 1 of slice n as a program: (free, what it needs) -> what it
        gives."""
        one = self.slices[n]
        equations, needs, gives = (a[part] for a in one[:3])
        free = [v for v in (*self.jaxpr.constvars, *self.jaxpr.invars)
                if v in self.free]

        part_of_it = self.jaxpr.replace(
            constvars=[], invars=[*free, *needs], outvars=gives, eqns=equations)

        def run(own, given):
            return jax.core.eval_jaxpr(part_of_it, [], *own, *given)

        return jax.jit(run)


def _is_var(v: Any) -> bool:
    return not hasattr(v, "val")


def _vars(atoms: Any) -> list:
    return [v for v in atoms if _is_var(v)]


def _bytes(v: Any) -> int:
    # what is empty is not there for nothing: a cut through it would be no cut
    return 1 + v.aval.size * v.aval.dtype.itemsize


def _least(sources: list, sinks: set, edges: dict, size: dict) -> list:
    """A cut of least size between sources and sinks, of vertices with sizes: each is
    two, joined by its size, and flow is pushed along shortest paths."""
    flow: dict[Any, dict[Any, float]] = collections.defaultdict(dict)

    def join(a, b, n):
        flow[a][b] = flow[a].get(b, 0) + n
        flow[b].setdefault(a, 0)

    start, end, most = "start", "end", float("inf")
    for v in size:
        join((v, 0), (v, 1), size[v])
        for w in edges.get(v, ()):
            join((v, 1), (w, 0), most)
    for v in sources:
        if v in size:
            join(start, (v, 0), most)
    for v in sinks:
        join((v, 1), end, most)

    def reached() -> dict:
        before: dict[Any, Any] = {start: None}
        queue = collections.deque([start])
        while queue:
            a = queue.popleft()
            for b, n in flow[a].items():
                if n > 0 and b not in before:
                    before[b] = a
                    queue.append(b)
        return before

    while end in (before := reached()):
        path, b = [], end
        while before[b] is not None:
            path.append((before[b], b))
            b = before[b]
        n = min(flow[a][b] for a, b in path)
        for a, b in path:
            flow[a][b] -= n
            flow[b][a] += n
    return [v for v in size if (v, 0) in before and (v, 1) not in before]
