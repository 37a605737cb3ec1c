"""Data: every dataset under one roof.

`dataset.batch(step, size)` is a dict of numpy arrays: tokens [B,T] and targets [B,T]
int32 (-1: no loss) and, where sequences are packed, segments [B,T] int32. It depends on
the dataset's fields, the step and the size alone.
"""

from experiments.data.corpus import Corpus
from experiments.data.dataset import Batch, Cycle, Dataset, Grown
from experiments.data.synthetic import Copy, Needles, Recall, mqar
from experiments.data.text import HuggingFace, Text

__all__ = [
    "Batch", "Copy", "Corpus", "Cycle", "Dataset", "Grown", "HuggingFace", "Needles",
    "Recall", "Text", "mqar",
]
