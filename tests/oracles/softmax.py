"""Softmax attention in float64, by the matrix, with all gradients; and exact attention,
kernels too, told one thing a keyword."""

import functools

import numpy as np

from attn.exact import attend as exact, chunked
from attn.masks import Full
from attn.sparse import chosen_blocks
from pallas_kernels.blocks import api as blocks_api
from pallas_kernels.decode import api as decode_api
from pallas_kernels.flash import api as flash_api
from pallas_kernels.logits import Dropout, LogitSpec, Where


def oracle(q, k, v, do, *, mask=Full(), softcap=None, score=None, bias=None, sink=None,
           keep=None, dropout=0.0, dlse=None):
    """o, lse and the gradients of (do, dlse) by name, in float64."""
    q, k, v, do = (np.asarray(a, np.float64) for a in (q, k, v, do))
    (b, t, h, d), s, g = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    kk, vv = np.repeat(k, g, 2), np.repeat(v, g, 2)
    raw = np.einsum("bthd,bshd->bhts", q, kk) / np.sqrt(d)
    capped = softcap * np.tanh(raw / softcap) if softcap else raw
    i, j = np.arange(s - t, s)[:, None], np.arange(s)[None]
    heads = np.arange(h)[:, None, None]
    logit = capped
    if score is not None:
        logit = logit + np.asarray(score(heads, i[None], j[None]), np.float64)[None]
    if bias is not None:
        logit = logit + np.asarray(bias, np.float64)
    seen = np.broadcast_to(mask(heads, i[None], j[None]), (h, t, s))[None]
    e = np.where(seen, np.exp(logit), 0)
    out = 0 if sink is None else np.exp(np.asarray(sink, np.float64))[None, :, None]
    total = e.sum(-1) + out
    p = e / np.where(total > 0, total, 1)[..., None]
    kept = 1.0 if keep is None else np.asarray(keep) / (1 - dropout)
    o = np.einsum("bhts,bshv->bthv", p * kept, vv)
    with np.errstate(divide="ignore"):
        lse = np.log(total)
    dp = np.einsum("bthv,bshv->bhts", do, vv) * kept
    delta = (p * dp).sum(-1) - (0 if dlse is None else np.asarray(dlse, np.float64))
    ds = p * (dp - delta[..., None])
    grads = {"v": np.einsum("bhts,bthv->bshv", p * kept, do)}
    if bias is not None:
        axes = tuple(n for n in range(4) if bias.shape[n] == 1)
        grads["bias"] = ds.sum(axes, keepdims=True)
    if sink is not None:
        grads["sink"] = -(out / total * delta).sum((0, 2))
    ds = ds * (1 - (capped / softcap) ** 2 if softcap else 1) / np.sqrt(d)
    grads["q"] = np.einsum("bhts,bshd->bthd", ds, kk)
    grads["k"] = np.einsum("bhts,bthd->bshd", ds, q)
    for name in "kv":
        grads[name] = grads[name].reshape(b, s, h // g, g, -1).sum(3)
    return o, lse, grads


def attention(q, k, v, seen):
    """o [B,T,H,V] of the keys that are seen [T,S], in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    s = np.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    p = np.where(seen, np.exp(s - s.max(-1, keepdims=True)), 0)
    total = p.sum(-1, keepdims=True)
    return np.einsum("bhts,bshv->bthv", p / np.where(total > 0, total, 1), v)


def order(t, s):
    """What is seen [T,S] in causal order, aligned at the last token."""
    return np.arange(s)[None] <= np.arange(t)[:, None] + s - t


def by_keywords(f, *args, mask=None, scale=None, softcap=None, score=None, head=None,
                q_pos=None, kv_pos=None, q_segment=None, kv_segment=None, shift=0,
                dropout=0.0, key=None, batch=None, keep=None, everything=Full(),
                **options):
    """f(*args, spec=, where=, dropout=) of what stands in them, one by one; everything:
    the mask where there is none."""
    mask = everything if mask is None else mask
    if key is not None or keep is not None:
        options["dropout"] = Dropout(dropout, key, batch, keep)
    return f(*args, spec=LogitSpec(mask, scale, softcap, score),
             where=Where(q_pos, kv_pos, q_segment, kv_segment, head, shift), **options)


chunks = functools.partial(by_keywords, chunked.attend)
best = functools.partial(by_keywords, exact.attend)
blocks = functools.partial(by_keywords, chosen_blocks.attend)
flash, decode, blocks_kernel = (
    functools.partial(by_keywords, f, everything=None)
    for f in (flash_api.flash, decode_api.decode, blocks_api.blocks))
