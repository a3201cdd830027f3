"""What is taught: records of the data folder as token ids, to learn from and to be tested on."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.real.data import Data
from benchmarks.real.scoring import Asked
from loki_plugin.analysing.calibration.rendering import chat


@dataclass
class Task:
    """A task for one base and seed.

    Attributes:
        learned: drawn from in training.
        tested: held out; for new facts, what was taught, asked.
        accepts: what a call may be, per tested sequence (BFCL); empty: only the target itself.
    """

    name: str
    learned: list[Asked]
    tested: list[Asked]
    accepts: list[list[dict]] = field(default_factory=list)


@dataclass(frozen=True)
class Kind:
    """How a task is made, and where arms are compared.

    Attributes:
        make: (data, tokenizer, random source, how many are tested) -> the task.
        loss: the held-out loss at which arms are compared.
        score: the held-out score at which they are compared; None: the base is too small for any.
        without: a kind of text that is the same source, and is not measured.
    """

    make: Callable[[Data, object, random.Random, int], Task]
    loss: float
    score: float | None
    without: str | None = None


def dialogue(tokenizer, messages: Sequence[tuple[str, str]], answer: str) -> Asked:
    """A dialogue that ends with `answer` and the token that ends it; both are targets."""
    given = chat(tokenizer, list(messages), "a task")
    said = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return Asked([*given, *said, tokenizer.eos_token_id], len(given))


def cloze(tokenizer, prompt: str, ending: str) -> Asked:
    """Plain text whose `ending`, behind a space, is the target."""
    given = tokenizer(prompt)["input_ids"]
    return Asked(given + tokenizer(f" {ending}", add_special_tokens=False)["input_ids"], len(given))


def call(name: str, arguments: dict) -> str:
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def _snips(data: Data, tokenizer, draw: random.Random, tested: int) -> Task:
    """A command in plain words becomes a call in JSON."""

    def coded(rows):
        return [dialogue(tokenizer, [("user", r["text"])], call(r["label"], r["slots"]))
                for r in rows]  # fmt: skip

    learned = data.records("cls_snips_train")
    known = {r["text"] for r in learned}
    held = [r for r in data.records("cls_snips_test") if r["text"] not in known]
    return Task("snips", coded(learned), coded(_fixed(held, tested)))


def _calls(data: Data, tokenizer, draw: random.Random, tested: int) -> Task:
    """A question and the functions that may be called; toolsets of the test are unseen."""

    def coded(rows):
        found = []
        for r in rows:
            tools = "You can call these functions: " + json.dumps(r["tools"], ensure_ascii=False)
            asked = [("system", tools), *((m["role"], m["content"]) for m in r["messages"])]
            target = json.dumps(r["target"], ensure_ascii=False)
            found.append((dialogue(tokenizer, asked, target), r["accept"]))
        return [(a, accept) for a, accept in found if len(a.ids) <= _LONGEST]

    held = _fixed(coded(data.records("fc_bfcl_test")), tested)
    return Task(
        "bfcl",
        [a for a, _ in coded(data.records("fc_bfcl_train"))],
        [a for a, _ in held],
        [accept for _, accept in held],
    )


def _facts(data: Data, tokenizer, draw: random.Random, tested: int) -> Task:
    """Recent facts, asked and answered; tested on those that were taught."""
    rows = draw.sample(data.records("newfacts_wikidyk"), _FACTS)
    learned = [dialogue(tokenizer, [("user", r["question"])], r["answer"]) for r in rows]
    return Task("wikidyk", learned, learned[:tested])


def _edits(data: Data, tokenizer, draw: random.Random, tested: int) -> Task:
    """Statements that are new because they are not true; tested in other words."""
    rows = [r for r in data.records("newfacts_counterfact_2000") if r["fluent"]]
    rows = draw.sample(rows, _FACTS)
    return Task(
        "counterfact",
        [cloze(tokenizer, r["prompt"], r["target_new"]) for r in rows],
        [cloze(tokenizer, r["rephrase"], r["target_new"]) for r in rows[:tested]],
    )


def _intents(data: Data, tokenizer, draw: random.Random, tested: int) -> Task:
    """A bank customer's question gets one of 77 labels."""

    def coded(rows):
        return [dialogue(tokenizer, [("user", r["text"])], r["label"].replace("_", " "))
                for r in rows]  # fmt: skip

    held = _fixed(data.records("cls_banking77_test"), tested)
    return Task("banking77", coded(data.records("cls_banking77_train")), coded(held))


def _maths(data: Data, tokenizer, draw: random.Random, tested: int) -> Task:
    """Word problems with their steps; small models cannot solve them, so the loss counts."""

    def coded(rows):
        found = [dialogue(tokenizer, [("user", r["question"])],
                          re.sub(r"<<.*?>>", "", r["answer"])) for r in rows]  # fmt: skip
        return [a for a in found if len(a.ids) <= _LONGEST]

    held = _fixed(coded(data.records("math_gsm8k_test")), tested)
    return Task("gsm8k", coded(data.records("math_gsm8k_train_2000")), held)


def _fixed(rows: list, count: int) -> list:
    """The same held-out ones for every seed."""
    return random.Random(0).sample(rows, min(count, len(rows)))


def make(name: str, data: Data, tokenizer, seed: int, tested: int) -> Task:
    """The task `name`; the seed draws what is taught where not everything is."""
    if name not in TASKS:
        raise ValueError(f"no task is called '{name}'; there are {', '.join(TASKS)}")
    return TASKS[name].make(data, tokenizer, random.Random(f"{name}/{seed}"), tested)


def accepted(said: str, accept: Sequence[dict]) -> bool:
    """Whether what was said is a list of calls that `accept` allows, in any order.

    `accept` has for each call {name: {argument: [allowed values]}}; "" among the values allows to
    leave the argument out.
    """
    try:
        calls = json.loads(said)
    except ValueError:
        return False
    if not isinstance(calls, list) or len(calls) != len(accept):
        return False
    left = list(accept)
    for one in calls:
        fit = next((a for a in left if _fits(one, a)), None)
        if fit is None:
            return False
        left.remove(fit)
    return True


def _fits(one: object, accept: dict) -> bool:
    if not isinstance(one, dict) or not isinstance(one.get("arguments"), dict):
        return False
    allowed = accept.get(one.get("name"))
    if allowed is None or not set(one["arguments"]) <= set(allowed):
        return False
    return all(
        _among(one["arguments"][k], v) if k in one["arguments"] else "" in v
        for k, v in allowed.items()
    )


def _among(value: object, allowed: list) -> bool:
    return any(_plain(value) == _plain(a) for a in allowed)


def _plain(value):
    """Texts compare without case, spaces and punctuation, as BFCL's own checker does.

    In nested objects each value of `allowed` is a list of alternatives: the first one stands.
    """
    if isinstance(value, str):
        return re.sub(r"[ ,./\-_*^']", "", value).lower()
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v[0] if isinstance(v, list) and v else v) for k, v in value.items()}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


_LONGEST = 256  # tokens of a sequence; longer ones are left out, none is cut
_FACTS = 160
TASKS: dict[str, Kind] = {
    "snips": Kind(_snips, 0.4, 0.3),
    "bfcl": Kind(_calls, 0.2, 0.3),
    "wikidyk": Kind(_facts, 3.2, None),
    "counterfact": Kind(_edits, 6.5, None),
    "banking77": Kind(_intents, 2.4, 0.3),
    "gsm8k": Kind(_maths, 1.1, None, without="maths"),
}
