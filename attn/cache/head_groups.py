"""Head groups: key heads of one layer that remember in different ways.

Which heads is known before anything is traced, so each group has a memory of its own,
of its own size: what one group holds less is memory that is not there. Queries, keys
and values are dealt to the groups and what they find is put back in order.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attn.cache import kv as caches
from attn.contract.attention import takes_rope
from attn.contract.shapes import check
from attn.masks import Causal, Mask
from attn.parallel.sharding import mesh_of


class Grouped(NamedTuple):
    """The memory of heads that hold all tokens, None if there are none, and that of
    those that hold few, None if there are none."""

    whole: Any
    few: Any

    @property
    def k(self) -> jax.Array:
        """[B,C,K',D] of the heads that hold all tokens, or else of the others."""
        return (self.few if self.whole is None else self.whole).k

    @property
    def end(self) -> jax.Array:
        """[B] int32: the next token's position."""
        return (self.few if self.whole is None else self.whole).end

    @property
    def segment(self) -> jax.Array:
        """[B] int32: the last token's segment, -1 before the first."""
        return (self.few if self.whole is None else self.whole).segment


@dataclasses.dataclass(frozen=True)
class MaskOfHeads(Mask):
    """What `mask` shows to the query heads `heads`, which are counted from 0 here."""

    mask: Mask
    heads: tuple[int, ...]

    def __call__(self, h, i, j):
        return self.mask(true_head(h, self.heads), i, j)

    def bounds(self, i, j):
        return self.mask.bounds(i, j)  # they hold for every head

    def reach(self):
        return self.mask.reach()


@dataclasses.dataclass(frozen=True)
class ScoreOfHeads:
    """`score` of the query heads `heads`, which are counted from 0 here."""

    score: Callable
    own: tuple[int, ...]

    def __call__(self, h, i, j):
        return self.score(true_head(h, self.own), i, j)


def true_head(h, heads: tuple[int, ...]):
    """The number of head h of `heads`, by comparisons, as kernels have no tables."""
    return sum((h == n) * head for n, head in enumerate(heads))


def check_shared(owner: Any, part: Any, fields: dict[str, Any]) -> None:
    """Raises ValueError for a field of `part` that is set, but not as `fields` {name:
    value} of its owner, which stand for it. mask: None is `Causal()`."""
    for field in dataclasses.fields(part):
        if field.name not in fields:
            continue
        own, value = getattr(part, field.name), fields[field.name]
        plain = field.default
        if field.name == "mask":
            own, value, plain = (
                Causal() if a is None else a for a in (own, value, plain))
        if own != plain and own != value:
            raise ValueError(
                f"{type(owner).__name__}: {field.name}={fields[field.name]} stands for "
                f"{type(part).__name__} too, which has {field.name}={own}: expected it "
                f"in {type(owner).__name__} alone"
            )


class HeadGroups:
    """What stands before `Softmax` among the bases of a policy with a field
    `retrieval`: the numbers of the key heads that hold all tokens. `few(heads)` is the
    attention of the others, of query heads with these numbers. whole_as: how those
    that hold all tokens store and read them, None for as they are: a storage or a
    reading with the fields of `Softmax`, or a `Compose` of these."""

    part = "selection"
    retrieval: Any
    whole_as: Any = None

    def few(self, heads: tuple[int, ...]) -> Any:
        """The attention of the key heads that hold few tokens."""
        raise NotImplementedError(f"{type(self).__name__} says no attention of few")

    def exact(self: Any, heads: tuple[int, ...]) -> Any:
        """Exact attention, as Softmax(**fields)."""
        raise NotImplementedError(f"{type(self).__name__} says no attention of all")

    def whole(self: Any, heads: tuple[int, ...]) -> Any:
        """The attention of the key heads that hold all tokens."""
        if self.whole_as is None:
            return self.exact(heads)
        return dataclasses.replace(self.whole_as, **self.shared(heads))

    def check_retrieval(self: Any) -> None:
        """Raises ValueError unless `retrieval` is a tuple of different numbers."""
        heads = self.retrieval
        fits = isinstance(heads, tuple) and all(
            isinstance(h, (int, np.integer)) and h >= 0 for h in heads)
        if not fits or len(set(heads)) < len(heads):
            raise ValueError(
                f"{type(self).__name__}: retrieval={heads!r}: expected a tuple of "
                "different numbers of key heads, as (0, 3)"
            )
        if self.whole_as is not None:
            self._check_whole()

    def _check_whole(self: Any) -> None:
        """Raises ValueError unless `whole_as` can have the fields that groups share."""
        given = self.whole_as
        kind = given.__name__ if isinstance(given, type) else type(given).__name__
        what = f"{type(self).__name__}: whole_as={kind}"
        if takes_rope(given):
            raise ValueError(
                f"{what} turns keys itself: expected one that does not, as KIVI()")
        place, made = getattr(given, "part", None), dataclasses.is_dataclass(given)
        fits = made and place in ("storage", "reading", "policy")
        if isinstance(given, type) or not fits:
            shown = f"{what}, a class" if isinstance(given, type) else what
            raise ValueError(f"{shown}: expected a storage or a reading, as KIVI()")
        if getattr(given, "selection", None) is not None:
            raise ValueError(
                f"{what} with selection={given.selection}: these heads hold all "
                "tokens, expected None"
            )
        shared = self.shared((0,))
        lost = shared.keys() - {field.name for field in dataclasses.fields(given)}
        if lost:
            raise ValueError(
                f"{what} has no {sorted(lost)[0]}, which heads share: expected "
                f"Compose({place}={kind}(...))"
            )
        check_shared(self, given, self.shared_fields)
        dataclasses.replace(given, **shared)  # which it may refuse

    @property
    def shared_fields(self: Any) -> dict[str, Any]:
        """The fields of exact attention that groups share, for all heads."""
        return {"mask": self.mask, "score": self.score, "scale": self.scale,
                "axis": self.axis, "softcap": self.softcap, "exchange": self.exchange,
                "implementation": self.implementation}

    def shared(self: Any, heads: tuple[int, ...]) -> dict[str, Any]:
        """The fields of exact attention that groups share, for query heads `heads`."""
        # one that is the same for all heads stays what others know it as
        mask = self.mask if self.visible == Causal() else MaskOfHeads(self.mask, heads)
        score = None if self.score is None else ScoreOfHeads(self.score, heads)
        return {**self.shared_fields, "mask": mask, "score": score}

    def groups(self: Any, q, k) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """(attention, its key heads, its query heads) of both groups, None without."""
        h, heads = q.shape[2], k.shape[2]
        if any(n >= heads for n in self.retrieval):
            raise ValueError(
                f"{type(self).__name__}: retrieval={self.retrieval}: k has K={heads} "
                "heads, expected numbers below"
            )
        found = []
        for whole in (True, False):
            own = [n for n in range(heads) if (n in self.retrieval) == whole]
            # key head n is read by the query heads n G, ..., n G + G - 1
            asked = [n * (h // heads) + g for n in own for g in range(h // heads)]
            made = None
            if own:
                made = self.whole(tuple(asked)) if whole else self.few(tuple(asked))
            found.append((made, np.array(own, int), np.array(asked, int)))
        return found

    def init_state(self: Any, size, q, k, v, *, x=None):
        """An empty memory for `size` tokens of each group."""
        caches.check_size(size)

        # the shape of the heads `at` of a [B,T,H|K,.]
        def of(a, at):
            return jax.ShapeDtypeStruct((*a.shape[:2], len(at), a.shape[3]), a.dtype)

        return Grouped(*(
            None if own is None else own.init_state(
                size, of(q, asked), of(k, at), of(v, at))
            for own, at, asked in self.groups(q, k)))

    def step(
        self: Any, state, q, k, v, *, x=None, segments=None, bias=None, sink=None,
        **unknown,
    ):
        """The next T tokens -> state, [B,T,H,V]: each group goes on with its own."""
        check(q, k, v, segments=segments, aligned=True, piece=True)
        self._check_heads(q)
        if self.axis is not None and mesh_of(self.axis).shape.get("model", 1) > 1:
            raise NotImplementedError(
                f"step: {type(self).__name__} over the mesh axis 'model': its heads "
                "hold different numbers of tokens, expected one device of that axis"
            )
        states: list[Any] = []
        outs, order, groups = [], [], self.groups(q, k)
        if [own is None for own in state] != [made is None for made, *_ in groups]:
            raise ValueError(
                f"the state holds heads for retrieval={self.retrieval} of another "
                f"number of key heads: expected one for k {k.shape}"
            )
        for own, (attention, at, asked) in zip(state, groups):
            if attention is None:
                states.append(None)
                continue
            given = dict(unknown, segments=segments, bias=bias)
            if sink is not None:
                given["sink"] = sink[asked]
            own, o = attention.step(
                own, q[:, :, asked], k[:, :, at], v[:, :, at], **given)
            states.append(own)
            outs.append(o)  # [B,T,H',V] of this group
            order.append(asked)
        # from the order of groups to that of heads
        back = np.argsort(np.concatenate(order))
        return Grouped(*states), jnp.concatenate(outs, 2)[:, :, back]  # [B,T,H,V]
