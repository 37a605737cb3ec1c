"""Adapter for dsf.npz: the systems of eight models, in float64."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn import dsf

ARRAYS = ("A", "B", "C", "D", "Phi", "y", "taylor_y", "taylor_maxerr", "eta")
TOLERANCE = {name: 1e-9 for name in ARRAYS}  # the spec's, in float64


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        arrays = {
            name: jnp.asarray(case[name]) for name in case
            if name not in (*ARRAYS, "config")
        }
        f = jax.jit(_everything, static_argnums=0)
        found, others = jax.device_get(f(case["config"]["kind"], arrays))
    # the two scans and the operator have to agree before anything is compared
    for other in others:
        np.testing.assert_allclose(other, found["y"], rtol=1e-9, atol=1e-9)
    return found


def _everything(kind: str, arrays: dict[str, jax.Array]):
    """The expected arrays, and y [T,P] by the parallel scan and by the operator."""
    system, more = _system(kind, arrays)
    full, u, phi = system.dense, arrays["u"], system.transfer()
    found = {"A": full.A, "B": full.B, "C": full.C, "D": full.D, "y": system.scan(u),
             "Phi": phi, **more}
    return found, (system.scan(u, parallel=True), jnp.einsum("tpjd,jd->tp", phi, u))


def _system(kind: str, a: dict[str, jax.Array]):
    width = a["u"].shape[1]
    if kind.startswith("elu+1"):
        q, k = (jax.nn.elu(a[n]) + 1 for n in "qk")
        eta = (q * jnp.cumsum(k, 0)).sum(1)
        return dsf.normalised(q, k, width), {"eta": eta}
    if kind.startswith("identity features"):
        link = jnp.exp if "exp" in kind else jax.nn.softplus
        eta = link(a["eta_logit"])
        return dsf.separable(a["q"], a["k"], eta, width), {"eta": eta}
    if kind.startswith("exact finite-horizon"):
        exact = dsf.softmax(a["q"], a["k"], width)
        want = exact.scan(a["u"])
        orders = [
            dsf.normalised(dsf.taylor(a["q"], p), dsf.taylor(a["k"], p), width)
            .scan(a["u"]) for p in range(1, 7)
        ]
        error = jnp.stack([jnp.abs(y - want).max() for y in orders])
        return exact, {"taylor_y": jnp.stack(orders), "taylor_maxerr": error}
    if kind == "Mamba/S6":
        return dsf.s6(a["delta_logit"], a["a_pos"], a["b"], a["c"], a["Dskip"]), {}
    if kind == "scalar-decay SSD":
        return dsf.ssd(a["delta_logit"], a["a_pos"], a["b"], a["c"], width), {}
    if kind == "sigmoid forget":
        a.pop("alpha")
        return dsf.qlstm(a["f"], a["i"], a["o"]), {}
    if kind.startswith("reversed sigmoid"):
        return dsf.qlstm(a["f"], a["i"], a["o"], a["alpha"]), {}
    if kind == "RG-LRU":
        return dsf.rglru(a["r_logit"], a["i_logit"], a["lam"], a["c"]), {}
    raise ValueError(f"kind {kind!r} is not known")
