"""Config: a frozen dataclass whose printed form is its command line.

`command(config)` gives `python -m experiments.recall --steps=500`, and `main` reads
that line back, so that a row of a results table can be pasted to run it again.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import pathlib
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.cli import compile_cache, ending
from experiments.cli.bounds import STEPS, check_number, options
from experiments.cli.ending import one_sentence
from experiments.cli.fields import construct, default, coerce, hints, required, spelled
from experiments.cli.fields import unknown
from experiments.cli.format import same, format_value
from experiments.cli.identity import FIXED, FREE, GROWS, settings
from experiments.cli.parse import parse
from experiments.cli.usage import HELP, OPTIONS, formatted

__all__ = [
    "FREE", "GROWS", "STEPS", "command", "option", "main", "parse", "read",
    "format_value", "settings",
]


def option(
    default: Any = dataclasses.MISSING, doc: str = "", run: str = FIXED, least: int = 1,
    *, most: int | None = None, above: float | None = None,
) -> Any:
    """A field of a Config with its default (none: it must be given) and its help. run:
    whether a run that goes on has to have the same value (FIXED), may have a larger one
    (GROWS) or any (FREE). least, most: of a field of whole numbers, `least` 0 if it is
    by default. above: numbers are finite and greater."""
    least = 0 if type(default) is int and default == 0 else least
    known = {"doc": doc, "run": run, "least": least, "most": most, "above": above}
    return dataclasses.field(default=default, metadata=known)


def command(config: Any) -> str:
    """The shell command that runs `config` again. Defaults are left out."""
    cls: Any = type(config)
    words, known = ["python", "-m", _title(cls)], hints(cls)
    for field in dataclasses.fields(cls):
        value = getattr(config, field.name)
        if field.init and (required(field) or not same(value, default(field))):
            text = _written(value, known.get(field.name, Any))
            words.append(f"--{field.name}={shlex.quote(text)}")
    return " ".join(words)


def read(cls: type, argv: Sequence[str], start: Any = None) -> Any:
    """The config of class `cls` that the words `--field=value` describe.

    Fields that are not given come from `start`, or are the defaults. Raises ValueError.
    """
    known = hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    given: dict[str, Any] = {}
    for word in argv:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise ValueError(f"{word!r}: expected text in UTF-8")
    for name, text in _pairs(argv, known):
        if name not in fields:
            there_is = [f"--{n}" for n in (*fields, *OPTIONS)]
            raise ValueError(unknown("option", f"--{name}", there_is))
        if name in given:
            raise ValueError(f"--{name} is given twice")
        given[name] = _typed(name, text, known.get(name, Any), _module(cls))
        check_number(fields[name], given[name], known.get(name, Any), f"--{name}")
    if start is not None:
        given = {n: getattr(start, n) for n in fields} | given
    return construct(cls, [], given)


def main(
    run: Callable[[Any], dict],
    Config: type,
    doc: str | None = None,
    argv: Sequence[str] | None = None,
) -> dict:
    """The command line of an experiment: read the config, run it, print the numbers.

    Any error ends with one sentence on stderr: what a call or the machine lacks with
    exit code 2 or 1, Ctrl-C with 130, and what is an error of the program with 1 and a
    file that has its traceback. A number that is NaN ends with code 1 too.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    asked = {name for name in OPTIONS if f"--{name}" in words}
    if {*HELP} & {*words}:
        ending.Output().line(usage(Config, doc))
        raise SystemExit(0)
    words = [w for w in words if w[:2] != "--" or w[2:] not in OPTIONS]
    title, trace, output = _title(Config), "traceback" in asked, ending.Output()
    with one_sentence(title, True, trace):
        config = read(Config, words, _tiny(Config) if "tiny" in asked else None)
        output.line(command(config))
    with one_sentence(title, False, trace):
        compile_cache.use()
        result = run(config)
        ending.numbers(output, title, result)
        output.close()
        compile_cache.prune()
    return result


def usage(cls: type, doc: str | None = None) -> str:
    """The help of an experiment: its docstring, then each field and its default."""
    rows = []
    for field in dataclasses.fields(cls):
        kind = spelled(hints(cls).get(field.name, Any))
        value = "required" if required(field) else format_value(default(field))
        rows.append((f"--{field.name}={kind}", value, field.metadata.get("doc", "")))
    return formatted(_title(cls), doc, rows)


def _pairs(argv: Sequence[str], known: dict) -> Iterator[tuple[str, str]]:
    """(field, text) of `--field=text`, `--field text` and, for a bool, `--field`."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ValueError(f"cannot read {word!r}: expected --field=value")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and words and not words[0].startswith("--"):
            text = words.pop(0)
        elif not equals and known.get(name) is bool:
            text = "True"
        elif not equals and name in known:
            raise ValueError(f"--{name} has no value: expected --{name}=value")
        yield name, text


def _typed(name: str, text: str, hint: Any, module: types.ModuleType | None) -> Any:
    """The text of a field as its annotation has it."""
    if _is_words(hint):
        return coerce(_word(text, hint), hint, f"--{name}", text)
    try:
        value = parse(text, module)
    except ValueError as error:
        plain = {*options(hint)} <= {bool, int, float, type(None)}
        if plain and "64 bits" not in str(error):
            raise ValueError(f"--{name}={text}: expected {spelled(hint)}") from None
        raise ValueError(f"--{name}: {error}") from error
    return coerce(value, hint, f"--{name}", text)


def _is_words(hint: Any) -> bool:
    """Whether a field takes its text as it stands: it is a string, a path or None."""
    kinds = {*options(hint)} - {type(None)}
    return bool(kinds) and all(
        o in (str, pathlib.Path)
        or typing.get_origin(o) is typing.Literal
        and all(isinstance(a, str) for a in typing.get_args(o))
        for o in kinds
    )


def _word(text: str, hint: Any) -> str | None:
    """The text, without its quotes if it has them; None where the field can be None."""
    if text == "None" and type(None) in options(hint):
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        with contextlib.suppress(SyntaxError, ValueError):
            return str(ast.literal_eval(text))
    return text


def _written(value: Any, hint: Any) -> str:
    """The text of a field's value, without quotes where the field needs none."""
    if value is None or not _is_words(hint) or _word(str(value), hint) != str(value):
        return format_value(value)
    return str(value)


def _module(cls: type) -> types.ModuleType | None:
    return sys.modules.get(cls.__module__)


def _title(cls: type) -> str:
    """The name of the experiment for `python -m`."""
    if cls.__module__ != "__main__":
        return cls.__module__
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    own = pathlib.Path(getattr(main, "__file__", None) or "experiment").stem
    return spec.name if spec else f"experiments.{own}"


def _tiny(cls: type) -> Any:
    tiny = getattr(_module(cls), "TINY", None)
    if tiny is None:
        raise ValueError(f"--tiny: {_title(cls)} has no TINY config")
    return tiny
