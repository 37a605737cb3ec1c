"""Adapter for miras.npz: the linear recurrences that Miras starts from, as
flash-linear-attention's references compute them (`fla`), and memories of every kind,
evaluated step by step in float64.
"""

from __future__ import annotations

import functools
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attn.recurrent.delta_rule import recurrence as delta_rule
from attn.recurrent.linear import recurrence
from attn.recurrent.memory import Gates, Where, learn
from attn.recurrent.memory_axes import KL, Bias, Elastic, Lq
from attn.recurrent.memory_chunk import Rule
from attn.recurrent.memory_nets import MLP

# the spec's, section 9: outputs 2e-4, gradients 3e-3 of an array's largest number. The
# loop as it is written is off by up to 7e-5 in float32, 4e-8 in float64
TOLERANCE = {"out": 2e-5, "state": 2e-5} | dict.fromkeys(
    ("q", "k", "v", "delta", "eta", "alpha", "momentum", "W0", "W1", "gamma", "beta"),
    5e-4,
)
FIXED = ("gamma", "beta")  # of the norm, which the inner loop does not update
ARGUMENTS = ("q", "k", "v", "eta", "alpha", "delta", "momentum")


def run(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What the arrays of the case ask for."""
    found = linear(case) if "beta" in case else memory(case)
    return {name: np.asarray(a) for name, a in found.items()}


def linear(case) -> dict[str, Any]:
    """Outputs and last states of the six recurrences."""
    q, k, v, beta, g = (
        jnp.asarray(case[n]) for n in ("q", "k", "v", "beta", "log_decay")
    )
    by_channel = jnp.asarray(case["log_decay_channel"])
    retnet = jnp.asarray(case["retnet/log_decay"])
    scale = q.shape[-1] ** -0.5
    sums = lambda *decay: recurrence(q * scale, k, v, *decay, chunk=8)
    rule = lambda *decay: delta_rule(q, k, v, beta, *decay, scale=scale, chunk=8)
    forms = {
        "delta_rule": lambda: rule(),
        "gated_delta_rule": lambda: rule(g),
        "gla": lambda: sums(by_channel),
        "scalar_decay_linear_attention": lambda: sums(g),
        "retnet": lambda: sums(retnet),
        "linear_attention": lambda: sums(),
    }
    found = {}
    for name, form in forms.items():
        state, o = jax.jit(form)()
        found |= {f"{name}/out": o, f"{name}/state": state}
    return found


def rule_of(config) -> Rule:
    """The axes that a config names."""
    net = MLP(depth=2, residual=True, norm=True)
    if config["memory"] != "mlp2":
        net = MLP(depth=1)
    bias = Bias(
        config["bias"], config.get("p", 3), smooth=config.get("smooth", False),
        slope=config.get("tanh_slope", 10.0), eps=config.get("abs_eps", 1e-6))
    link = {
        "lq": lambda: Lq(config["q"], eps=0.0), "kl": KL, "decay": lambda: None,
        "elastic": lambda: Elastic(config["gamma"]), "none": lambda: None,
    }[config["retention"]]()
    return Rule(net, bias, link)


def memory(case) -> dict[str, Any]:
    """The output, the memory at the end and every gradient."""
    config, rule = case["config"], rule_of(case["config"])
    if config["grad_at"] != "previous":
        raise ValueError(f"grad_at={config['grad_at']!r}: expected 'previous'")
    begin = {n.removeprefix("Z0/"): jnp.asarray(case[n])
             for n in list(case.keys()) if n.startswith("Z0/")}
    args = {n: jnp.asarray(case[n]) for n in ARGUMENTS if n in case}

    def forward(args, begin):
        fixed = {n: a for n, a in begin.items() if n in FIXED}
        initial = {n: a for n, a in begin.items() if n not in FIXED}
        momentum = args.get("momentum")
        gates = Gates(
            args["eta"], jnp.log(args["alpha"]),
            None if momentum is None else jnp.log(momentum), args.get("delta"))
        where = Where(jnp.arange(args["q"].shape[1], dtype=jnp.int32)[None], None)
        after, o = learn(
            rule, args["q"], args["k"], args["v"], gates, initial, where, fixed=fixed,
            chunk=config["chunk"])
        return o, {n: a + initial[n][None] for n, a in after.weights.items()}

    o, back, after = jax.jit(functools.partial(jax.vjp, forward, has_aux=True))(
        args, begin)
    grads, first = jax.jit(back)(jnp.asarray(case["cotangent"]))
    after |= {n: begin[n][None] for n in FIXED if n in begin}
    found = {"out": o} | {f"Z_final/{n}": a for n, a in after.items()}
    found |= {f"grad/{n}": a for n, a in grads.items() if f"grad/{n}" in case}
    return found | {f"grad/Z0/{n}": a for n, a in first.items()}
