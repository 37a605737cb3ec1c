"""Experiments: one file a claim, run with `python -m experiments.NAME`."""
