"""The training loop: exact resume, accumulation, meshes, and how it fails."""

import dataclasses
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn.aaren import Aaren
from attn.delta import Delta
from attn.gla import GLA
from attn.masks import Causal, Window
from attn.performer import Performer
from attn.rat import RAT
from attn.routing import Routing
from attn.softmax import Softmax
from experiments.training import loop as train
from experiments.training.checksum import _on_devices as checksums_on_devices
from experiments.training.checksum import checksum
from experiments.training.loop import NotFinite, TrainConfig, evaluate, fit
from experiments.training.plan import decays
from experiments.training.record import write_whole
from experiments.training.runs import Checkpoints, Metrics, locked, open_folder
from models.lm import LM, loss
from models.pixels import PixelNet

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


@pytest.mark.parametrize("rate, save", [(1e30, 1), (1e8, 2)])
def test_what_is_not_finite_is_never_saved(tmp_path, rate, save):
    plan = dataclasses.replace(PLAN, learning_rate=rate, clip=1e30, save=save)
    with pytest.raises(NotFinite, match=r"not finite at step \d+; ") as error:
        fit(MODEL, Counting(), plan, tmp_path, quiet=True)
    bad = int(str(error.value).partition("at step ")[2].partition(";")[0])
    kept = Checkpoints(tmp_path)
    assert all(step < bad for step in kept.steps)
    if kept.steps:
        state = kept.restore(train.start(MODEL, PLAN, Counting()))
        for leaf in jax.tree.leaves((state.params, state.moments)):
            assert np.isfinite(leaf).all()


def test_a_gradient_that_is_not_finite_is_seen_though_the_loss_is(tmp_path):
    def steep(model, params, batch, key):
        total, count = train.next_token(model, params, batch, key)
        # sqrt has no slope at 0
        return total + jnp.sqrt(0 * params["params"]["norm"]["scale"].sum()), count

    with pytest.raises(NotFinite, match="not finite at step 1; no checkpoint"):
        fit(MODEL, Counting(), dataclasses.replace(PLAN, log=1, save=1), tmp_path,
            objective=train.Objective(steep), quiet=True)


def _harm(folder, harm):
    """Damages the checkpoint 12 of a run."""
    newest = folder / "checkpoints" / "12"
    files = sorted(f for f in newest.rglob("*") if f.is_file())
    if harm == "other number":
        shutil.copytree(newest, newest.with_name("30"))
    elif harm == "strange names":
        for name in ("9" * 20, "-3", "13.5", "007", "notes", "0"):
            shutil.copytree(newest, newest.with_name(name))
    elif harm == "flipped":  # one bit of each file that holds arrays
        for file in (f for f in files if f.parent.name == "d"):
            raw = bytearray(file.read_bytes())
            raw[len(raw) // 2] ^= 4
            file.write_bytes(raw)
    elif harm == "gone":
        shutil.rmtree(newest)
    for file in files:
        if harm == "empty":
            file.write_bytes(b"")
        elif harm == "cut":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif harm == "unsigned" and "checksums" in file.parts:
            file.unlink()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run that has ended."""
    folder = tmp_path_factory.mktemp("ended")
    return folder, fit(MODEL, Counting(), PLAN, folder, quiet=True)


@pytest.mark.parametrize("harm, said", [
    ("empty", "12 cannot be read"), ("cut", "12 cannot be read"),
    ("unsigned", "12 cannot be read"), ("flipped", "12 cannot be read"),
    ("gone", "step 12 is gone"), ("other number", "it holds step 12"),
    ("strange names", ""),
])
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(
    tmp_path, capsys, ended, harm, said
):
    shutil.copytree(ended[0], tmp_path, dirs_exist_ok=True)
    _harm(tmp_path, harm)
    again = fit(MODEL, Counting(), PLAN, tmp_path, quiet=True)
    assert _same(again.params, ended[1].params) and again.rows == ended[1].rows
    assert again.tokens_per_second > 0
    assert re.search(said, capsys.readouterr().err)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"8", "12"} <= names  # and what was damaged is still there
    if "cannot" in said:
        assert {"12.damaged", "30.damaged"} & names


def test_a_run_that_has_lost_its_checkpoints_does_not_start_anew(tmp_path, ended):
    shutil.copytree(ended[0], tmp_path, dirs_exist_ok=True)
    for step in (8, 12):
        (tmp_path / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").write_text("")
        for file in (tmp_path / "checkpoints" / str(step) / "default").iterdir():
            if file.is_file():
                file.unlink()
    with pytest.raises(ValueError, match="checkpoint .*12 cannot be read .*nor any"):
        fit(MODEL, Counting(), PLAN, tmp_path, quiet=True)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="record says that step 12 was saved"):
        fit(MODEL, Counting(), PLAN, tmp_path, quiet=True)


def test_rows_without_a_checkpoint_are_said(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    assert Metrics(tmp_path / "metrics.jsonl", 0).rows == []
    assert "rows up to step 2, but nothing was saved" in capsys.readouterr().err


def test_any_changed_bit_changes_a_checksum():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 5)).astype(np.float32)
    raw = bytearray(a.tobytes())
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        other = np.frombuffer(bytes(raw), np.float32).reshape(a.shape)
        assert checksum(other) != checksum(a)
        raw[bit // 8] ^= 1 << bit % 8
    assert checksum(a[:, ::-1]) != checksum(a) != checksum(a.T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "int32"])
def test_a_checksum_is_the_same_on_devices(dtype):
    a = jnp.arange(24).reshape(2, 3, 4).astype(dtype)
    want = [int(s) for s in jax.jit(checksums_on_devices)(a)]
    assert checksum(a).split()[1] == "".join(f"{s:08x}" for s in want)


STOPPED = """
import pathlib, sys
from tests.experiments.test_training import *
steps = train.train_step
def slow(*args):
    if int(args[2].step) == 5:
        print("here", flush=True)
        time.sleep(1)
    return steps(*args)
train.train_step = slow
fit(MODEL, Counting(), dataclasses.replace(PLAN, save=100), pathlib.Path(sys.argv[1]),
    quiet=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_of_the_last_step(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert "the checkpoint of step 6 is kept" in said
    assert process.returncode in ({-2, 1, 130} if number == signal.SIGINT else {143})
    assert Checkpoints(tmp_path).steps == [6]


def test_a_checkpoint_by_minutes(tmp_path):
    plan = dataclasses.replace(PLAN, save=100, save_minutes=1e-9)
    fit(MODEL, Counting(), plan, tmp_path, quiet=True)
    assert Checkpoints(tmp_path).steps == [10, 12]


def test_a_folder_in_use_is_refused(tmp_path):
    code = ("import pathlib, sys; from experiments.training.runs import locked\n"
            "with locked(pathlib.Path(sys.argv[1])): print('in', flush=True), input()")
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "in\n"
    for start in (lambda: fit(MODEL, Counting(), PLAN, tmp_path, quiet=True),
                  lambda: open_folder("a", str(tmp_path), "python -m a")):
        with pytest.raises(ValueError, match=f"in use by process {other.pid} of "):
            start()
    other.kill()
    other.wait()
    with locked(tmp_path), locked(tmp_path):
        pass


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


def test_a_metrics_line_cut_short_is_dropped(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert Metrics(path, 2).rows == [{"step": 1}, {"step": 2}]
    assert capsys.readouterr().err == ""


def test_a_damaged_line_takes_no_other_with_it(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xff\x00\n[3]\n{"step": "a"}\n{"step": 4}\n')
    assert Metrics(path, 4).rows == [{"step": 1}, {"step": 4}]
    assert capsys.readouterr().err.count("is damaged and left out") == 3
    assert path.read_text() == '{"step": 1}\n{"step": 4}\n'


def test_settings_tell_runs_apart_and_steps_may_grow(tmp_path, capsys):
    folder, settings = str(tmp_path / "a"), {"rate": "0.1", "steps": 5}
    for change in ({}, {"steps": 8}, {"steps": 8}):
        open_folder("lm", folder, "python -m lm", settings | change)
    assert "steps=5 becomes 8" in capsys.readouterr().err
    for change, said in (({"rate": "0.2"}, "rate is 0.1 there, 0.2 here"),
                         ({"steps": 7}, "steps=8 there, 7 here is less")):
        with pytest.raises(ValueError, match=f"holds another run .{said}"):
            open_folder("lm", folder, "python -m lm", settings | {"steps": 8} | change)


def test_folders_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder("lm", "~/x", "a") == tmp_path / "x"
    for name in (tmp_path / "file" / "below", "x" * 300, "~nobody-here/x", "/proc/x",
                 "a\0b", "\udcff"):
        with pytest.raises(ValueError, match="folder="):
            open_folder("lm", name, "a")


def test_what_weight_decay_reaches():
    attentions = (Softmax(), GLA(), RAT(chunk=4), Aaren(), Delta(conv=2))
    model = LM(vocab=16, width=16, heads=2, attention=attentions, qk_norm=True,
               out_norm="all", learned=8)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    flags = jax.tree_util.tree_leaves_with_path(decays(like))
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), yes)
             for path, yes in flags]
    every, reached = {name for name, _ in named}, {name for name, yes in named if yes}
    assert {p for p in every if p.endswith(("kernel", "embedding"))} == reached
    for name in ("bias", "scale", "query", "_conv"):
        assert any(path.endswith(name) for path in every - reached), name
    # a text's places decay as in nanoGPT, a picture's do not, as in ViT
    assert {"params/embed/embedding", "params/positions/embedding"} <= reached
    picture = PixelNet(width=16, table=True)
    like = jax.eval_shape(picture.init, jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    assert not decays(like)["params"]["places"]


def test_the_first_step_of_warm_up_does_something():
    plan = dataclasses.replace(PLAN, warmup=4, steps=10, weight_decay=0.0)
    params, update = {"kernel": jnp.ones(3)}, plan.optimizer().update
    moments, sizes = plan.optimizer().init(params), []
    for _ in range(6):
        change, moments = update({"kernel": jnp.ones(3)}, moments, params)
        sizes.append(float(-change["kernel"][0]) / plan.learning_rate)
    np.testing.assert_allclose(sizes[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-3)
    assert sizes[5] < 1


def test_ids_beyond_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="targets hold 4: expected ids below 4"):
        loss(jnp.zeros((1, 2, 4)), jnp.array([[1, 4]]))
    with pytest.raises(ValueError, match="tokens hold 15: expected .* vocab=8"):
        fit(MODEL.clone(vocab=8), Counting(), PLAN, quiet=True)


@pytest.mark.parametrize("field, value", [
    ("steps", 0), ("accumulate", 3), ("learning_rate", 0.0), ("mesh", (1, 2)),
    ("log", 0), ("clip", -1.0), ("clip", float("nan")), ("clip", 0.0),
    ("learning_rate", float("inf")), ("learning_rate", float("nan")),
    ("weight_decay", -0.1), ("final_scale", -1.0), ("warmup", -1), ("batch", 2.5),
    ("save_minutes", 0.0), ("steps", 2**40), ("seed", 2**70), ("save", "often"),
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
    logits = jnp.zeros((1, 3, 4))
    nats, count = loss(logits, jnp.array([[-1, 2, -1]]))
    np.testing.assert_allclose(nats, np.log(4), rtol=1e-6)
    assert int(count) == 1


def test_a_full_disk_costs_what_was_to_be_written_and_no_more(tmp_path):
    kept = Checkpoints(tmp_path)
    state = {"a": jax.random.normal(jax.random.key(0), (100_000,))}
    write_whole(tmp_path / "record", "old")
    kept.save(1, state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:  # no file may be longer, as where no room is left
        with pytest.raises(ValueError, match="2 cannot be written .*: the last one is "
                                             "1$"):
            kept.save(2, state)
        with pytest.raises(OSError):
            write_whole(tmp_path / "record", "new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints", "progress.json", "record"}
    assert (tmp_path / "record").read_text() == "old"
    kept.save(3, state)
    assert kept.steps == [1, 3]
    np.testing.assert_array_equal(kept.resumed(state)["a"], state["a"])


@pytest.mark.parametrize("accumulate", (1, 2))
def test_a_gradient_moves_parameters_alone(accumulate):
    layers = Performer(features=4), Routing(clusters=2, window=4, local=1)
    model = LM(vocab=16, width=16, heads=2, hidden=16, attention=layers)
    plan = dataclasses.replace(PLAN, steps=2, accumulate=accumulate)
    first = train.start(model, plan, Counting()).params
    after = fit(model, Counting(), plan, quiet=True).params
    chex.assert_trees_all_equal(after["fixed"], first["fixed"])  # random directions
    # those follow the vectors that were read
    for name in ("params", "centroids"):
        assert any((a != b).any() for a, b in zip(
            jax.tree.leaves(after[name]), jax.tree.leaves(first[name])))
    one = jax.tree.leaves(after["centroids"])
    assert all(np.isfinite(a).all() for a in one)
