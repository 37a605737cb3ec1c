"""Loading holds no more of the host's memory than the parameters and one tensor."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from models.checkpoint.config import Config
from models.checkpoint.files import WEIGHTS
from models.checkpoint.loading import _shapes, entries_of, model_of
from tests.models.test_checkpoint_forms import content

SIZES = {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 2048,
         "num_hidden_layers": 4, "head_dim": 128}
OWN = 16e6  # bytes that tracing the model takes
# the parameters' bytes and the most that was held beside what was there before, by a
# thread that asks all the time; pages of the file that are mapped do not count
CHILD = """
import pathlib, sys, threading
import jax, jax.numpy as jnp
from models.checkpoint import load

def held():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon")) * 1024

load(sys.argv[2])  # whatever a first call makes
jnp.zeros(8).block_until_ready()
before, seen, done = held(), [], threading.Event()
def watch():
    while not done.is_set():
        seen.append(held())
thread = threading.Thread(target=watch)
thread.start()
params = load(sys.argv[1])[1]
done.set()
thread.join()
print(sum(a.nbytes for a in jax.tree.leaves(params)), max(seen) - before)
"""


def sparse(folder, tensors):
    """A folder whose weights are holes in a file: zeros that take no room."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 2 * int(jnp.prod(jnp.array(shape)))
        header[name] = {"dtype": "BF16", "shape": list(shape),
                        "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / WEIGHTS, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at


@pytest.mark.skipif(sys.platform != "linux", reason="what is held is asked of Linux")
def test_a_folder_is_read_tensor_by_tensor(tmp_path):
    """100 MB, about a hundredth of a model of 8 GB, of which the largest tensor has a
    third: what is beyond it is of jax."""
    config, _ = content("llama")
    folders = []
    few = {"num_hidden_layers": SIZES["num_hidden_layers"]}
    for name, sizes in (("large", SIZES), ("tiny", few)):
        folder = tmp_path / name
        folder.mkdir()
        source = {**config, **sizes}
        (folder / "config.json").write_text(json.dumps(source))
        model = model_of(Config(source))
        shapes = _shapes(model)
        tensors = {}
        for entry in entries_of(model):
            tensors |= named(entry, shapes)
        folders.append((folder, sparse(folder, tensors)))
    (large, size), (tiny, _) = folders
    assert size > 95e6
    # what is freed goes back at once, as it does at the size of real tensors
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    out = subprocess.run([sys.executable, "-c", CHILD, str(large), str(tiny)],
                         capture_output=True, text=True, check=True, env=at_once).stdout
    params, most = map(int, out.split())
    largest = 2 * SIZES["vocab_size"] * SIZES["hidden_size"]
    assert params == size
    assert most < params + largest + OWN, (most - params) / largest


def named(entry, shapes):
    """The shape of each tensor of an entry, by its name."""
    like = [jax.ShapeDtypeStruct(shapes[path], jnp.bfloat16) for path in entry.paths]
    made = jax.eval_shape(entry.write, like)
    return {name: a.shape for name, a in zip(entry.names, made)}
