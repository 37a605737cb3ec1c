"""Segments: positions of tokens against a plain loop, in one call and in many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.contract.segments import locate

B, T = 6, 20


def rows(seed, t=T):
    """Packed rows [B,t]: a few sequences a row, padding before, between, within."""
    rng = np.random.default_rng(seed)
    out = np.zeros((B, t), np.int32)
    for row in out:
        names = rng.permutation(np.arange(1, 9))[:rng.integers(1, 5)]
        row[:] = np.repeat(names, -(-t // len(names)))[:t]
        row[rng.uniform(size=t) < rng.choice([0, 0.2, 0.8])] = 0
        row[:rng.integers(0, 4)] = 0
        row[t - rng.integers(0, 4):] = 0
    out[rng.integers(B)] = 0
    return out


def loop(segments, end, last):
    """The same as `locate` for one row, one token after the other."""
    pos, run, number = [], [], 1
    for segment in segments:
        if segment == 0:
            pos.append(0), run.append(0)
            continue
        if segment != last:
            # the first sequence of an empty row is number 1 too
            number, end = number + (end > 0), 0
        pos.append(end), run.append(number)
        end, last = end + 1, segment
    return pos, run, end, last


def consecutive(run):
    """Indices renumbered 1, 2, 3, ... in the order of their first token; 0 stays."""
    names = [n for n in dict.fromkeys(run) if n]
    return [0 if n == 0 else 1 + names.index(n) for n in run]


@functools.cache
def compiled(t):
    return jax.jit(lambda segments, end, last: locate(segments, B, t, end, last))


def check(segments, end, last):
    """Holds `locate` against the loop; returns what it found."""
    have = compiled(segments.shape[1])(segments, end, last)
    for b in range(B):
        want = loop(segments[b], int(end[b]), int(last[b]))
        pos, run = have.pos[b].tolist(), have.segment[b].tolist()
        clock = int(have.next_pos[b]), int(have.last_segment[b])
        assert (pos, *clock) == (want[0], *want[2:])
        # indices count up along the row, and 1 is what the state carries in
        carried = [n == 1 for n in want[1]]
        assert [n == 1 for n in run] == carried
        assert consecutive(run) == consecutive(want[1])
        real = [n for n in run if n]
        assert real == sorted(real)
    return have


def start():
    return jnp.zeros(B, jnp.int32), jnp.full(B, -1, jnp.int32)


@pytest.mark.parametrize("seed", range(20))
def test_a_row_is_the_loop(seed):
    check(rows(seed), *start())


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_cut_anywhere_is_the_loop(seed):
    segments = rows(seed)
    rng = np.random.default_rng(100 + seed)
    cuts = [0, *sorted(rng.choice(np.arange(1, T), rng.integers(1, 6), False)), T]
    whole = locate(jnp.asarray(segments), B, T)
    end, last = start()
    pos = []
    for a, b in zip(cuts, cuts[1:]):
        part = check(segments[:, a:b], end, last)
        end, last = part.next_pos, part.last_segment
        pos.append(part.pos)
    assert (jnp.concatenate(pos, 1) == whole.pos).all()
    assert (end == whole.next_pos).all() and (last == whole.last_segment).all()


def test_a_small_example():
    segments = jnp.array([[0, 7, 7, 0, 7, 2, 2, 0], [4, 4, 4, 4, 0, 0, 5, 4]])
    have = locate(segments, 2, 8)
    assert have.pos.tolist() == [[0, 0, 1, 0, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert [consecutive(r) for r in have.segment.tolist()] == [
        [0, 1, 1, 0, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0, 2, 3]
    ]
    assert have.next_pos.tolist() == [2, 1] and have.last_segment.tolist() == [2, 4]


@pytest.mark.parametrize("pieces", [(5, 7), (1, 1, 1), (4,)])
def test_without_segments_positions_count(pieces):
    end, last = None, None
    at = 0
    for t in pieces:
        have = locate(None, B, t, end, last)
        assert (have.pos == jnp.arange(at, at + t)[None]).all()
        assert (have.segment == 1).all()
        at, end, last = at + t, have.next_pos, have.last_segment
        assert (end == at).all() and (last == 1).all()


def test_none_goes_on_with_the_sequence_that_was_there():
    segments = jnp.array([[0, 0, 3, 3], [5, 5, 5, 0], [0, 0, 0, 0], [2, 9, 9, 9]])
    first = locate(segments, 4, 4)
    then = locate(None, 4, 2, first.next_pos, first.last_segment)
    assert then.pos.tolist() == [[2, 3], [3, 4], [0, 1], [3, 4]]
    assert then.last_segment.tolist() == [3, 5, 1, 9] and (then.segment == 1).all()
    # naming the same sequence is the same, naming another begins anew
    again = locate(jnp.array([[3] * 2, [5] * 2, [1] * 2, [8] * 2]), 4, 2,
                   first.next_pos, first.last_segment)
    assert again.pos.tolist() == [[2, 3], [3, 4], [0, 1], [0, 1]]
    assert (again.segment[:3] == 1).all() and (again.segment[3] > 1).all()


def test_padding_stops_the_clock():
    first = locate(jnp.array([[6, 6, 6]]), 1, 3)
    none = jnp.zeros((1, 5), jnp.int32)
    rest = locate(none, 1, 5, first.next_pos, first.last_segment)
    assert rest.next_pos.tolist() == [3] and rest.last_segment.tolist() == [6]
    assert not rest.segment.any()


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32])
def test_any_integer_type_will_do(dtype):
    segments = rows(3)
    with jax.numpy_dtype_promotion("strict"):
        have = locate(jnp.asarray(segments, dtype), B, T)
    for a, b in zip(have, locate(jnp.asarray(segments), B, T)):
        assert a.dtype == jnp.int32 and (a == b).all()


@pytest.mark.parametrize("shape", [(B, T + 1), (B + 1, T), (T,)])
def test_wrong_shapes_say_what_was_expected(shape):
    with pytest.raises(ValueError, match=r"segments has shape .*expected \(6, 20\)"):
        locate(jnp.ones(shape, jnp.int32), B, T)
