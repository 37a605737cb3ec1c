"""The delta rule in float64, token by token, with all gradients; and inputs for it."""

import numpy as np

B, H, D, V = 2, 4, 8, 12
FORWARD, GRADIENT = 2e-6, 1.5e-5
NAMES = "q", "k", "v", "beta", "log_decay", "state"
RUNS = {
    37: [[1] * 9 + [0] * 3 + [1] * 4 + [17] * 20 + [0], [0] * 4 + [5] * 9 + [14] * 24],
    1: [[1], [0]],
}


def recurrence(q, k, v, beta, g, state, segment, scale, d_o, d_state):
    """(state, o), and the gradients of sum(o d_o) + sum(state d_state) in the order of
    NAMES; that of g has the shape [B,T,H], or of g [B,T,H,D] its own."""
    args = q, k, v, beta, g, state, d_o, d_state
    q, k, v, beta, g, state, d_o, grad = (np.array(a, np.float64) for a in args)
    (b, t, h), heads = beta.shape, (q.shape[2], k.shape[2], v.shape[2])
    q, k, v = (np.repeat(a, h // n, 2) for a, n in zip((q, k, v), heads))
    by_channel = np.ndim(g) == 4
    # [B,T,H,1|D]
    g = g if by_channel else np.broadcast_to(g, (b, t, h))[..., None]
    o, present, kept = np.zeros_like(d_o), np.ones(b, int), []
    for i in range(t):
        real, new = segment[:, i] > 0, (segment[:, i] > 0) & (segment[:, i] != present)
        present = np.where(real, segment[:, i], present)
        real, new = (a[:, None, None, None] for a in (real, new))
        old = np.where(new, 0, state) * np.exp(g[:, i])[..., None]
        r = v[:, i] - np.einsum("bhd,bhdv->bhv", k[:, i], old)
        u = beta[:, i, :, None] * r
        state = np.where(real, old + k[:, i, ..., None] * u[:, :, None], state)
        o[:, i] = scale * np.einsum("bhd,bhdv->bhv", q[:, i], state) * real[..., 0]
        kept.append((real, new, old, r, u, state))
    dq, dk, dv, dbeta, dg = (np.zeros_like(a) for a in (q, k, v, beta, g))
    for i, (real, new, old, r, u, after) in reversed(list(enumerate(kept))):
        own, row = real[..., 0], scale * d_o[:, i]
        d = grad + q[:, i, ..., None] * row[:, :, None]
        du = np.einsum("bhd,bhdv->bhv", k[:, i], d)
        dr = beta[:, i, :, None] * du
        dq[:, i] = np.einsum("bhdv,bhv->bhd", after, row) * own
        dk[:, i] = own * (np.einsum("bhdv,bhv->bhd", d, u)
                          - np.einsum("bhdv,bhv->bhd", old, dr))
        dv[:, i], dbeta[:, i] = dr * own, (du * r).sum(-1) * own[..., 0]
        d = d - k[:, i, ..., None] * dr[:, :, None]
        dg[:, i] = (d * old).sum(-1, keepdims=True).sum(
            -1 if by_channel else -2) * own
        passed = np.where(new, 0, d) * np.exp(g[:, i])[..., None]
        grad = np.where(real, passed, grad)
    share = lambda a, n: a.reshape(b, t, n, h // n, -1).sum(3)
    dq, dk, dv = (share(a, n) for a, n in zip((dq, dk, dv), heads))
    return (state, o), (dq, dk, dv, dbeta, dg if by_channel else dg[..., 0], grad)


def inputs(t, kind="token", top=1.0, heads=(H, 2, 2), seed=0, b=B, d=D, width=V, h=H):
    """q, k, v, beta, log_decay, state, d_o, d_state; keys have length 1, beta is in
    (0,top); kind: "none", "head", "token", "channel", "strong" (-30) or "mixed" log
    decays; "strong_channel" and "mixed_channel" for those of channels."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    k = normal(b, t, heads[1], d)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    beta = rng.uniform(size=(b, t, h)).astype(np.float32) * np.float32(top)
    channels = (d,) if kind.endswith("channel") else ()
    uniform = rng.uniform(size=(h,) if kind == "head" else (b, t, h, *channels))
    g = {"none": None, "strong": np.full_like(uniform, -30)}.get(
        kind.removesuffix("_channel"), -uniform)
    if kind.startswith("mixed"):
        # next to tokens that forget all, others that forget next to nothing
        g = np.where(uniform < 0.2, -1e9, np.where(uniform < 0.4, -30, -uniform / 99))
    return (normal(b, t, heads[0], d), k, normal(b, t, heads[2], width), beta,
            None if g is None else g.astype(np.float32),
            normal(b, h, d, width), normal(b, t, h, width), normal(b, h, d, width))


def close(a, b, bound=FORWARD, name=""):
    """Relative error in the norm."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape and np.isfinite(a).all(), name
    error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
    assert error <= bound, f"{name} {error:.2e}"


def held(have, back, want, grads, g):
    """The results and gradients of a call against those of `recurrence`."""
    close(have[0], want[0], name="final"), close(have[1], want[1], name="o")
    for name, a, b in zip(NAMES, back, grads):
        if name == "log_decay" and g is None:
            continue
        if name == "log_decay" and g.ndim == 1:
            b = b.sum((0, 1))
        close(a, b, GRADIENT, name)
