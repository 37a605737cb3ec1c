"""Gradients of a float64 function by differences along random directions."""

import jax
import numpy as np


def agree(f, args, grads, do, bound=1e-4):
    """Asserts that `grads`, of sum(f(*args) * do) by each of args, are those that
    differences of f, in float64 numpy, have along a random direction."""
    do = np.asarray(do, np.float64)
    rng = np.random.default_rng(0)
    args = [np.asarray(a, np.float64) for a in args]
    for n, grad in enumerate(grads):
        grad = np.asarray(jax.device_get(grad), np.float64)
        step = rng.normal(size=grad.shape)
        ends = []
        for sign in (1e-5, -1e-5):
            moved = list(args)
            moved[n] = moved[n] + sign * step
            ends.append((do * f(*moved)).sum())
        want = (ends[0] - ends[1]) / 2e-5
        size = np.linalg.norm(step) * np.linalg.norm(grad) + 1e-3
        assert abs((step * grad).sum() - want) < bound * size, (n, want)
