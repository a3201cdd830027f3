"""The texts that ship with the demo, as exchanges (question, answer) and plain texts."""

from __future__ import annotations

import json
from importlib import resources

Exchange = tuple[str, str]
DATA = resources.files("demo") / "data"


def topics() -> list[dict]:
    """The topics of general knowledge, each with its phrasings and its facts."""
    return [json.loads(line) for line in _read("knowledge.jsonl").splitlines()]


def questions(held_out: bool = False) -> list[Exchange]:
    """All facts as questions: in the phrasings the base learns, or in the one it never sees."""
    return [
        (phrasing.format(x=x), y)
        for topic in topics()
        for phrasing in ([topic["asked_held_out"]] if held_out else topic["asked"])
        for x, y in topic["facts"].items()
    ]


def paragraphs() -> list[str]:
    """The general text."""
    return [" ".join(p.split()) for p in _read("text.txt").split("\n\n")]


def statements() -> list[str]:
    """All facts as sentences."""
    sentences = [
        topic["stated"].format(x=x, y=y) for topic in topics() for x, y in topic["facts"].items()
    ]
    return [s[0].upper() + s[1:] for s in sentences]


def task(split: str) -> list[Exchange]:
    """What the base cannot do: say what kind of thing something is.

    `test` asks about things, and in words, that `train` does not have.
    """
    records = [json.loads(line)["messages"] for line in _read(f"skill_{split}.jsonl").splitlines()]
    return [(user["content"], assistant["content"]) for user, assistant in records]


def _read(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")
