"""The texts that ship with the demo, as exchanges (question, answer) and plain texts."""

from __future__ import annotations

import json
import random
from importlib import resources

Exchange = tuple[str, str]
DATA = resources.files("loki_plugin.demo") / "data"
NAMES = "Anna Ben Clara David Emma Felix Greta Henry".split()
THINGS = "lamp heater fan radio blind oven book kite boat clock letter knife".split()
PLACES = "kitchen bedroom bathroom hall garage cellar office attic garden market".split()


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


def reading(count: int, seed: int) -> list[Exchange]:
    """Short scenes with a question about them, made up from lists of words."""
    draw = random.Random(seed)
    exchanges = []
    for _ in range(count):
        n = draw.choice([1, 2])
        things, places, names = (draw.sample(x, n) for x in (THINGS, PLACES, NAMES))
        i = draw.randrange(n)
        scene = " ".join(
            draw.choice([f"The {t} of {m} is in the {p}.", f"In the {p} {m} has a {t}."])
            for t, p, m in zip(things, places, names, strict=True)
        )
        question, answer = draw.choice(
            [
                (f"Where is the {things[i]}?", places[i]),
                (f"What is in the {places[i]}?", things[i]),
                (f"Who has the {things[i]}?", names[i]),
                ("Name the things and where they are.", ", ".join(f"{t} in the {p}" for t, p in zip(things, places))),
                ("Name the places and who is there.", ", ".join(f"{p} of {m}" for m, p in zip(names, places))),
            ]
        )
        exchanges.append((f"{scene} {question}", answer))
    return exchanges


def skill(split: str) -> list[dict]:
    """The records of the new skill: `train` or `test`, each {"messages": [user, assistant]}."""
    return [json.loads(line) for line in _read(f"skill_{split}.jsonl").splitlines()]


def _read(name: str) -> str:
    return (DATA / name).read_text(encoding="utf-8")
