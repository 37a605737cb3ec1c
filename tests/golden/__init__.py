"""Golden vectors: arrays that the papers' own code produced, and one adapter a file.

`python -m tests.golden FILE.npz ...` runs the adapter `tests/golden/<slug>.py` of each
file and prints the relative error of every array.
"""
