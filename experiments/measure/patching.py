"""Path patching: what goes from one head to others, by replacing it alone.

(Wang et al., 2022, arXiv:2211.00593; as in Merullo et al., 2023, arXiv:2310.08744.) On
a clean text a head's output is replaced by what it gives on a corrupted one, all other
heads are held at what they were, and what then reaches the receivers is put into a
clean run: the direct effect of the sender through them,

    (LD_patched - LD_clean) / (LD_corrupt - LD_clean),    LD = mean(logit_right - wrong)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.view import Site, look

NOT_TRIED = np.nan
COMPONENTS = ("q", "k", "v")


@dataclasses.dataclass(frozen=True)
class Receivers:
    """Who is told: `component` q, k or v of heads ((layer, head), ...), where k and v
    count key heads; or, without heads, the stream behind `layer`."""

    heads: tuple[tuple[int, int], ...] = ()
    component: str = "q"
    layer: int | None = None

    def __post_init__(self):
        if bool(self.heads) == (self.layer is not None):
            raise ValueError("Receivers: expected heads or a layer")
        if self.component not in COMPONENTS:
            raise ValueError(f"component={self.component!r}: expected one of "
                             f"{COMPONENTS}")

    @property
    def names(self) -> list[str]:
        """Their arrays, as a view calls them."""
        if self.layer is not None:
            return [f"{self.layer}/resid_post"]
        return sorted({f"{n}/{self.component}" for n, _ in self.heads})

    @property
    def before(self) -> int:
        """Senders stand in layers below this one."""
        if self.layer is not None:
            return self.layer + 1
        return min(n for n, _ in self.heads)

    def mask(self, name: str, shape: tuple[int, ...], at: jax.Array) -> jax.Array:
        """What of the array is told, at the positions `at` [T]."""
        row = at.reshape((1, -1) + (1,) * (len(shape) - 2))
        if self.layer is not None:
            return row
        own = np.zeros(shape[2], bool)
        own[[h for n, h in self.heads if f"{n}/{self.component}" == name]] = True
        return row & own[None, None, :, None]


def logit_difference(logits: jax.Array, answers: jax.Array) -> jax.Array:
    """The mean over texts of logit right - logit wrong at the last token; logits
    [B,T,vocab], answers [B,2]."""
    both = jnp.take_along_axis(logits[:, -1], answers, 1)
    return (both[:, 0] - both[:, 1]).mean()


@functools.partial(jax.jit, static_argnames=("model", "receivers", "free_mlps"))
def patched(
    model: Any, params: Any, clean: jax.Array, corrupt: jax.Array, sender: jax.Array,
    at: jax.Array, receivers: Receivers, free_mlps: bool = True,
) -> jax.Array:
    """The logits [B,T,vocab] of the clean texts [B,T] when the receivers are told what
    the senders, [L,H] booleans, give on the corrupted ones, at positions `at` [T]. All
    arrays are traced: one program for all senders."""
    layers = range(len(model.blocks()))
    heads, mlps = [f"{n}/z" for n in layers], [f"{n}/mlp_out" for n in layers]
    _, was = look(model, params, clean, read=[*heads, *mlps])
    _, other = look(model, params, corrupt, read=heads)
    row = at[None, :, None, None]
    edit = {}
    for n, name in zip(layers, heads):
        own = sender[n][None, None, :, None]
        edit[name] = Site(row, jnp.where(own, other[name], was[name]))
    if not free_mlps:
        edit |= {name: Site(row[..., 0], was[name]) for name in mlps}
    _, told = look(model, params, clean, read=receivers.names, edit=edit)
    edit = {name: Site(receivers.mask(name, a.shape, at), a)
            for name, a in told.items()}
    return look(model, params, clean, edit=edit)[0]


@functools.partial(jax.jit, static_argnames="model")
def differences(model, params, clean, corrupt, answers):
    """LD of the clean and the corrupted texts."""
    return tuple(logit_difference(model.apply(params, tokens), answers)
                 for tokens in (clean, corrupt))


def scores(
    model: Any, params: Any, clean: jax.Array, corrupt: jax.Array, answers: jax.Array,
    receivers: Receivers, position: int = -1, free_mlps: bool = True,
) -> dict[str, np.ndarray]:
    """score and patched [L,H] of every head as a sender, NaN where it stands behind
    the receivers, with clean and corrupt, the differences without. clean, corrupt
    [B,T]: of equal lengths; answers [B,2]: right and wrong; position: where heads are
    replaced and told, -1 for the last token."""
    if clean.shape != corrupt.shape:
        raise ValueError(f"clean {clean.shape} and corrupt {corrupt.shape}: expected "
                         "texts of equal lengths")
    at = jnp.arange(clean.shape[1]) == position % clean.shape[1]
    shape = len(model.blocks()), model.heads
    base, other = map(float, differences(model, params, clean, corrupt, answers))
    found = np.full(shape, NOT_TRIED)
    for n in range(receivers.before):
        for h in range(shape[1]):
            sender = np.zeros(shape, bool)
            sender[n, h] = True
            logits = patched(model, params, clean, corrupt, sender, at, receivers,
                             free_mlps)
            found[n, h] = logit_difference(logits, answers)
    return {"score": (found - base) / (other - base), "patched": found,
            "clean": np.array(base), "corrupt": np.array(other)}


def contributions(model: Any, params: Any, tokens: jax.Array) -> dict[str, jax.Array]:
    """What adds up to the stream before the last norm, [B,T,E] each: "embed", "N/mlp",
    "N/bias" of the output projections, and "N/heads" [B,T,H,E]. For models whose blocks
    add to the stream without factors and norms behind."""
    layers = range(len(model.blocks()))
    for n, block in enumerate(model.blocks()):
        how = block.residual
        if how.after or how.normed or (*how.mixer, *how.mlp) != (1, 1, 1, 1):
            raise NotImplementedError(
                f"contributions: layer {n} has {how}: expected sums without factors "
                "and norms behind")
    names = [f"{n}/{name}" for n in layers for name in ("z", "mlp_out")]
    _, seen = look(model, params, tokens, read=["embed", *names])
    found = {"embed": seen["embed"]}
    for n in layers:
        out = params["params"]["layers"][f"layer_{n}"]["mixer"]["out"]
        # z [B,T,H,V], kernel [H,V,E]: a head's own rows of the output projection
        found[f"{n}/heads"] = jnp.einsum("bthv,hve->bthe", seen[f"{n}/z"],
                                         out["kernel"].astype(seen[f"{n}/z"].dtype))
        if "bias" in out:
            found[f"{n}/bias"] = jnp.broadcast_to(out["bias"], seen["embed"].shape)
        found[f"{n}/mlp"] = seen[f"{n}/mlp_out"]
    return found


@functools.partial(jax.jit, static_argnames="model")
def direct_logits(model, params, tokens, answers) -> jax.Array:
    """[L,H]: what each head adds to logit right - logit wrong at the last token by
    itself, with the last norm linear at the whole stream, mean over texts."""
    parts = contributions(model, params, tokens)
    _, seen = look(model, params, tokens, read=["final"])
    layers = range(len(model.blocks()))
    heads = jnp.stack([parts[f"{n}/heads"][:, -1] for n in layers], 1)  # [B,L,H,E]

    def logits(x):
        # the rest of the model, from the stream on
        edit = {"final": Site(jnp.ones((1, 1, 1), bool), x)}
        out, _ = look(model, params, tokens, edit=edit)
        both = jnp.take_along_axis(out[:, -1], answers, 1)
        return (both[:, 0] - both[:, 1]).sum()

    slope = jax.grad(logits)(seen["final"])[:, -1]  # [B,E]
    return jnp.einsum("blhe,be->lh", heads, slope) / tokens.shape[0]
