"""Two processes of four devices each are one run of eight devices."""

import json
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.training.hosts import Hosts
from experiments.training.loop import abstract, fit
from experiments.training.runs import Checkpoints
from tests.small_run import BATCH, MODEL, Counting, plan

ROOT = pathlib.Path(__file__).parents[2]
SIZES = (2, 2, 2)
PROCESS = """
import json, os, pathlib, sys
port, index, folder = sys.argv[1:]
os.environ["XLA_FLAGS"] = " ".join((
    "--xla_force_host_platform_device_count=4", "--xla_backend_optimization_level=0"))
import conftest  # the settings of every test
from experiments.training.hosts import Hosts, agreed, join
join(Hosts(f"localhost:{port}", 2, int(index)), patience=40)
import jax
from experiments.training import loop, mesh, runs
from tests.small_run import MODEL, Counting, plan
assert jax.process_count() == 2 and len(jax.local_devices()) == 4
path = runs.open_folder("two", folder, "python -m two")
run = loop.fit(MODEL, Counting(), plan((2, 2, 2)), path, quiet=True)
assert not run.params["params"]["embed"]["embedding"].is_fully_addressable
found = loop.evaluate(MODEL, run.params, Counting(), 1, 8, mesh=(2, 2, 2))
whole = mesh.whole(run.params)["params"]["norm"]["scale"]
try:
    runs.open_folder("two", folder, "python -m three")
except ValueError as error:
    refused = str(error)
print(json.dumps([run.rows, found, float(whole.sum()), refused]))
"""


def run_two(folder):
    """What two processes print, as JSON."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    files = [folder / f"process{n}.txt" for n in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(n), str(folder / "run")],
            cwd=ROOT, stdout=file.open("w"), stderr=subprocess.STDOUT,
        )
        for n, file in enumerate(files)
    ]
    try:
        codes = [process.wait(timeout=150) for process in running]
    except subprocess.TimeoutExpired:
        codes = ["too long"]
    finally:
        for process in running:
            process.kill()
    said = [file.read_text() for file in files]
    assert codes == [0, 0], f"{codes}\n" + "\n---\n".join(s[-3000:] for s in said)
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_two_processes_are_one_run(tmp_path):
    found = run_two(tmp_path)
    alone = fit(MODEL, Counting(), plan(SIZES), quiet=True)
    for rows, score, scale, refused in found:
        assert "holds another run" in refused
        np.testing.assert_allclose(
            [row["loss"] for row in rows], [row["loss"] for row in alone.rows],
            rtol=1e-6,
        )
        assert score == found[0][1]
        want = alone.params["params"]["norm"]["scale"].sum()
        np.testing.assert_allclose(scale, want, rtol=1e-6)
    # one wrote the metrics, both wrote the checkpoint, which one device can read
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found[0][0]
    like = abstract(MODEL, plan(), BATCH["tokens"], None)
    state = Checkpoints(tmp_path / "run").restore(like)
    assert int(state.step) == plan().steps
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        state.params, alone.params,
    )


@pytest.mark.parametrize("fields, message", [
    ({"count": 2}, "count alone: expected coordinator, count and index"),
    ({"coordinator": "a", "count": 2, "index": 0}, "coordinator=a: expected host:port"),
    ({"coordinator": "a:1", "count": 2, "index": 2}, "index=2: expected 0 or more"),
])
def test_wrong_hosts(fields, message):
    with pytest.raises(ValueError, match=message):
        Hosts(**fields)
