"""Scores of the tasks of CAB: of spectra, summaries, images, forecasts and clouds."""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy import fft, ndimage, spatial

MELS = 14  # of the cepstrum: coefficients 1 to 13


def aligned(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The mean distance [B] of frames a [B,T,F] and b [B,S,F] along the cheapest way
    from (0, 0) to (T-1, S-1) in steps of one in either or both: dynamic time warping
    with Euclidean distance."""
    cost = np.stack([spatial.distance.cdist(x, y) for x, y in zip(a, b)])  # [B,T,S]
    batch, t, s = cost.shape
    total = np.full((batch, t + 1, s + 1), np.inf)
    steps = np.zeros((batch, t + 1, s + 1))
    total[:, 0, 0] = 0
    for at in range(t + s - 1):  # all (i, j) with i + j = at
        i = np.arange(max(0, at - s + 1), min(t, at + 1))
        j = at - i
        ways = np.stack([total[:, i, j], total[:, i, j + 1], total[:, i + 1, j]])
        long = np.stack([steps[:, i, j], steps[:, i, j + 1], steps[:, i + 1, j]])
        best = ways.argmin(0)[None]
        total[:, i + 1, j + 1] = cost[:, i, j] + np.take_along_axis(ways, best, 0)[0]
        steps[:, i + 1, j + 1] = 1 + np.take_along_axis(long, best, 0)[0]
    return total[:, t, s] / steps[:, t, s]


def spectral(have: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """mcd and msd of log spectra [B,T,bands], aligned: of the cepstrum, coefficients 1
    to 13, in decibels (Kubichek, 1993), and of the spectrum."""
    decibel = 10 * np.sqrt(2) / np.log(10)
    cepstra = (fft.dct(a, axis=2, norm="ortho")[..., 1:MELS] for a in (have, want))
    return {"mcd": float(decibel * aligned(*cepstra).mean()),
            "msd": float(aligned(have, want).mean())}


def rouge(have: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """r1, r2 and rl of token ids [B,T], [B,S]: F of words, of pairs and of the longest
    common subsequence (Lin, 2004), in percent."""
    found: dict[str, list[float]] = {"r1": [], "r2": [], "rl": []}
    for a, b in zip(have.tolist(), want.tolist()):
        for n in (1, 2):
            one, two = (Counter(zip(*(x[k:] for k in range(n)))) for x in (a, b))
            hits = sum((one & two).values())
            found[f"r{n}"].append(_f(hits, one.total(), two.total()))
        found["rl"].append(_f(_common(a, b), len(a), len(b)))
    return {name: 100 * float(np.mean(values)) for name, values in found.items()}


def _f(hits: float, have: int, want: int) -> float:
    return 2 * hits / max(have + want, 1)


def _common(a: list, b: list) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for n, y in enumerate(b, 1):
            before, row[n] = row[n], before + 1 if x == y else max(row[n], row[n - 1])
    return row[-1]


def images(have: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """psnr in decibels and ssim (Wang et al., 2004: windows of 7 x 7 pixels, unbiased
    variances) of grey images [B,h,w] in 0..1."""
    error = ((have - want) ** 2).mean((1, 2))
    psnr = -10 * np.log10(np.maximum(error, 1e-10))
    return {"psnr": float(psnr.mean()),
            "ssim": float(np.mean([_ssim(a, b) for a, b in zip(have, want)]))}


def _ssim(a: np.ndarray, b: np.ndarray, window: int = 7) -> float:
    mean = lambda x: ndimage.uniform_filter(x, window)
    a, b = a.astype(np.float64), b.astype(np.float64)
    many = window**2 / (window**2 - 1)
    u, v = mean(a), mean(b)
    var_a, var_b, both = (many * (mean(x) - y) for x, y in (
        (a * a, u * u), (b * b, v * v), (a * b, u * v)))
    one, two = 0.01**2, 0.03**2
    s = (2 * u * v + one) * (2 * both + two) / (
        (u * u + v * v + one) * (var_a + var_b + two))
    edge = window // 2  # where the window is inside
    return float(s[edge:-edge, edge:-edge].mean())


def forecast(have: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """mse and mae: means over all channels and over the last one, the target, averaged,
    as the benchmark averages multivariate and univariate forecasts."""
    error = have - want
    both = lambda f: float((f(error).mean() + f(error[..., -1]).mean()) / 2)
    return {"mse": both(np.square), "mae": both(np.abs)}


def clouds(have: np.ndarray, want: np.ndarray, near: float = 0.02) -> dict[str, float]:
    """cd1, cd2 and f of clouds [B,n,3], [B,m,3]: chamfer distance, of which cd1 is half
    the sum of both mean distances, cd2 the sum of mean squares, both times 1000; F of
    the shares of points that have one of the other cloud within `near`, by default 1%
    of a diameter of 2."""
    rows = []
    for a, b in zip(have, want):
        there, back = (spatial.KDTree(x).query(y)[0] for x, y in ((b, a), (a, b)))
        p, r = (there < near).mean(), (back < near).mean()
        rows.append((500 * (there.mean() + back.mean()),
                     1000 * ((there**2).mean() + (back**2).mean()),
                     2 * p * r / max(p + r, 1e-9)))
    return dict(zip(("cd1", "cd2", "f"), map(float, np.mean(rows, 0))))
