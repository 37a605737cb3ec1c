"""Session: a text that goes on; it is read again only when its room is used up.

    session = Session(model, params)
    session.read(prompt, room=200)                 # token ids
    for piece in session.write(200, Sampling(0.7), stop=[2]):
        ...                                        # a few new ids, for each row
    session.read(next_turn, room=200)              # goes on behind what was written
    four = session.fork(4)                         # one state, four samples

Reading is compiled once a length, rounded up to a power of two, and writing once; the
state is handed from call to call without a copy.
"""

from __future__ import annotations

from typing import Any, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.generate import Written, bucket, ids_of, key_of, new_tokens, read, stops
from models.generate import write
from models.sampling import Sampling

PIECE = 8  # tokens that are drawn before they are shown


class Session:
    """A model, its parameters and what it has read and written.

    ids: the tokens [T] that its state holds, of its first row; taken: how many the
    longest row has; logits [B,vocab]: of the next one. chunk: how many tokens are read
    at once; limit: the longest text, None for any.
    """

    def __init__(
        self, model: Any, params: Any, *, chunk: int = 512, limit: int | None = None
    ):
        self.model, self.params, self.chunk, self.limit = model, params, chunk, limit
        self.ids: list[int] = []
        self.rows, self.taken = 1, 0
        self._state: Any = None
        self.logits: Any = None
        self._size = 0

    def read(self, ids: Sequence[int], room: int = 0, spare: int = 0) -> int:
        """Reads the next tokens, and keeps room for so many more -> how many were read,
        which is the whole text if the room was used up. spare: what room is then made
        beyond the one that is asked for. ValueError for no tokens, ids outside of the
        vocabulary and a text beyond the limit."""
        if len(ids) == 0:
            raise ValueError("the prompt is empty: expected one token or more")
        new = ids_of(ids, 0, self.model.vocab).tolist()
        whole, taken = self.ids + new, self.taken + len(new)
        if self.limit is not None and taken > self.limit:
            raise ValueError(f"a text of {taken} tokens: expected at most "
                             f"{self.limit}, the length of the model")
        need = taken + max(room, 1)
        if self._state is None or need > self._size:
            if self.rows > 1 and self.ids:
                raise ValueError("forked texts cannot grow beyond the room that was "
                                 "kept: expected a larger room before the fork")
            self._begin(whole, max(room, 1) + spare)
            new = whole
        self._read(new)
        self.ids, self.taken = whole, taken
        return len(new)

    def follow(self, ids: Sequence[int], room: int = 0, spare: int = 0) -> int:
        """Reads what `ids`, a whole text, have behind what the state holds, or all of
        it if the state holds something else -> how many tokens were read."""
        text = list(ids)
        if text[: len(self.ids)] != self.ids or len(text) == len(self.ids):
            self.ids, self.taken, self._state = [], 0, None
        return self.read(text[len(self.ids):], room, spare)

    def write(
        self, length: int, how: Sampling = Sampling(), stop: Any = (), seed: int = 0
    ) -> Iterator[list[list[int]]]:
        """Draws up to `length` tokens, without the stop token that ends a row, and
        gives them a few at a time, a list a row."""
        if self._state is None:
            raise ValueError("nothing was read: expected a prompt before what follows")
        how, key, ends = how.checked(), key_of(seed), stops(stop)
        left = length if self.limit is None else min(
            length, self.limit - self.taken)
        if self.taken + left > self._size:
            raise ValueError(f"length={length}: there is room for {self._size} tokens, "
                             f"of which {self.taken} are taken: expected a larger "
                             "`room` when the prompt was read")
        ended = np.zeros(self.rows, bool)
        for n in range(-(-left // PIECE)):
            found = self._drawn(min(PIECE, left - n * PIECE), how, ends,
                                jax.random.fold_in(key, n))
            pieces = [[] if over else new
                      for over, new in zip(ended, new_tokens(found))]
            self.ids += pieces[0]
            self.taken += max(map(len, pieces))
            ended |= np.asarray(found.done)
            yield pieces
            if ended.all():
                return

    def fork(self, rows: int) -> Session:
        """A session of so many rows that all go on from this one's text; this one stays
        as it is."""
        if self.rows != 1 or self._state is None:
            raise ValueError("fork: expected a session of one row that has read a text")
        other = Session(self.model, self.params, chunk=self.chunk, limit=self.limit)
        other.ids, other.taken = list(self.ids), self.taken
        other.rows, other._size = rows, self._size

        def repeated(a):
            return jnp.repeat(a, rows, 0)

        other._state, other.logits = jax.tree.map(
            repeated, (self._state, self.logits))
        return other

    def warm(self, length: int, room: int, how: Sampling = Sampling()) -> None:
        """Compiles what a prompt of `length` tokens and writing behind it will run."""
        other = Session(self.model, self.params, chunk=self.chunk, limit=self.limit)
        other._begin([0] * length, max(room, 1))
        other._read([0] * min(length, self.chunk))
        other.compiled(how)

    def compiled(self, how: Sampling) -> None:
        """Compiles writing, and writes nothing."""
        self._drawn(0, how.checked())

    @property
    def state_bytes(self) -> int:
        """Bytes of the state, of all rows."""
        return sum(a.nbytes for a in jax.tree.leaves(self._state))

    def _begin(self, ids: Sequence[int], room: int) -> None:
        """An empty state for `ids` and `room` tokens behind them, or more."""
        size = bucket(len(ids) + room)
        if self.limit is not None:
            size = min(size, self.limit)
        t = min(bucket(len(ids)), self.chunk)
        prompt = -(-len(ids) // t) * t
        # a cache that drops tokens has room for those behind the prompt alone: few
        # lengths, so that few programs are compiled, unless that takes from the room
        prompt = prompt if prompt + room <= size else len(ids)
        like = jax.ShapeDtypeStruct((1, prompt), jnp.int32)
        self._state, self._size = self.model.init_state(size, like), size
        self.logits = jnp.zeros((1, self.model.vocab), jnp.float32)

    def _drawn(
        self, length: int, how: Sampling, stop: Sequence[int] = (), key: Any = None
    ) -> Written:
        """The next `length` tokens, at most PIECE."""
        # of stop tokens as many as a power of two, so that few programs are compiled
        padded = np.full(bucket(max(len(stop), 1), 4), -1, np.int32)
        padded[: len(stop)] = stop
        found = write(
            self.model, how, PIECE, self.params, self._state, self.logits,
            key_of(0) if key is None else key, padded, length,
        )
        self._state, self.logits = found.state, found.logits
        return found

    def _read(self, ids: Sequence[int]) -> None:
        t = min(bucket(len(ids)), self.chunk)
        for at in range(0, len(ids), t):
            piece = ids[at:at + t]
            tokens = np.zeros((self.rows, t), np.int32)
            tokens[:, : len(piece)] = piece
            real = np.broadcast_to((np.arange(t) < len(piece)), tokens.shape)
            self._state, self.logits = read(
                self.model, self.params, self._state, self.logits, tokens,
                real.astype(np.int32),
            )
