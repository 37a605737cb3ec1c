"""Text from a model: a folder of a hub, a model by its name there, or a run of ours.

The answer comes as it is drawn. Sampling and stop tokens are those of the folder unless
they are said; any attention or cache of this library can stand where the model has
exact attention.

    python -m experiments.generate --model=FOLDER --prompt='The cat'
    python -m experiments.generate --model=Qwen/Qwen3-0.6B --chat      # needs '.[hf]'
    python -m experiments.generate --model=FOLDER --batch=prompts.txt  # JSON lines
    python -m experiments.generate --model=results/mine --policy='SnapKV(capacity=256)'

`--tiny` takes a second on 2 cores: a model of three layers with random weights that the
tests have. A folder without a tokenizer takes and gives ids: `--prompt='5 7 9'`.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from typing import Any, Iterator

import jax

from experiments.cli import config
from experiments.cli.config import FREE, option
from experiments.sources import SHIPPED, Loaded, loaded
from models.generate import generate
from models.sampling import Sampling
from models.session import Session
from models.swap import swapped

FOLDERS = pathlib.Path(__file__).parents[1] / "tests" / "checkpoints"


SPARE = 1024  # tokens that a conversation grows by before all of it is read again


@dataclasses.dataclass(frozen=True)
class Config:
    """One model and what it goes on from."""

    model: str = option(SHIPPED, "folder, name on the hub, folder of a run, or small")
    prompt: str = option("", "the text that it goes on from", FREE)
    chat: bool = option(False, "a conversation, a line a turn, until the input ends",
                        FREE)
    batch: pathlib.Path | None = option(
        None, "file with a prompt a line: a line of JSON for each", FREE)
    length: int = option(128, "most tokens of an answer", FREE)
    samples: int = option(1, "answers to the prompt, from one reading of it", FREE)
    attention: tuple | None = option(
        None, "instead of the exact ones: one, or one a layer", FREE)
    policy: Any = option(None, "instead of all exact ones that see everything", FREE)
    temperature: float | None = option(
        None, "0 takes the likeliest (None: the model's)", FREE, 0)
    top_k: int | None = option(None, "of so many tokens (None: the model's)", FREE)
    top_p: float | None = option(None, "of so much chance (None: the model's)", FREE)
    min_p: float | None = option(
        None, "of those so likely beside the likeliest (None: the model's)", FREE)
    seed: int = option(0, "of sampling", FREE)

    def __post_init__(self):
        asked = [bool(self.prompt), self.chat, self.batch is not None]
        if sum(asked) != 1:
            raise ValueError("expected one of --prompt, --chat and --batch")
        if self.attention and self.policy:
            raise ValueError("expected one of --attention and --policy")
        Sampling(
            self.temperature or 0.0, self.top_k, self.top_p, self.min_p).checked()


TINY = Config(model=str(FOLDERS / "llama"), prompt="5 7 9", length=4)


def run(config_: Config) -> dict[str, Any]:
    """Writes -> tokens a second of prompt and answer, bytes of the memory."""
    found = loaded(config_.model)
    model = swapped(found.model, config_.attention, config_.policy)
    found = found._replace(model=model)
    how, words = sampling(config_, found.defaults.how), found.defaults.missing
    if words:
        print(f"generation_config.json asks for {', '.join(words)}, which is not there "
              "yet: sampled without", file=sys.stderr)
    if config_.chat:
        return converse(config_, found, how)
    if config_.batch is not None:
        return answers(config_, found, how)
    return answer(config_, found, how)


def answer(config_: Config, found: Loaded, how: Sampling) -> dict[str, Any]:
    """One prompt, shown as it is drawn; several samples one behind the other."""
    ids = found.text.encode(config_.prompt)
    session = Session(found.model, found.params, limit=found.limit)
    if not ids:
        raise ValueError(f"prompt={config_.prompt!r} has no tokens: expected one")
    _check_length(len(ids), found)
    session.warm(len(ids), config_.length, how)
    clock = time.perf_counter()
    session.read(ids, config_.length)
    jax.block_until_ready(session.logits)
    spent, memory = time.perf_counter() - clock, session.state_bytes
    if config_.samples > 1:
        session = session.fork(config_.samples)
        session.compiled(how)
    pieces = session.write(config_.length, how, found.defaults.stop, config_.seed)
    if config_.samples == 1:
        print(config_.prompt, end="", flush=True)
        new, rate = shown(pieces, found.text)
    else:
        rows: list[list[int]] = [[] for _ in range(config_.samples)]
        clock = time.perf_counter()
        for piece in pieces:
            for row, more in zip(rows, piece):
                row += more
        new = [token for row in rows for token in row]
        rate = len(new) / (time.perf_counter() - clock)
        for row in rows:
            print(f"{config_.prompt}{found.text.decode(row)}\n")
    return {"prompt_tokens": len(ids), "prompt_tokens_per_second": len(ids) / spent,
            "new_tokens": len(new), "tokens_per_second": rate, "state_bytes": memory}


def shown(pieces: Iterator[list[list[int]]], text: Any) -> tuple[list[int], float]:
    """Prints what is drawn as soon as its letters are whole -> the ids, and tokens a
    second."""
    ids: list[int] = []
    done, clock = 0, time.perf_counter()
    for piece in pieces:
        ids += piece[0]
        whole = text.decode(ids)
        if not whole.endswith("\ufffd"):  # half a letter
            print(whole[done:], end="", flush=True)
            done = len(whole)
    print(text.decode(ids)[done:], flush=True)
    return ids, len(ids) / (time.perf_counter() - clock)


def converse(config_: Config, found: Loaded, how: Sampling) -> dict[str, Any]:
    """A conversation: each turn reads what is new; all of it is read again only when
    more than SPARE tokens have come, or a template changes what was said."""
    if not hasattr(found.text, "chat"):
        raise ValueError(f"{config_.model} has no tokenizer with a chat_template: "
                         "expected --prompt")
    session = Session(found.model, found.params, limit=found.limit)
    history: list[dict[str, str]] = []
    turns, fresh, drawn, rate = 0, 0, 0, 0.0
    said = ""  # the text that the session holds
    for line in _lines():
        history.append({"role": "user", "content": line})
        text = found.text.rendered(history)
        goes_on = bool(said) and text.startswith(said)
        ids = found.text.encode(text[len(said) if goes_on else 0:], special=False)
        _check_length(len(session.ids) * goes_on + len(ids), found)
        ids = session.ids + ids if goes_on else ids
        fresh += session.follow(ids, config_.length, SPARE)
        pieces = session.write(
            config_.length, how, found.defaults.stop, config_.seed + turns)
        new, rate = shown(pieces, found.text)
        history.append({"role": "assistant", "content": found.text.decode(new)})
        said = text + history[-1]["content"]
        turns, drawn = turns + 1, drawn + len(new)
    return {"turns": turns, "tokens_read": fresh, "new_tokens": drawn,
            "tokens_per_second": rate,
            "state_bytes": session.state_bytes if turns else 0}


def _lines() -> Iterator[str]:
    """What a person types, or the lines of a file; empty ones are passed over."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def answers(config_: Config, found: Loaded, how: Sampling) -> dict[str, Any]:
    """A line of JSON for each prompt of a file, in its order."""
    assert config_.batch is not None
    lines = config_.batch.read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"batch={config_.batch} is empty: expected a prompt a line")
    ids = [found.text.encode(prompt) for prompt in prompts]
    _check_length(max(map(len, ids)), found)
    clock = time.perf_counter()
    length, longest = config_.length, max(map(len, ids))
    if found.limit is not None:
        length = min(length, found.limit - longest)
    rows = generate(
        found.model, found.params, ids, length=length, seed=config_.seed,
        stop=found.defaults.stop, **how._asdict(),
    )
    spent = time.perf_counter() - clock
    for prompt, new in zip(prompts, rows):
        print(json.dumps({"prompt": prompt, "answer": found.text.decode(new)},
                         ensure_ascii=False), flush=True)
    count = sum(map(len, rows))
    return {"prompts": len(prompts), "new_tokens": count,
            "tokens_per_second": count / spent}


def _check_length(tokens: int, found: Loaded) -> None:
    if found.limit is not None and tokens >= found.limit:
        raise ValueError(f"the prompt has {tokens} tokens: expected fewer than "
                         f"{found.limit}, the length of the model")


def sampling(config_: Config, theirs: Sampling) -> Sampling:
    """The model's sampling, with what the command says."""
    own = {name: getattr(config_, name) for name in Sampling._fields}
    return theirs._replace(**{k: v for k, v in own.items() if v is not None}).checked()


if __name__ == "__main__":
    config.main(run, Config, __doc__, sys.argv[1:])
