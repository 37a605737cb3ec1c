"""The linear recurrence in float64, token by token, with all gradients; and inputs for
it."""

import numpy as np

B, H, K, D, V = 2, 4, 2, 8, 12
FORWARD, GRADIENT = 2e-6, 1.5e-5
DECAYS = ("none", "head", "token", "channel", "strong", "mixed", "mixed channel")
RUNS = {
    37: [[1] * 9 + [0] * 3 + [1] * 4 + [17] * 20 + [0], [0] * 4 + [5] * 9 + [14] * 24],
    16: [[1] * 5 + [6] * 8 + [0] * 3, [0] * 2 + [1] * 6 + [7] * 8],
    1: [[1], [0]],
}


def recurrence(q, k, v, g, state, segment, d_o, d_state):
    """(state, o) and the gradients of sum(o d_o) + sum(state d_state), in float64."""
    q, k, v, g, d_o = (np.asarray(a, np.float64) for a in (q, k, v, g, d_o))
    (b, t, h, _), copies = q.shape, q.shape[2] // k.shape[2]
    k, v = (np.repeat(a, copies, 2) for a in (k, v))
    state, grad = (np.asarray(a, np.float64).copy() for a in (state, d_state))
    after, o, old = np.zeros((t, *state.shape)), np.zeros_like(d_o), {}
    present = np.ones(b, int)
    begins = np.zeros((b, t), bool)
    for i in range(t):
        real = segment[:, i] > 0
        begins[:, i] = real & (segment[:, i] != present)
        present = np.where(real, segment[:, i], present)
        kept = np.where(begins[:, i, None, None, None], 0, state)
        old[i] = kept * np.exp(g[:, i])[..., None]
        new = old[i] + k[:, i, ..., None] * v[:, i, :, None]
        state = np.where(real[:, None, None, None], new, state)
        after[i] = state
        o[:, i] = np.einsum("bhd,bhdv->bhv", q[:, i], state) * real[:, None, None]
    dq, dk, dv, dg = (np.zeros_like(a) for a in (q, k, v, g))
    for i in reversed(range(t)):
        real = (segment[:, i] > 0)[:, None, None]
        d = grad + q[:, i, ..., None] * d_o[:, i, :, None]
        dq[:, i] = np.einsum("bhdv,bhv->bhd", after[i], d_o[:, i]) * real
        dk[:, i] = np.einsum("bhdv,bhv->bhd", d, v[:, i]) * real
        dv[:, i] = np.einsum("bhdv,bhd->bhv", d, k[:, i]) * real
        dg[:, i] = (old[i] * d).sum(-1) * real
        passed = np.where(begins[:, i, None, None, None], 0, d)
        grad = np.where(real[..., None], passed * np.exp(g[:, i])[..., None], grad)
    share = lambda a: a.reshape(b, t, h // copies, copies, -1).sum(3)
    return (state, o), (dq, share(dk), share(dv), dg, grad)


def inputs(t, kind="none", seed=0, dtype=np.float32):
    """q, k, v, log_decay, state, d_o, d_state."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)
    shape = {"head": (H,), "channel": (B, t, H, D), "mixed channel": (B, t, H, D)}
    uniform = rng.uniform(size=shape.get(kind, (B, t, H))).astype(np.float32)
    g = None if kind == "none" else -uniform
    if kind == "strong":
        g = np.full_like(uniform, -30)
    if kind.startswith("mixed"):
        # next to tokens that forget all, others that forget next to nothing
        g = np.where(uniform < 0.2, -1e9, np.where(uniform < 0.4, -30, -uniform / 99))
    return (normal(B, t, H, D), normal(B, t, K, D), normal(B, t, K, V),
            None if g is None else g.astype(np.float32),
            normal(B, H, D, V), normal(B, t, H, V), normal(B, H, D, V))


def per_channel(g, t):
    """log_decay of any form as [B,T,H,D]."""
    if g is None:
        return np.zeros((B, t, H, D))
    g = g if g.ndim > 1 else g[None, None]
    return np.broadcast_to(g if g.ndim == 4 else g[..., None], (B, t, H, D))


def like(dg, g):
    """The gradient [B,T,H,D] of `per_channel`, of g itself."""
    dg = dg if g.ndim == 4 else dg.sum(-1)
    return dg if g.ndim > 1 else dg.sum((0, 1))


def close(a, b, bound=FORWARD):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all()
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    assert error <= bound, f"{error:.2e}"
