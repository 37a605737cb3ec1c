"""Progress where a bar can move and where it cannot."""

import sys
import types

from experiments.training import progress as module
from experiments.training.progress import notebook, progress


def test_a_line_every_few_seconds(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("text", 1000, 0, quiet=False) as show:
        for step in range(1, 1001):
            now[0] += 0.1
            show(step, 2.5, 1e4)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 12
    assert lines[0] == "text 1/1000 steps: loss 2.500, 10,000 tok/s"
    assert lines[-1].startswith("text 1000/1000")
    with progress("text", 2, 0, quiet=True) as show:
        show(1, 1.0, 1.0)
    assert capsys.readouterr().err == ""


def test_a_notebook_is_no_terminal(monkeypatch):
    assert not notebook()
    for name, inside in (("ZMQInteractiveShell", True), ("Shell", True),
                         ("TerminalInteractiveShell", False)):
        shell = type(name, (), {})()
        fake = types.SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", fake)
        assert notebook() == inside


def test_a_closed_error_stream_is_no_error(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with progress("text", 2, 0, quiet=False) as show:
        show(1, 1.0, 1.0)
