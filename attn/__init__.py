"""attn: the attention mechanisms of the long-sequence literature, side by side.

Every attention is a frozen dataclass in a file of its own name and has the same three
methods: `__call__(q, k, v)` for all tokens at once, `init_state` for an empty memory
and `step` for the next tokens. Import one by `from attn.landmark import Landmark`.

Mechanisms            contract, exact, parallel, sparse, recurrent, cache
Exact attention       softmax
Linear attention      lightning, retnet, gla, lightnet, based, delta, flow, essa,
                      lineartransformer
Low rank              linformer
Recurrent             aaren, rat
One form for all      dsf, template
Fixed patterns        mixers
Sparse, retrieval     landmark
Cache compression     snapkv
Around them           masks, positions, grid, layers, baseconv
"""
