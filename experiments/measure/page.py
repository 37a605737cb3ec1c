"""A page of results: a section for each command whose results stand on it."""

from __future__ import annotations

import pathlib

MARK = "## "


def write(path: str, title: str, command: str, body: str) -> None:
    """Puts the results of a command on a page (Markdown), in the place of what the
    section of this title had said, or at the end. A text between the section's title
    and its command stays. OSError if it cannot be written."""
    page = pathlib.Path(path)
    parts = page.read_text().split(f"\n{MARK}") if page.exists() else ["# Results"]
    fresh = f"    {command}\n\n{body}\n"
    for n, part in enumerate(parts[1:], 1):
        if part.partition("\n")[0] == title:
            said = part.partition("\n    ")[0].rstrip("\n")
            parts[n] = f"{said}\n\n{fresh}"
            break
    else:
        parts[-1] = parts[-1].rstrip("\n") + "\n"
        parts.append(f"{title}\n\n{fresh}")
    page.write_text(f"\n{MARK}".join(parts))
