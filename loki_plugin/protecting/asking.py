"""What people ask, by a base that knows no turns: it goes on with a list of such things.

A chat template would tell the model that a user speaks; without one a list does it (Self-Instruct,
arXiv 2212.10560). What it writes is as sensible as the base is, and only its words are taken.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

from ..analysing.calibration.rendering import plain_ids

_HEAD = "Things that people ask an assistant, one in each line.\n\n"
_MARK = "- "
# Of different kinds: the base goes on in that manner.
_EXAMPLES = (
    "How do I get red wine out of a white shirt?",
    "Write a short poem about the first day of school.",
    "Why is the sky blue?",
    "My neighbour plays loud music at night. What can I say to him?",
    'Translate "Where is the station?" into Spanish.',
    "Who wrote Hamlet?",
    "Give me three ideas for a cheap dinner with rice.",
    "What does a Python decorator do?",
    "Is it safe to eat mushrooms from the garden?",
    "Sum up the causes of the First World War in two sentences.",
)
_SHOWN = 5
_LONGEST = 200  # letters of what is asked; more is rather a text than a question
A_LIST = 4  # how many things a list goes on with, about


def lists(tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Token ids of `count` beginnings of a list, each with other examples, up to a new mark."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        shown = "".join(f"{_MARK}{line}\n" for line in draw.sample(_EXAMPLES, _SHOWN))
        found.append(plain_ids(tokenizer, _HEAD + shown + _MARK.rstrip(), open_end=True))
    return found


def asked_in(written: Iterable[str], count: int) -> list[str]:
    """At most `count` distinct things that were asked, in turn of each list that was gone on with.

    The last line of a list is left out, for nothing tells whether it is whole.
    """
    found: list[Sequence[str]] = []
    for text in written:
        first, *others = text.split("\n")[:-1] or [""]
        lines = [first, *(x.removeprefix(_MARK) for x in others if x.startswith(_MARK))]
        found.append([x.strip() for x in lines if 0 < len(x.strip()) <= _LONGEST])
    longest = max(map(len, found), default=0)
    turns = (lines[n] for n in range(longest) for lines in found if n < len(lines))
    distinct = dict.fromkeys(line for line in turns if line not in _EXAMPLES)
    return list(distinct)[:count]
