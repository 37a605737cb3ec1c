"""Many hosts: the same command on every host, and one run comes of it.

    python -m experiments.distributed --coordinator=host0:1234 --count=2 --index=0 \\
        lm --mesh='(2,2,2)' --folder=/shared/run

and the same with --index=1 on the second host. On TPU pods, under Slurm, Open MPI and
Kubernetes no option is needed. The mesh names the devices of all hosts. Every host
reads the same text, keeps the rows and tokens of its own devices and writes its own
part of a checkpoint, so the folder of the run must be one that all hosts see. Only the
first host prints and writes metrics.
"""

from __future__ import annotations

import contextlib
import os
import sys

import jax

from experiments.training.hosts import Hosts, join


def main(argv: list[str]) -> None:
    """Joins the hosts that the options name, then runs the experiment behind them."""
    from experiments import __main__ as experiments
    from experiments.cli import config

    at = next((n for n, word in enumerate(argv) if word[:2] != "--"), None)
    if at is None or "--help" in argv[:at]:
        print((__doc__ or "").strip())
        return
    experiments.check(argv[at:])  # the help, and a wrong name, need no other host
    try:
        join(config.read(Hosts, argv[:at]))
    except ValueError as error:
        print(f"experiments.distributed: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    with contextlib.ExitStack() as stack:
        if jax.process_index():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        experiments.main(argv[at:])


if __name__ == "__main__":
    main(sys.argv[1:])
