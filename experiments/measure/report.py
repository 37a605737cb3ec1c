"""Report: the pictures and the page of `experiments.compare`, and other pictures."""

from __future__ import annotations

import base64
import html
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em;
       padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100% }
th, td { border-bottom: 1px solid #ddd; padding: .4em .6em; text-align: right }
th:first-child, td:first-child { text-align: left }
code { font-size: 13px; overflow-wrap: anywhere }
img { max-width: 100% }
"""


def recall_picture(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Recall against the bytes of memory a sequence."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for n, row in enumerate(rows):
        axes.scatter(row["recall_state"], row["recall"], s=70, color=f"C{n % 10}",
                     label=row["attention"], zorder=3)
    axes.axhline(max(row["chance"] for row in rows), color="gray", lw=1, ls=":",
                 label="chance")
    axes.set(xscale="log", ylim=(-0.03, 1.03), ylabel="recall (share of right answers)",
             xlabel="memory of a sequence after the task (bytes)",
             title="What is remembered, at what cost")
    _finish(figure, axes, path)


def loss_picture(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """The training loss on text against the tokens seen; a network once."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    shown = set()
    for n, row in enumerate(rows):
        if row["trained_as"] in shown:
            continue
        shown.add(row["trained_as"])
        tokens, losses = zip(*row["losses"])
        axes.plot(tokens, losses, color=f"C{n % 10}", label=row["trained_as"])
    axes.set(xlabel="tokens of training text", ylabel="loss (nats a token)",
             title="Learning to read")
    _finish(figure, axes, path)


def context_picture(scores: dict[str, dict], path: pathlib.Path) -> None:
    """Right answers against context, a line a mixer, a panel a task; scores: by task,
    mixer and context."""
    figure, panels = plt.subplots(1, len(scores), figsize=(4.5 * len(scores), 4.5),
                                  layout="constrained", squeeze=False)
    for axes, (task, each) in zip(panels[0], scores.items()):
        for name, by in each.items():
            axes.plot(list(by), list(by.values()), "o-", label=name)
        axes.set(xscale="log", title=task, xlabel="tokens that can meet",
                 ylabel="right answers", ylim=(0, 1.03))
        axes.set_xticks(list(by), [f"{at}" for at in by])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _finish(figure, axes, path: pathlib.Path) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, frameon=False,
                  loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def page(found: dict[str, Any], columns: dict, folder: pathlib.Path) -> None:
    """report.html: the table, the pictures, and the command that repeats each row."""
    cells = lambda tag, texts: "".join(
        f"<{tag}>{html.escape(text)}</{tag}>" for text in texts
    )
    head = cells("th", (title for title, _ in columns.values()))
    body = "\n".join(
        "<tr>" + cells("td", (text.format(row[name]) for name, (_, text)
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
    (folder / "report.html").write_text(f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Which attention remembers what</title><style>{STYLE}</style>
<h1>Which attention remembers what, at what cost</h1>
<p>Recall: the share of right answers in multi-query associative recall, read as a
stream. Text: bits per byte of the second half of held-out rows, token by token after
the first half was read at once. jax {html.escape(found["jax"])},
{html.escape(found["device"])}.</p>
<table><tr>{head}</tr>
{body}</table>
{pictures}
<h2>Run a row again</h2>
<ul>
{commands}
</ul>
<p>All of it: <code>{html.escape(found["command"])}</code></p>
</html>
""")


def _encoded(path: pathlib.Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
