"""Pallas kernels: arrays and Python values in, arrays out; nothing of `attn` is known
here. A kernel that cannot do what it is asked raises `Refused` in its entry function.
"""


class Refused(NotImplementedError):
    """A kernel's refusal, with its reason: "D=512: at most 256"."""
