"""The model that ships: a Llama of 3.1 million parameters that reads Python.

    from models.small import load
    model, params, tokenizer = load()
    tokens = jnp.asarray([tokenizer.encode("def main():")])
    logits = model.apply(params, tokens)             # [1,T,2048]

4 layers of exact attention, 8 heads with keys of their own (so that a head is a head of
queries and keys alike when heads are looked at one by one), rotation, 1,024 tokens,
2,047 byte pairs and a token that a text begins with. It is small enough for every
analysis of this library to run on a laptop in minutes, and trained until it copies:
how, on what and with what result stands in `README.md` beside it. `FOLDER` is a folder
as a hub has it, which all commands take as `--model`.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp

from models import checkpoint
from models.checkpoint.tokenizer import Tokenizer

FOLDER = pathlib.Path(__file__).parent


class Small(NamedTuple):
    """The network, its parameters {"params": ...} and its tokenizer."""

    model: Any
    params: Any
    tokenizer: Tokenizer


def load(dtype: Any = jnp.float32, mesh: Any = None) -> Small:
    """The model that ships. dtype: of the computation; parameters are bfloat16. mesh:
    as `models.checkpoint.load` takes it. ImportError without the extra `checkpoints`.
    """
    model, params = checkpoint.load(FOLDER, mesh=mesh, dtype=dtype)
    return Small(model, params, Tokenizer(FOLDER, model.vocab))
