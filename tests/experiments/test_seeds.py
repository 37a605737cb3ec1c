"""Several seeds: medians, spread, and what has not come to an end."""

import dataclasses
import math

import pytest

from experiments.cli.config import STEPS, option
from experiments.measure import seeds
from experiments.measure.report import style


@dataclasses.dataclass(frozen=True)
class Config:
    """A config that is run with seeds."""

    seed: int = 4
    seeds: int = 3
    folder: str | None = None
    steps: int = option(10, most=STEPS)
    lengths: tuple[int, ...] = option((1, 2), least=1)
    rate: float = option(1e-3, above=0)
    scale: float | None = option(None, above=-1)


def test_each_seed_is_run_alone_and_the_median_is_told(tmp_path):
    ran = []

    def once(config):
        ran.append(config)
        return {"recall": 0.1 * config.seed**2, "bytes": 7, "text": str(config.seed)}

    found = seeds.repeated(Config(folder=str(tmp_path)), once, "x", ("recall",))
    assert [c.seed for c in ran] == [4, 5, 6] and {c.seeds for c in ran} == {1}
    assert [c.folder for c in ran] == [str(tmp_path / f"seed-{n}") for n in (4, 5, 6)]
    assert found["recall"] == 2.5 and found["bytes"] == 7 and found["text"] == "4"
    assert found["recall from"] == 1.6 and round(found["recall to"], 9) == 3.6
    assert found["not_converged"] == "recall differs by 2 between seeds"
    assert found["folder"] == str(tmp_path)
    one = seeds.repeated(Config(seeds=1), once, "x", ("recall",))
    assert one == {"recall": 1.6, "bytes": 7, "text": "4"}


def test_what_still_falls_is_said():
    steps = range(1, 21)
    still = [{"step": n, "loss": 4 - 0.1 * n} for n in steps]
    ended = [{"step": n, "loss": 4 * 0.5**n} for n in steps]
    rises = [{"step": n, "loss": 1 + 0.01 * n} for n in steps]
    assert seeds.falling(still) and not seeds.falling(ended)
    assert not seeds.falling(rises) and not seeds.falling(still[:9])
    why = seeds.unsettled([{"falling": True, "a": 0.5}, {"falling": False, "a": 0.52}],
                          ("a",))
    assert why == "the loss still falls (1 of 2 seeds)"


@pytest.mark.parametrize("values, far", [
    ([0.01, 0.05, 0.03], False), ([0.0, 0.06], True), ([0.984, 0.98, 0.99], False),
    ([3.3, 3.4, 3.44], False), ([3.3, 3.5], True), ([0.087, 0.544, 0.488], True),
])
def test_seeds_disagree_by_five_points(values, far):
    assert seeds.apart(values) == far


@pytest.mark.parametrize("fields, said", [
    ({"seeds": 0}, "seeds=0"), ({"seed": -1}, "seed=-1"), ({"seed": 2**31}, "below"),
    ({"steps": 0}, "steps=0: expected 1 or more, at most 2147483647"),
    ({"steps": 2**31}, "steps=2147483648: expected 1 or more, at most 2147483647"),
    ({"lengths": (4, 0)}, r"lengths=\(4, 0\): expected 1 or more$"),
    ({"rate": 0}, "rate=0: expected a finite number above 0"),
    ({"rate": math.inf}, "rate=inf: expected a finite"),
    ({"rate": math.nan}, "rate=nan: expected a finite"),
    ({"scale": -1.0}, "scale=-1.0: expected a finite number above -1"),
])
def test_numbers_beyond_their_bounds(fields, said):
    with pytest.raises(ValueError, match=said):
        seeds.check(Config(**fields))
    seeds.check(Config(steps=2**31 - 1, lengths=(), rate=1, scale=0.0))


def test_a_number_that_some_seeds_have_is_that_of_these():
    found = seeds.merged([{"a": 1.0}, {"a": 2.0, "b": 3.0}, {"a": 6.0, "b": 5.0}])
    assert found == {"a": 2.0, "a from": 1.0, "a to": 6.0,
                     "b": 4.0, "b from": 3.0, "b to": 5.0, "b seeds": 2}


def test_rows_of_a_picture_differ_by_shape_and_not_by_colour_alone():
    shapes = [style(n)["marker"] for n in range(15)]
    assert len({*shapes}) == 15
