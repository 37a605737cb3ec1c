"""Training on a mesh: the same numbers on any, and a checkpoint goes to any other."""

import dataclasses
import functools
import shutil
import types

import jax
import numpy as np
import pytest

from attn.lightning import Lightning
from attn.softmax import Softmax
from experiments.training import mesh as meshes
from experiments.training import loop as train
from experiments.training.loop import fit
from experiments.training.runs import open_folder
from models.lm import LM
from models.transnormer import TransNormer
from tests.laws import close
from tests.small_run import BATCH, MODEL, Counting, plan

MESHES = ((1, 8, 1), (1, 4, 2), (2, 4, 1), (1, 2, 4), (8, 1, 1))


@functools.cache
def steps(mesh, **fields):
    """Losses of three steps, and gradients [...] of the first: Adam's first moment is a
    tenth of them, and the learning rate begins at 0."""
    how, dataset, losses, first = plan(mesh, **fields), Counting(), [], None
    with meshes.in_force(mesh) as devices:
        model = meshes.spread(MODEL, mesh)
        state = train.start(model, how, dataset)
        for step in range(how.steps):
            batch = meshes.put(dataset.batch(step, how.batch), devices)
            state, mean = train.train_step(model, how, state, batch)
            losses.append(float(mean))
            if first is None:
                mu = state.moments[1][0].mu
                first = jax.tree.map(lambda a: 10 * np.asarray(a), mu)
    return losses, first, state


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_changes_nothing(mesh):
    want, have = steps((1, 1, 1)), steps(mesh)
    for a, b in zip(have[0], want[0], strict=True):
        close(a, b)
    jax.tree.map(lambda a, b: close(a, b, "gradient"), have[1], want[1])


def test_no_device_holds_more_than_its_part():
    _, _, state = steps((1, 4, 2))
    like = train.abstract(
        meshes.spread(MODEL, (1, 4, 2)), plan((1, 4, 2)), BATCH["tokens"],
        meshes.make((1, 4, 2)),
    )
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    whole = sum(a.nbytes for a in jax.tree.leaves(state))
    own = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state))
    assert own < 0.2 * whole
    table = state.moments[1][0].mu["params"]["embed"]["embedding"]
    assert table.addressable_shards[3].data.shape == (16, 8)


def test_parts_and_whole_parameters_change_nothing():
    want = steps((1, 1, 1))
    for fields in ({"accumulate": 2}, {"fsdp": False}):
        have = steps((2, 2, 2), **fields)
        close(np.array(have[0]), np.array(want[0]))
        jax.tree.map(lambda a, b: close(a, b, "gradient"), have[1], want[1])
    kernel = have[2].params["params"]["layers"]["layer_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "model")


class Packed(Counting):
    """Three sequences in a row, and padding."""

    def batch(self, step, size):
        runs = np.repeat([1, 2, 3, 0], [9, 11, 8, 4]).astype(np.int32)
        return super().batch(step, size) | {"segments": np.tile(runs, (size, 1))}


@pytest.mark.parametrize("model, dataset", [
    (TransNormer(vocab=33, width=32, heads=4), Counting()),
    (MODEL.clone(attention=(Lightning(),) * 2, tied=False, scan=True, remat=True),
     Packed()),
], ids=("TransNormer", "packed"))
def test_other_models_on_a_mesh(model, dataset):
    losses = [
        [row["loss"] for row in fit(model, dataset, plan(mesh), quiet=True).rows]
        for mesh in ((1, 1, 1), (2, 2, 2))
    ]
    close(np.array(losses[1]), np.array(losses[0]))


def test_slow_links_are_crossed_by_data_alone():
    slices = [types.SimpleNamespace(slice_index=n // 4) for n in range(8)]
    with pytest.raises(ValueError, match="data=1: expected a multiple of the 2 slices"):
        meshes.arranged((1, 4, 2), slices)


def test_a_checkpoint_goes_on_on_another_mesh(tmp_path):
    how = plan((1, 4, 2), steps=4, save=2)
    whole = fit(MODEL, Counting(), how, tmp_path / "whole", quiet=True)
    for n, mesh in enumerate(((1, 4, 2), (2, 2, 1), (1, 1, 1))):
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "whole", folder)
        shutil.rmtree(folder / "checkpoints" / "4")
        again = dataclasses.replace(how, mesh=mesh)
        run = fit(MODEL, Counting(), again, folder, quiet=True)
        losses = [[row["loss"] for row in r.rows] for r in (run, whole)]
        assert losses[0][:2] == losses[1][:2] and len(losses[0]) == 4
        close(np.array(losses[0]), np.array(losses[1]))
        if mesh == how.mesh:
            assert losses[0] == losses[1]
            jax.tree.map(np.testing.assert_array_equal, run.params, whole.params)


def test_a_folder_goes_on_on_another_mesh(tmp_path):
    words = "python -m experiments.lm --steps=3"
    open_folder("lm", str(tmp_path / "a"), f"{words} --mesh='(1, 4, 2)'")
    open_folder("lm", str(tmp_path / "a"), words)
    with pytest.raises(ValueError, match="holds another run"):
        open_folder("lm", str(tmp_path / "a"), words + "1")


def test_evaluation_is_the_same_on_a_mesh():
    _, _, state = steps((1, 4, 2))
    have = train.evaluate(MODEL, state.params, Counting(), 1, 8, mesh=(1, 4, 2))
    want = train.evaluate(MODEL, meshes.whole(state.params), Counting(), 1, 8)
    np.testing.assert_allclose(have["loss"], want["loss"], rtol=1e-5)
    assert have["accuracy"] == want["accuracy"]


@dataclasses.dataclass(frozen=True)
class Whole:
    """An attention that must have all tokens in one place."""


@pytest.mark.parametrize("mesh, fields, message", [
    ((4, 4, 1), {}, r"mesh=\(4, 4, 1\) needs 16 devices: there are 8"),
    ((8, 1, 1), {"batch": 12}, r"batch=12: expected a multiple of data=8 of mesh"),
    ((4, 1, 1), {"accumulate": 4}, "batch=8: .* of data=4 .* times accumulate=4"),
    ((1, 5, 1), {}, "length=32 of tokens: expected a multiple of seq=5"),
    ((1, 1, 8), {}, "H=4 heads cannot be split over the 8 devices"),
])
def test_what_a_mesh_cannot_split_is_named(mesh, fields, message):
    with pytest.raises(ValueError, match=message):
        fit(MODEL, Counting(), plan(mesh, **fields), quiet=True)


def test_an_attention_that_cannot_be_split_is_named():
    model = LM(vocab=32, width=32, attention=(Softmax(), Whole()))
    with pytest.raises(NotImplementedError, match="Whole cannot be split over mesh"):
        fit(model, Counting(), plan((1, 2, 1)), quiet=True)
