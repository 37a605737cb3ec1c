"""A small hybrid and its text, which tests train on meshes and on many hosts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from attn.lightning import Lightning
from attn.softmax import Softmax
from experiments.training.loop import TrainConfig
from models.lm import LM

MODEL = LM(
    vocab=32, width=32, heads=4, kv_heads=2, attention=(Lightning(), Softmax())
)
BATCH = {n: jax.ShapeDtypeStruct((8, 32), jnp.int32) for n in ("tokens", "targets")}


def plan(mesh=(1, 1, 1), **fields):
    """A few steps of training."""
    fields = dict(steps=3, batch=8, warmup=1, log=1, clip=1e9) | fields
    return TrainConfig(mesh=mesh, **fields)


@dataclasses.dataclass(frozen=True)
class Counting:
    """Rows that count up from a random start."""

    length: int = 32

    def batch(self, step, size):
        """tokens and targets [B,T] of one step; the first five have no loss."""
        start = np.random.default_rng([3, step]).integers(0, 32, (size, 1))
        rows = ((start + np.arange(self.length + 1)) % 32).astype(np.int32)
        targets = np.where(np.arange(self.length) < 5, -1, rows[:, 1:])
        return {"tokens": rows[:, :-1], "targets": targets.astype(np.int32)}
