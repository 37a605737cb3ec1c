"""Segments: positions and runs against a loop, whole and in pieces."""

import jax.numpy as jnp
import numpy as np
import pytest

from attn.segments import place


def by_loop(row):
    """(pos, run) of each token, (end, last) of the row."""
    pos, run, last, count, end = [], [], -1, 0, 0
    for segment in row:
        if segment == 0:
            pos.append(0)
            run.append(0)
            continue
        if segment != last:
            count, end, last = count + 1, 0, segment
        pos.append(end)
        run.append(count)
        end += 1
    return pos, run, end, last


def random_rows(seed, b=6, t=17):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(b):
        ids = np.repeat(rng.integers(1, 5, t), rng.integers(1, 6, t))[:t]
        rows.append(np.where(rng.random(t) < 0.25, 0, ids))
    return np.array(rows)


@pytest.mark.parametrize("seed", range(8))
def test_against_a_loop(seed):
    rows = random_rows(seed)
    found = place(jnp.asarray(rows), *rows.shape)
    for b, row in enumerate(rows):
        pos, run, end, last = by_loop(row.tolist())
        assert found.pos[b].tolist() == pos
        assert (int(found.end[b]), int(found.last[b])) == (end, last)
        ours = found.run[b].tolist()
        same = lambda r: [[x == y for y in r] for x in r]
        assert same(ours) == same(run)
        assert (np.diff([r for r in ours if r]) >= 0).all()


@pytest.mark.parametrize("seed", range(8))
def test_in_pieces(seed):
    rows = random_rows(seed)
    whole = place(jnp.asarray(rows), *rows.shape)
    cuts = sorted({0, 17, *np.random.default_rng(seed + 50).integers(1, 17, 3)})
    end = last = None
    for a, b in zip(cuts, cuts[1:]):
        piece = place(jnp.asarray(rows[:, a:b]), len(rows), int(b - a), end, last)
        assert (piece.pos == whole.pos[:, a:b]).all()
        end, last = piece.end, piece.last
    assert (end == whole.end).all() and (last == whole.last).all()


def test_without_segments_time_goes_on():
    first = place(None, 2, 5)
    assert first.pos.tolist() == [[0, 1, 2, 3, 4]] * 2 and (first.run == 1).all()
    then = place(None, 2, 3, first.end, first.last)
    assert then.pos.tolist() == [[5, 6, 7]] * 2
    # an id equal to the one so far goes on, another begins
    same = place(jnp.array([[1, 2]]), 1, 2, first.end[:1], first.last[:1])
    assert same.pos.tolist() == [[5, 0]] and same.run.tolist() == [[1, 7]]


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"segments has shape \(2, 3\)"):
        place(jnp.ones((2, 3), jnp.int32), 2, 4)
