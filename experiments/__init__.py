"""Experiments: one file a claim, run with `python -m experiments.NAME`."""

import sys

from experiments.cli.usage import answer

if sys.argv[:1] == ["-m"]:  # python is still looking for the command: nothing is slow
    answer(sys.orig_argv)
