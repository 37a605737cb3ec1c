"""Checkpoints: the folders in which models are published, read into models of this
library and written back.

    model, params = load("folder")            # config.json and *.safetensors
    logits = model.apply(params, tokens)
    save("another", model, params)

A folder's `config.json` names an architecture; what that one is in terms of `LM`, and
where its tensors stand among the parameters, is one entry of a table
(`models/checkpoint/architectures.py`). What is not supported is refused by its name.
"""

from models.checkpoint.loading import load, save

__all__ = ["load", "save"]
