"""Kinetics: what the paper's numbers say, and that few keys never cost more."""

import pytest

from experiments import kinetics
from experiments.kinetics import MODELS, Job


def test_the_papers_examples():
    job = Job(200, 32768, 32)
    full = {name: kinetics.dense(m, job) for name, m in MODELS.items()}
    assert full["8B"].computed == pytest.approx(27_432, rel=1e-4)
    assert full["8B"].moved == pytest.approx(1_425_511, rel=1e-6)
    assert full["14B"].total / full["0.6B"].total == pytest.approx(1.46, abs=0.01)
    few = kinetics.top_k(MODELS["14B"], job, 1024)
    assert full["14B"].total / few.total == pytest.approx(12.4, abs=0.05)
    other = kinetics.top_k(MODELS["14B"], job, 1024, official_sign=False)
    assert other.total < few.total


def test_few_keys_pay_at_every_budget():
    found = kinetics.run(kinetics.Config(points=6, quiet=True))
    for n in range(6):
        assert found[f"top-k_{n}"] >= found[f"dense_{n}"]
    assert any(found[f"top-k_{n}"] > found[f"dense_{n}"] + 0.02 for n in range(6))


def test_coverage():
    assert kinetics.coverage(4, 1, 4) == 1 and kinetics.coverage(4, 0, 2) == 0
    assert kinetics.coverage(4, 1, 1) == 0.25
