"""Report: the pictures and the page of `experiments.compare`, and other pictures.

What several seeds gave is drawn: a point at the median, a line from the least to the
greatest. Rows differ by shape as well as by colour.
"""

from __future__ import annotations

import base64
import html
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from experiments.measure.provenance import sentence

if "matplotlib.pyplot" not in sys.modules:  # else it is a notebook's, with its pictures
    matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

SHAPES = "os^Dv*PXp<>hd8H"  # of which no two look alike, nor rows n and n + 10
LINES = ("-", "--", "-.", ":")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em;
       padding: 0 1em; color: #222 }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th, td { border-bottom: 1px solid #ddd; padding: .4em .6em; text-align: right }
th:first-child, td:first-child { text-align: left; min-width: 12em }
td { white-space: pre-line; font-variant-numeric: tabular-nums }
code { font-size: 13px; overflow-wrap: anywhere }
img { max-width: 100% }
"""


def style(n: int) -> dict[str, Any]:
    """The colour and the shape of row n."""
    return {"color": f"C{n % 10}", "marker": SHAPES[n % len(SHAPES)]}


def cell(row: dict[str, Any], name: str, text: str) -> str:
    """A number of a row, and under it the least and the greatest of its seeds, or what
    several seeds have given that are shipped: the median, the least and the greatest.
    """
    values, known = row.get(f"{name}_seeds", ()), row.get(f"{name}_shipped", ())
    shown = text.format(row[name])
    if known:
        shown += f"\n{text.format(np.median(known))}: {_spread(known, text)}"
    elif len(values) > 1 and min(values) != max(values):
        shown += f"\n{_spread(values, text)}"
    return shown


def _spread(values: Sequence[float], text: str) -> str:
    return f"{text.format(min(values))} to {text.format(max(values))}"


def recall_picture(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Recall against the bytes of memory a sequence, of all seeds, shipped ones too."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for n, row in enumerate(rows):
        values = [row["recall"], *row["recall_seeds"], *row.get("recall_shipped", ())]
        axes.vlines(row["recall_state"], min(values), max(values), color=f"C{n % 10}",
                    lw=1.5, zorder=2)
        axes.plot(row["recall_state"], row["recall"], ls="", ms=9, zorder=3,
                  label=row["attention"], **style(n))
    axes.axhline(max(row["chance"] for row in rows), color="gray", lw=1, ls=":",
                 label="chance")
    axes.set(xscale="log", ylim=(-0.03, 1.03), ylabel="recall (share of right answers)",
             xlabel="memory of a sequence after the task (bytes)",
             title="What is remembered, at what cost")
    _numbers(axes, [row["recall_state"] for row in rows])
    _finish(figure, axes, path)


def loss_picture(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """The training loss on text against the tokens seen, a network once: the median of
    its seeds, and between the least and the greatest a shade."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    shown = set()
    for n, row in enumerate(rows):
        if row["trained_as"] in shown:
            continue
        shown.add(row["trained_as"])
        tokens = [at for at, _ in row["losses"][0]]
        losses = np.array([[loss for _, loss in seed] for seed in row["losses"]])
        axes.plot(tokens, np.median(losses, 0), label=row["trained_as"],
                  ls=LINES[n % len(LINES)], markevery=0.2, **style(n))
        if len(losses) > 1:
            axes.fill_between(tokens, losses.min(0), losses.max(0), alpha=0.2,
                              color=f"C{n % 10}", lw=0)
    axes.set(xlabel="tokens of training text", ylabel="loss (nats a token)",
             title="Learning to read")
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    _finish(figure, axes, path)


def context_picture(scores: dict[str, dict], path: pathlib.Path) -> None:
    """Right answers against context, a line a mixer, a panel a task; scores: by task,
    mixer and context."""
    figure, panels = plt.subplots(1, len(scores), figsize=(4.5 * len(scores), 4.5),
                                  layout="constrained", squeeze=False)
    for axes, (task, each) in zip(panels[0], scores.items()):
        for n, (name, by) in enumerate(each.items()):
            axes.plot(list(by), list(by.values()), label=name,
                      ls=LINES[n % len(LINES)], **style(n))
        axes.set(xscale="log", title=task, xlabel="tokens that can meet",
                 ylabel="right answers", ylim=(0, 1.03))
        axes.set_xticks(list(by), [f"{at}" for at in by])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plain(value: float, _: Any = None) -> str:
    return f"{value:,.0f}"


def _numbers(axes, values: list[float]) -> None:
    """Ticks of a logarithmic axis as numbers: 1, 2 and 5 times powers of ten."""
    low, high = min(values) / 1.3, max(values) * 1.3
    steps = [m * 10**p for p in range(0, 16) for m in (1, 2, 5)]
    ticks = [s for s in steps if low <= s <= high]
    if len(ticks) > 1:
        axes.set_xticks(ticks)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(figure, axes, path: pathlib.Path) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, frameon=False,
                  loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def page(found: dict[str, Any], columns: dict, folder: pathlib.Path) -> str:
    """The text of report.html: the table, the pictures, what they were made by and
    when, what has not converged, and the command that repeats each row."""
    cells = lambda tag, texts: "".join(
        f"<{tag}>{html.escape(text)}</{tag}>" for text in texts
    )
    head = cells("th", (title for title, _ in columns.values()))
    body = "\n".join(
        "<tr>" + cells("td", (cell(row, name, text) for name, (_, text)
                              in columns.items())) + "</tr>"
        for row in found["rows"]
    )
    pictures = "\n".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{_encoded(folder / name)}">'
        for name in ("recall.png", "loss.png")
    )
    commands = "\n".join(
        f"<li>{html.escape(row['attention'])}<br>"
        + "<br>".join(f"<code>{html.escape(c)}</code>" for c in row["commands"])
        for row in found["rows"]
    )
    open_ends = "".join(
        f"<li>{html.escape(row['attention'])}: {html.escape(row['not_converged'])}"
        for row in found["rows"] if row.get("not_converged")
    )
    unsettled = f"<h2>Not converged</h2>\n<ul>{open_ends}</ul>" if open_ends else ""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Which attention remembers what</title><style>{STYLE}</style>
<h1>Which attention remembers what, at what cost</h1>
<p>Recall: the share of right answers in multi-query associative recall, read as a
stream. Text: bits per byte of the second half of held-out rows, token by token after
the first half was read at once. Of several seeds the median, and under it the least
and the greatest. {html.escape(sentence(found))}.</p>
<div class="wide"><table><tr>{head}</tr>
{body}</table></div>
{unsettled}
{pictures}
<h2>Run a row again</h2>
<ul>
{commands}
</ul>
<p>All of it: <code>{html.escape(found["command"])}</code></p>
</html>
"""


def _encoded(path: pathlib.Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
