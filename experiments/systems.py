"""One linear system: attention, state space models and recurrent networks compared.

Every mechanism here that is linear in its values has an operator Phi, its matrix of
attention, and a system h_t = A_t h_{t-1} + B_t u_t, y_t = C_t h_t that ought to have
the same one (DSF; Sieber et al., 2024, arXiv:2405.15731). Phi of the attention is made
by differentiating its output by its values, Phi of the system from its matrices; the
numbers say how far apart they are, in float32, in which mechanisms compute. Then, in
float64, what the paper says of
softmax and of the selective SSM: softmax is the limit of linear attention with more and
more features; attention and an SSM with one decay coincide exactly if its gains and
decays come from the normaliser (E1), which a change of 1% breaks; and with the coupling
of gain and decay in S6 one free number fixes all the normalisers (E2).

    python -m experiments.systems

takes half a minute on 2 cores, nearly all of it compilation. The mechanisms (softmax,
linear, Lightning, RetNet, Based, GLA, gated delta, Flow, LightNet, RAT, Aaren) are at
most 2.6e-7 from their systems. The error of the expansion at orders 2, 4, 6 and 8 is
0.38, 0.16, 0.053 and 0.0092, and 0.068 to 1.8e-5 with logits half as large. E1 holds to
3e-16, gains that are 1% off break it by 1%; E2 holds to 6e-16 for the normalisers that
it allows, and not for others, by 0.73.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from attn import dsf
from attn.based import Based, features
from attn.dsf import DSF
from attn.flow import Flow
from attn.lightnet import LightNet
from attn.lightning import Lightning, slopes
from attn.rat import RAT
from attn.recurrent.delta_rule import recurrence as delta_rule
from attn.recurrent.linear import recurrence
from attn.recurrent.scan import prefix_softmax
from attn.retnet import RetNet
from attn.softmax import Softmax
from experiments.cli import config
from experiments.cli.config import option


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of what is compared."""

    tokens: int = option(24, "sequence length T")
    width: int = option(4, "width D of q and k")
    values: int = option(3, "width V of values")
    orders: int = option(8, "orders of the expansion of softmax")
    seed: int = option(0, "of the numbers")
    quiet: bool = option(False, "no tables")


TINY = Config(tokens=6, width=3, values=2, orders=4, quiet=True)

Pair = tuple[Callable[[jax.Array], jax.Array], DSF]


def run(config_: Config) -> dict[str, Any]:
    """Compares -> plain numbers: how far operators are apart, relative to the largest
    value, and the errors of the expansion."""
    # each part is one compiled program: step by step most of the time is compilation
    with jax.default_matmul_precision("highest"):
        found = jax.device_get(jax.jit(phi)(*numbers(config_)))
    with jax.enable_x64(True):
        q, k, v, gate = numbers(config_)
        orders = jax.jit(expansion, static_argnums=3)(q, k, v, config_.orders)
        equal = jax.jit(conditions, static_argnums=3)(q, k, gate, v.shape[1])
        found |= jax.device_get(orders | equal)
    found = {name: float(a) for name, a in found.items()}
    if not config_.quiet:
        _show(found)
    return found


def numbers(config_: Config):
    """q, k [T,D], v [T,V] and gates [T,D] in (0,1), of the default float type."""
    rng = np.random.default_rng(config_.seed)
    draw = lambda n: jnp.asarray(rng.normal(size=(config_.tokens, n)))
    d = config_.width
    return draw(d), draw(d), draw(config_.values), jax.nn.sigmoid(draw(d))


def phi(q, k, v, gate) -> dict[str, jax.Array]:
    """How far each mechanism's operator is from its system's."""
    both = pairs(q, k, gate, v.shape[1])
    return {f"apart_{name}": apart(f, system, v) for name, (f, system) in both.items()}


def pairs(q, k, gate, width: int) -> dict[str, Pair]:
    """The mechanisms as functions of their values, each with its system."""
    d = q.shape[1]
    scale = d**-0.5
    one, all_ones = gate[:, 0], jnp.ones_like(gate[:, 0])
    unit = k / jnp.linalg.norm(k, axis=1, keepdims=True)
    at_one = lambda a: a[None, :, None]  # of one sequence, the one head
    plain = lambda f: lambda v: f(at_one(q), at_one(k), at_one(v))[0, :, 0]
    log_decay = lambda a: jnp.broadcast_to(jnp.log(a), (len(q),))
    rate = jnp.exp(-slopes(1)[0])
    top = jnp.exp(k[:, 0] - k[:, 0].max())[:, None]
    by_channel = lambda v: recurrence(
        at_one(q), at_one(unit), at_one(v), at_one(jnp.log(gate))
    )
    fading = jnp.log(1 - one / 2)
    erasing = lambda v: delta_rule(
        at_one(q), at_one(unit), at_one(v), at_one(one), at_one(fading)
    )
    gain, share = (a[0, :, 0] for a in Flow().gains(at_one(q), at_one(k)))
    return {
        "softmax": (plain(Softmax()), dsf.softmax(q, k, width)),
        "linear": (plain(Lightning(slopes="none")), dsf.separable(
            q, k, all_ones, width)),
        "lightning": (plain(Lightning()), dsf.decayed(q, k, log_decay(rate), width)),
        "retnet": (plain(RetNet()), dsf.decayed(
            scale * q, k, log_decay(jnp.asarray(1 - 2**-5, q.dtype)), width)),
        "based": (plain(Based()), dsf.normalised(features(q), features(k), width)),
        "gla": (lambda v: by_channel(v)[1][0, :, 0], dsf.decayed(
            q, unit, jnp.log(gate), width)),
        "gated delta": (lambda v: erasing(v)[1][0, :, 0], dsf.delta(
            q, unit, one, fading, width)),
        "flow": (plain(Flow()), dsf.separable(
            gain * jax.nn.sigmoid(q), share * jax.nn.sigmoid(k), all_ones, width)),
        "lightnet": (plain(LightNet(activation=None, scale=1.0)), dsf.additive(
            q, k, width)),
        "rat": _rat(q, k, width),
        "aaren": (lambda v: prefix_softmax(k[None, :, :1], at_one(v))[1][0, :, 0],
                  dsf.normalised(jnp.ones_like(top), top, width)),
    }


def _rat(q, k, width: int, chunk: int = 3) -> Pair:
    """RAT, whose gates are made of q, with its parameters drawn once."""
    module, at_one = RAT(chunk=chunk, rope=None), lambda a: a[None, :, None]
    x, v = q[None], jnp.zeros((1, len(q), 1, width), q.dtype)
    params = module.init(jax.random.key(0), at_one(q), at_one(k), v, x=x)
    logits: Any = module.apply(params, at_one(q), v, x, method="gates")
    gate = jax.nn.sigmoid(logits[0, :, 0])
    own: list[jax.Array] = []
    for t in range(len(q)):
        g = gate[t, : k.shape[1]]
        own.append((1 - g) * k[t] + (g * own[-1] if t % chunk else 0))
    number, ends = jnp.arange(len(q)) // chunk, jnp.stack(own)[chunk - 1::chunk]
    far = jnp.where(jnp.arange(len(ends))[None] < number[:, None], q @ ends.T, -jnp.inf)
    near = (q * jnp.stack(own)).sum(1, keepdims=True)
    p = jax.nn.softmax(jnp.concatenate([far, near], 1) * q.shape[1] ** -0.5, -1)

    def f(v):
        o: Any = module.apply(params, at_one(q), at_one(k), at_one(v), x=x)
        return o[0, :, 0]

    return f, dsf.chunked(gate[:, :width], p, chunk)


def apart(f: Callable, system: DSF, v) -> jax.Array:
    """How far the attention, both scans and the system's operator are apart."""
    want = system.transfer()
    y = jnp.einsum("tpjd,jd->tp", want, v)
    errors = [
        jnp.abs(dsf.operator(f, v) - want).max() / jnp.abs(want).max(),
        *(jnp.abs(system.scan(v, parallel=way) - y).max() / jnp.abs(y).max()
          for way in (False, True)),
    ]
    return jnp.stack(errors).max()


def expansion(q, k, v, orders: int) -> dict[str, jax.Array]:
    """The largest error of softmax's expansion of even order, as it is and with half
    the logits."""
    found = {}
    for name, share in (("", 1.0), ("_half", 0.5)):
        exact = dsf.softmax(share * q, k, v.shape[1]).scan(v)
        for p in range(2, orders + 1, 2):
            left, right = dsf.taylor(share * q, p), dsf.taylor(k, p)
            y = dsf.normalised(left, right, v.shape[1]).scan(v)
            found[f"taylor{p}{name}"] = jnp.abs(y - exact).max()
    return found


def conditions(q, k, gate, width: int) -> dict[str, jax.Array]:
    """E1: attention with normalisers eta against an SSM with gains 1/eta and decays
    eta_(t-1)/eta_t, and with gains 1% off. E2: S6's coupling, decay = exp(-gain), with
    the normalisers that it allows and with those of the tokens."""
    eta = jnp.exp(gate.sum(1))
    attention = dsf.separable(q, k, eta, width)
    log_decay = jnp.log(eta[:-1] / eta[1:])
    log_decay = jnp.concatenate([log_decay[:1] * 0, log_decay])

    def ssm(gain, log_decay):
        return dsf.decayed(q, k * gain[:, None], log_decay, width)

    coupled = lambda eta: ssm(1 / eta, -1 / eta)
    _, forced = jax.lax.scan(_forced, eta[0], None, length=len(q) - 1)
    allowed = jnp.concatenate([eta[:1], forced])
    wrong = 1 / eta * (1 + 0.01 * jnp.sign(gate[:, 0] - 0.5))
    return {
        "E1_equal": dsf.distance(attention, ssm(1 / eta, log_decay)),
        "E1_gain_off_by_1_percent": dsf.distance(attention, ssm(wrong, log_decay)),
        "E2_allowed": dsf.distance(
            dsf.separable(q, k, allowed, width), coupled(allowed)),
        "E2_by_token": dsf.distance(attention, coupled(eta)),
    }


def _forced(before, _):
    """The one eta > 0 with eta exp(-1/eta) = the eta before, by bisection, twice."""
    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        under = middle * jnp.exp(-1 / middle) < before
        return jnp.where(under, middle, low), jnp.where(under, high, middle)

    low, high = jax.lax.fori_loop(0, 200, halve, (before, before * 4 + 4))
    return (low + high) / 2, (low + high) / 2


def _show(found: dict[str, float]) -> None:
    table = Table(title="largest difference, over the largest value", box=box.SIMPLE)
    table.add_column("compared")
    table.add_column("apart", justify="right")
    for name, value in found.items():
        table.add_row(name.replace("apart_", "Phi: "), f"{value:.2e}")
    Console().print(table)


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
