"""Peers: attentions of other libraries, on the inputs that ours are timed with.

A peer takes part where it is installed and runs: cuDNN and tokamax's kernels on a GPU,
tokamax's on a TPU, its chunked form and torch's scaled_dot_product_attention on a CPU
(torch's on a GPU as well) for exact attention; for recurrences, ejkernel's XLA
forms of one decay a head (token by token) and of the gated delta rule (in chunks; 64 is
faster than its default of 256 here). Beside a memory that is an MLP of `Titans`,
titans-pytorch's. What a peer refuses is said once and left out.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from attn.lightning import slopes
from attn.titans import Titans
from experiments.measure.timing import Inputs, prepared

PEER = "jax.nn"
Makes = dict[str, Callable[[Inputs], Callable[[], Any]]]


def peers(which: str) -> Makes:
    """What prepares a call of each exact peer that may run here, by name; jax.nn first.
    """
    where = jax.default_backend()
    causal = which != "decode"  # one query sees all keys
    own = jax.nn.dot_product_attention
    forms: dict[str, Callable] = {PEER: functools.partial(own, is_causal=causal)}
    if where == "gpu":
        forms["cuDNN"] = functools.partial(
            own, is_causal=causal, implementation="cudnn")
    if importlib.util.find_spec("tokamax") is not None:
        import tokamax

        kinds = {"gpu": ("mosaic", "triton"), "tpu": ("mosaic",)}
        for kind in kinds.get(where, ("xla_chunked",)):
            forms[f"tokamax {kind}"] = functools.partial(
                tokamax.dot_product_attention, is_causal=causal, implementation=kind)
    found: Makes = {
        name: functools.partial(prepared, f, which=which) for name, f in forms.items()}
    if importlib.util.find_spec("torch") is not None and where in ("cpu", "gpu"):
        found["torch SDPA"] = functools.partial(_torch, which=which)
    return found


def _torch(x: Inputs, which: str) -> Callable[[], Any]:
    """torch's attention on the same numbers; a call waits for its result itself."""
    import torch

    place = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if place == "cuda" and not torch.cuda.is_available():
        raise NotImplementedError("torch SDPA: this torch has no CUDA")
    kind = getattr(torch, jnp.dtype(x.q.dtype).name)
    turned = lambda a: torch.from_numpy(
        np.array(a.astype(jnp.float32))).to(place, kind).transpose(1, 2)
    q, k, v, do = map(turned, x)
    f = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        is_causal=which != "decode", enable_gqa=q.shape[1] != k.shape[1])
    wait = torch.cuda.synchronize if place == "cuda" else lambda: None

    def call():
        if which != "both":
            with torch.no_grad():
                f(q, k, v)
        else:
            args = [a.detach().requires_grad_() for a in (q, k, v)]
            torch.autograd.grad(f(*args), args, do)
        wait()

    call()
    return call


def linear_peers(which: str) -> Makes:
    """What prepares a call of each recurrent peer. Their gates are given, where an
    attention of ours makes them of the tokens."""
    if which == "decode" or importlib.util.find_spec("ejkernel") is None:
        return {}
    from ejkernel.kernels._xla import gated_delta_rule, recurrent

    def decayed(x: Inputs) -> Callable[[], Any]:
        d, h = x.q.shape[3], x.q.shape[2]
        log_decay = jnp.asarray(-slopes(h), jnp.float32)
        f = lambda q, k, v: recurrent(
            q, k, v, g_gamma=log_decay, softmax_scale=float(d) ** -0.5)[0]
        return prepared(f, x, which)

    def delta(x: Inputs) -> Callable[[], Any]:
        f = lambda q, k, v, beta, decay: gated_delta_rule(
            q, k, v, beta, decay, chunk_size=64)[0]
        return prepared(f, x, which, gates(x))

    return {"ejkernel decay": decayed, "ejkernel gated delta": delta}


def gates(x: Inputs) -> tuple[jax.Array, jax.Array]:
    """beta in (0,1) and log decay < 0 [B,T,H] of a gated delta rule, of iid normals."""
    shape = x.k.shape[:2] + x.q.shape[2:3]
    a, b = (jax.random.normal(jax.random.key(n), shape) for n in (3, 4))
    return jax.nn.sigmoid(a), -0.1 * jax.nn.softplus(b)


def memory_peers(which: str, attentions: Iterable[Any]) -> Makes:
    """titans-pytorch's memory, as large as those of `attentions` that are Titans of 2
    layers or more: as it comes, with all gradients of a call at the weights before it,
    and with those of a chunk at the weights before that, as ours. It is a layer, whose
    projections of the tokens (a few percent of its products) are timed with it."""
    found: Makes = {}
    for one in attentions if which in ("forward", "both") else ():
        if isinstance(one, Titans) and one.depth > 1:
            name = f"titans-pytorch depth={one.depth} chunk={one.chunk}"
            make = functools.partial(_neural_memory, one, which)
            found[name] = functools.partial(make, None)
            found[f"{name} batch_size={one.chunk}"] = functools.partial(make, one.chunk)
    return found


def _neural_memory(
    memory: Titans, which: str, batch_size: int | None, x: Inputs
) -> Callable[[], Any]:
    """titans-pytorch's NeuralMemory on iid normal tokens [B,T,H V], on the CPU, with
    the gradients of its tokens and parameters."""
    if importlib.util.find_spec("titans_pytorch") is None:
        raise NotImplementedError(
            "not installed, expected `pip install titans-pytorch`")
    import torch
    from titans_pytorch import MemoryMLP, NeuralMemory

    if jax.default_backend() != "cpu" or x.q.dtype != jnp.float32:
        raise NotImplementedError("timed on a CPU in float32 alone")
    (b, t, h, d), width = x.q.shape, x.v.shape[3]
    if d != width:
        raise NotImplementedError(f"D={d}, V={width}: its heads have one width")
    torch.manual_seed(0)
    layer = NeuralMemory(
        h * d, chunk_size=memory.chunk, batch_size=batch_size, dim_head=d, heads=h,
        model=MemoryMLP(d, memory.depth, memory.expansion), momentum=memory.momentum,
        mem_model_norm_add_residual=memory.residual and memory.norm,
    )
    tokens, do = (torch.randn(b, t, h * d) for _ in range(2))
    wanted = [p for p in layer.parameters() if p.requires_grad]

    def call():
        if which == "forward":
            with torch.no_grad():
                layer(tokens)
            return
        args = [tokens.detach().requires_grad_(), *wanted]
        torch.autograd.grad(layer(args[0])[0], args, do, allow_unused=True)

    call()
    return call
