"""Convolution: `flax.linen.Conv` of images for loops on a CPU, by matrix products.

Inside `lax.scan` XLA's convolutions are slow on a CPU: a training of SR3 as one program
(`experiments.training.scanned`) takes several times as long with them as where the
pixels under a kernel lie side by side and meet it in one product. Outside of a loop
XLA's are faster: this one is for networks that are trained, or sampled, in loops.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from attn.contract.dispatch import platform


def convolved(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any,
              **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` as `nn.Conv` calls it: x [B,h,w,..,C] and kernel
    [n,m,..,C,O] -> [B,h',w',..,O]. On a CPU by products, but for dilation and groups,
    which are XLA's everywhere; elsewhere XLA's."""
    sizes, width = kernel.shape[:-2], kernel.shape[-2]
    dilated = any(n != 1 for name in ("lhs_dilation", "rhs_dilation")
                  for n in options.get(name) or ())
    if platform() != "cpu" or dilated or x.shape[-1] != width:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], sizes, strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    counts = [(length - n) // by + 1
              for length, n, by in zip(x.shape[1:-1], sizes, strides)]
    under = [  # each [B,h',w',..,C], what one of the kernel's pixels meets
        x[:, *(slice(i, i + by * (count - 1) + 1, by)
               for i, by, count in zip(at, strides, counts))]
        for at in itertools.product(*map(range, sizes))]
    flat = kernel.reshape(math.prod(sizes) * width, -1)  # [n m .. C,O]
    return jnp.matmul(jnp.concatenate(under, -1), flat,
                      precision=options.get("precision"))


Conv = functools.partial(nn.Conv, conv_general_dilated=convolved)
