"""The tasks of CAB that are no language and no speech: images, forecasts and clouds."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data.series import CHANNELS, KINDS
from experiments.measure.cab import scores
from experiments.measure.cab.task import HEADS, LAYERS, WIDTH, Task, called
from models.informer import Informer
from models.pointr import PoinTr, distances
from models.sr3 import SR3, levels, sample

SAMPLING = 50  # steps from noise to image


class SuperResolutionTask(Task):
    """Super-resolution by diffusion: four times as many pixels on a side."""

    name = "superres"
    patterns = ("NS",)
    measures = {"psnr": 1, "ssim": 1}
    inputs = ("sharp", "given", "level")

    def drawn(self, split, seed):
        rows = super().drawn(split, seed)
        return rows | {"level": np.ones(len(rows["sharp"]), np.float32)}

    def network(self, places):
        return SR3(WIDTH // 4, HEADS, places)

    @staticmethod
    def loss(model, params, batch, key):
        at, noise = jax.random.split(key)
        sharp = batch["sharp"]
        kept = levels(SAMPLING)[
            jax.random.randint(at, (sharp.shape[0],), 0, SAMPLING)]
        noise = jax.random.normal(noise, sharp.shape)
        share = kept[:, None, None, None]
        noisy = jnp.sqrt(share) * sharp + jnp.sqrt(1 - share) * noise
        found = model.apply(params, noisy, batch["given"], kept)
        return jnp.square(found - noise).mean()

    def judged(self, model, params, rows, key):
        made = _sampled(model, params, rows["given"], key)
        zero_to_one = lambda a: (np.asarray(a)[..., 0] + 1) / 2
        return scores.images(
            np.clip(zero_to_one(made), 0, 1), zero_to_one(rows["sharp"]))


class ForecastTask(Task):
    """Long-term forecasting of three kinds of series by one network, judged by kind.

    One layer on either side: between two the encoder halves the series, and what was
    the same hour of the day before is found in too few steps by no attention. The
    decoder is told a fourth of what is known, so that it has to ask for the rest.
    """

    name = "series"
    patterns = ("NC",)
    measures = {f"{kind}_{name}": -1 for kind in KINDS for name in ("mse", "mae")}
    inputs = ("past",)

    def network(self, places):
        return Informer(CHANNELS, self.data.length // 4, self.data.horizon, WIDTH,
                        HEADS, 1, places)

    @staticmethod
    def loss(model, params, batch, key):
        return jnp.square(model.apply(params, batch["past"]) - batch["future"]).mean()

    def judged(self, model, params, rows, key):
        found = np.asarray(called(model)(params, rows["past"]))
        return {f"{kind}_{name}": value for n, kind in enumerate(KINDS)
                for name, value in scores.forecast(
                    found[rows["kind"] == n],
                    rows["future"][rows["kind"] == n]).items()}


class CompletionTask(Task):
    """Completion of a cloud of points."""

    name = "clouds"
    patterns = ("NC",)
    measures = {"cd1": -1, "cd2": -1, "f": 1}
    inputs = ("points",)

    def network(self, places):
        missing = self.data.missing
        return PoinTr(min(64, self.data.length // 2), missing // 4, 4, width=WIDTH,
                      heads=HEADS, layers=LAYERS, places=places)

    @staticmethod
    def loss(model, params, batch, key):
        coarse, fine = model.apply(params, batch["points"])
        return chamfer(coarse, batch["missing"]) + chamfer(fine, batch["missing"])

    def judged(self, model, params, rows, key):
        _, fine = called(model)(params, rows["points"])
        return scores.clouds(np.asarray(fine), rows["missing"])


def chamfer(a: jax.Array, b: jax.Array) -> jax.Array:
    """The mean distance of the points of [B,n,3] and [B,m,3] from the other cloud's
    nearest, both ways."""
    far = jnp.sqrt(distances(a, b) + 1e-8)
    return far.min(1).mean() + far.min(2).mean()


@functools.partial(jax.jit, static_argnums=0)
def _sampled(model, params, given, key):
    return sample(model, params, given, key, SAMPLING)
