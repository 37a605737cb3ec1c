"""attn: the attention mechanisms of the long-sequence literature, side by side.

Every attention is a frozen dataclass in a file of its own name and has the same three
methods: `__call__(q, k, v)` for all tokens at once, `init_state` for an empty memory
and `step` for the next tokens. `from attn import Landmark` is `from attn.landmark
import Landmark`, and imports no other; `python -m attn` lists them all.

Exact attention       softmax, relative
Linear attention      lightning, retnet, gla, lightnet, based, delta, flow, essa,
                      lineartransformer, performer, cosformer, lara
Low rank              linformer, abc, nystrom, longshort
Weights of positions  positional
Recurrent             aaren, rat, s4d
Learned memories      titans, miras
One form for all      dsf, template
Fixed patterns        mixers
Sparse, retrieval     landmark, s2, routing, combiner, sinklora, topk, hip, moba,
                      nsa, flexprefill, seer, seerr, sea, prflash, local,
                      probsparse
Cache policies        streaming, h2o, tova, snapkv, pyramidkv, adakv, razor, duo,
                      quest, recycled, retrieval, actqkv, kivi, saq, cmr
Around them           layers, masks, positions, grid, baseconv, compose

Mechanisms that they share lie in folders: contract (what every attention is), exact,
sparse, recurrent, cache, and parallel (the mesh).
"""

import importlib
import pathlib
from typing import Any

__version__ = "0.1.0"

# what surrounds the attentions, and their named settings, by the file that has it
_AROUND = {
    "masks": ("BlockCausal", "Causal", "Full", "Mask", "Sink", "Window"),
    "positions": ("ALiBi", "HarmonicALiBi", "RoPE"),
    "layers": ("MultiHead",),
    "compose": ("Compose",),
    "miras": ("Memora", "Moneta", "Yaad"),
    "retrieval": ("HostKeys",),
}
_HOME = {name: file for file, names in _AROUND.items() for name in names}


def __getattr__(name: str) -> Any:
    """A class by its name, imported when it is asked for."""
    files = {path.stem for path in pathlib.Path(__file__).parent.glob("[a-z]*.py")}
    file = _HOME.get(name, name.lower())
    if name.startswith("_") or name in files or file not in files:
        raise AttributeError(f"attn has no {name}: python -m attn lists what there is")
    found = getattr(importlib.import_module(f"attn.{file}"), name, None)
    if found is None:
        raise AttributeError(f"attn has no {name}: attn/{file}.py has no such class")
    return found
