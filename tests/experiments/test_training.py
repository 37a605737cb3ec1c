"""The training loop: exact resume, accumulation, meshes, and how it fails."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.masks import Causal, Window
from attn.softmax import Softmax
from experiments.training import loop as train
from experiments.training.loop import NotFinite, TrainConfig, evaluate, fit
from experiments.training.runs import Checkpoints, Metrics, open_folder
from models.lm import LM

ROOT = pathlib.Path(__file__).parents[2]
MODEL = LM(vocab=16, width=16, heads=2, hidden=16,
           attention=(Softmax(dropout=0.1), Softmax(mask=Causal() & Window(4))))
PLAN = TrainConfig(steps=12, batch=8, warmup=2, log=2, save=4)


@dataclasses.dataclass(frozen=True)
class Counting:
    """Rows that count up from a random start: easy to learn."""

    length: int = 16
    vocab: int = 16

    def batch(self, step: int, size: int):
        """tokens and targets [B,T] of one step."""
        start = np.random.default_rng([7, step]).integers(0, 16, (size, 1))
        rows = (start + np.arange(self.length + 1)) % 16
        return {"tokens": rows[:, :-1].astype(np.int32),
                "targets": rows[:, 1:].astype(np.int32)}


def _same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_it_learns():
    plan = dataclasses.replace(PLAN, steps=60, learning_rate=2e-2, warmup=5, log=10)
    run = fit(MODEL, Counting(), plan, quiet=True)
    assert run.rows[-1]["loss"] < 0.5 < run.rows[0]["loss"]
    assert evaluate(MODEL, run.params, Counting(), 2, 4)["accuracy"] > 0.9
    assert run.tokens_per_second > 0


def test_a_run_that_was_stopped_ends_bit_identical(tmp_path, monkeypatch):
    whole = fit(MODEL, Counting(), PLAN, tmp_path / "whole", quiet=True)
    count, train_step = [0], train.train_step

    def stopping(*args):
        count[0] += 1
        if count[0] == 7:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit(MODEL, Counting(), PLAN, tmp_path / "parts", quiet=True)
    monkeypatch.setattr(train, "train_step", train_step)
    again = fit(MODEL, Counting(), PLAN, tmp_path / "parts", quiet=True)
    assert _same(whole.params, again.params)
    assert whole.rows == again.rows
    lines = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "parts")]
    assert lines[0] == lines[1]


KILLED = """
import pathlib, sys
from tests.experiments.test_training import *
fit(MODEL, Counting(), dataclasses.replace(PLAN, steps=400, save=2),
    pathlib.Path(sys.argv[1]), quiet=True)
"""


def test_a_killed_process_leaves_a_checkpoint_that_is_whole(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    deadline = time.time() + 120
    while Checkpoints(tmp_path).latest is None and time.time() < deadline:
        time.sleep(0.2)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    found = Checkpoints(tmp_path)
    state = found.restore(train.start(MODEL, PLAN, Counting()))
    assert int(state.step) == found.latest > 0


def test_accumulation_changes_nothing():
    model = MODEL.clone(attention=(Softmax(),))
    one = fit(model, Counting(), PLAN, quiet=True)
    two = fit(model, Counting(), dataclasses.replace(PLAN, accumulate=4), quiet=True)
    for a, b in zip(one.rows, two.rows):
        assert abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"]


def test_a_mesh_changes_nothing():
    model = MODEL.clone(attention=(Softmax(),))
    alone = fit(model, Counting(), PLAN, quiet=True)
    shared = fit(
        model.clone(attention=(Softmax(axis="seq"),)), Counting(),
        dataclasses.replace(PLAN, mesh=(2, 2, 2)), quiet=True,
    )
    for a, b in zip(alone.rows, shared.rows):
        assert abs(a["loss"] - b["loss"]) < 1e-4 * a["loss"]


def test_a_loss_that_is_not_finite_names_step_and_checkpoint(tmp_path):
    class Broken(Counting):
        def batch(self, step, size):
            out = super().batch(step, size)
            if step == 8:
                out["targets"] = np.full_like(out["targets"], -1)
            return out

    plan = dataclasses.replace(PLAN, learning_rate=1e30, clip=1e30, warmup=5)
    with pytest.raises(NotFinite, match=r"not finite at step \d+; .*checkpoint"):
        fit(MODEL, Broken(), plan, tmp_path, quiet=True)


@pytest.mark.parametrize("harm", ["empty", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(tmp_path, harm):
    fit(MODEL, Counting(), PLAN, tmp_path, quiet=True)
    newest = tmp_path / "checkpoints" / "12"
    files = sorted(f for f in newest.rglob("*") if f.is_file())
    for file in files:
        if harm == "empty":
            file.write_bytes(b"")
        elif harm == "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif "manifest" in file.name or "METADATA" in file.name:
            file.unlink()
    with pytest.raises(ValueError, match="checkpoint .*12 cannot be read.*step 8"):
        fit(MODEL, Counting(), PLAN, tmp_path, quiet=True)
    assert newest.exists() and (tmp_path / "checkpoints" / "8").exists()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 12


def test_a_folder_of_another_run_is_refused(tmp_path):
    open_folder("recall", str(tmp_path / "a"), "python -m experiments.recall")
    open_folder("recall", str(tmp_path / "a"), "python -m experiments.recall")
    with pytest.raises(ValueError, match="holds another run"):
        open_folder("recall", str(tmp_path / "a"), "python -m experiments.recall -x")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds other files"):
        open_folder("recall", str(tmp_path / "b"), "python -m experiments.recall")
    with pytest.raises(ValueError, match="this is a file"):
        open_folder("recall", str(tmp_path / "b" / "thesis.txt"), "")


def test_a_metrics_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert Metrics(path, 2).rows == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("field, value", [
    ("steps", 0), ("accumulate", 3), ("learning_rate", 0.0), ("mesh", (1, 2)),
    ("log", 0),
])
def test_bad_plans_say_what_they_expect(field, value):
    with pytest.raises(ValueError, match=f"{field}=.*expected"):
        dataclasses.replace(PLAN, **{field: value}, **(
            {} if field == "steps" else {"steps": 5}
        ))


def test_too_many_devices_are_refused():
    with pytest.raises(ValueError, match="needs 64 devices"):
        fit(MODEL, Counting(), dataclasses.replace(PLAN, mesh=(64, 1, 1)), quiet=True)


def test_targets_without_loss_do_not_count():
    from models.lm import loss

    logits = jnp.zeros((1, 3, 4))
    nats, count = loss(logits, jnp.array([[-1, 2, -1]]))
    np.testing.assert_allclose(nats, np.log(4), rtol=1e-6)
    assert int(count) == 1
