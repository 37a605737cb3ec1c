"""CAB: the seven tasks of the benchmark, small, what they are judged by, and how long a
sequence has to be for an attention to pay (Zhang et al., 2022) arXiv:2210.07661."""
