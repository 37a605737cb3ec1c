"""Session: what it writes is what `generate` writes, and a turn reads what is new."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.adakv import AdaKV
from attn.lightning import Lightning
from attn.retrieval import Retrieval
from attn.snapkv import SnapKV
from attn.softmax import Softmax
from models import session as sessions
from models.generate import generate
from models.lm import LM
from models.sampling import Sampling
from models.session import Session

MODEL = LM(vocab=13, width=16, heads=2, attention=(Lightning(), Softmax()))
PARAMS = jax.tree.map(
    lambda a: a * 3,
    jax.jit(MODEL.init)(jax.random.key(1), jnp.zeros((1, 4), jnp.int32)),
)
TEXT = [1, 2, 3, 4, 5, 6, 7, 1, 9]
WANT = generate(MODEL, PARAMS, [TEXT], length=20)[0]


def written(session, length, row=0, **options):
    return [t for piece in session.write(length, **options) for t in piece[row]]


def test_it_writes_what_generate_writes():
    session = Session(MODEL, PARAMS, chunk=4)
    session.read(TEXT[:3], room=30)
    session.read(TEXT[3:], room=24)
    assert written(session, 20) == WANT
    assert session.ids == TEXT + WANT
    stop = WANT[7]
    again = Session(MODEL, PARAMS)
    again.read(TEXT, room=20)
    assert written(again, 20, stop=[stop]) == WANT[: WANT.index(stop)]


@pytest.mark.parametrize("policy", [
    SnapKV(capacity=6, window=2), AdaKV(capacity=6, window=2),
    Retrieval(sinks=1, recent=3, top_k=2, index="flat"),
], ids=lambda policy: type(policy).__name__)
def test_a_cache_that_drops_tokens_has_room_for_what_follows(policy):
    """13 tokens are read as 16, and 3 more fill the 16 that are then asked for."""
    model = MODEL.clone(attention=(Lightning(), policy))
    for many in (13, 17):
        session = Session(model, PARAMS)
        text = [1 + n % 12 for n in range(many)]
        session.read(text, room=3)
        assert len(written(session, 3)) == 3


def test_rows_that_go_on_alone_keep_their_lengths():
    session = Session(MODEL, PARAMS)
    session.read(TEXT, room=20)
    both = session.fork(2)
    both.ids = both.ids[:-2]  # as if the first row had ended earlier
    written(both, 10)
    with pytest.raises(ValueError, match="of which 19 are taken"):
        written(both, 20)


def test_a_turn_reads_what_is_new(monkeypatch):
    read, counts = sessions.read, []

    def counted(*args):
        counts.append(int(np.asarray(args[-1]).sum()))
        return read(*args)

    monkeypatch.setattr(sessions, "read", counted)
    session = Session(MODEL, PARAMS)
    assert session.follow(TEXT, room=8) == 9
    new = written(session, 5)
    turn = [*TEXT, *new, 4, 5]
    assert session.follow(turn, room=4) == 2 and counts == [9, 2]
    assert written(session, 4) == generate(MODEL, PARAMS, [turn], length=4)[0]
    # another text is read from its beginning, and so is one that needs more room
    assert session.follow([5, 5], room=4) == 2 and session.ids == [5, 5]
    assert session.follow([5, 5, 1], room=200) == 3 and counts[-1] == 3
    assert written(session, 3) == generate(MODEL, PARAMS, [[5, 5, 1]], length=3)[0]


def test_one_reading_of_many_samples():
    session = Session(MODEL, PARAMS)
    session.read(TEXT, room=20)
    three, hot = session.fork(3), Sampling(1.0)
    rows = [[], [], []]
    for piece in three.write(12, hot):
        for row, more in zip(rows, piece):
            row += more
    assert len({*map(tuple, rows)}) == 3
    assert written(session, 20) == WANT  # the first is as it was
    assert written(session.fork(2), 3, row=1) == generate(
        MODEL, PARAMS, [session.ids], length=3)[0]
    with pytest.raises(ValueError, match="room for 32 tokens, of which 29 are taken"):
        written(session, 4)


def test_what_cannot_be_read():
    session = Session(MODEL, PARAMS, limit=10)
    for ids, words in (([], "the prompt is empty"), ([13], "token 13"),
                       ([1] * 11, "a text of 11 tokens: expected at most 10")):
        with pytest.raises(ValueError, match=words):
            session.read(ids)
    with pytest.raises(ValueError, match="nothing was read"):
        next(session.write(3))
    session.read(TEXT)
    assert len(written(session, 9)) == 1  # the limit
    with pytest.raises(ValueError, match="of one row"):
        session.fork(2).fork(2)
    learned = MODEL.clone(learned=12)
    with pytest.raises(ValueError, match="at most 12 together"):
        generate(learned, PARAMS, [TEXT], length=4)
