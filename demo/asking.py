"""What the pretrained model of the demo knows and does, before and after.

Twenty questions, answered greedily through its chat template; facts as sentences to be ended;
multiple choice; KL(base || tuned) on its own answers and on plain text; the orders it has to learn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.real.scoring import Asked, Reference, answers, score
from benchmarks.real.tasks import cloze, dialogue
from loki_plugin.analysing.calibration.prompts import load_prompts
from loki_plugin.analysing.calibration.rendering import chat
from loki_plugin.analysing.calibration.sources import load_records

from . import corpus, orders

DATA = resources.files("demo") / "data"
TOKENS = 28  # of an answer
PARTS = ("answers", "distance", "facts", "choices", "orders")
SHOWN = 3  # held-out messages that are answered for all to see


def load(folder: Path, adapter: Path | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) in float32, with a PEFT adapter if given."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def questions() -> list[dict]:
    """The twenty questions, each with words of which a right answer has one."""
    return _lines("questions.jsonl")


def facts() -> list[dict]:
    """Sentences without their end, and the end."""
    return _lines("facts.jsonl")


def choices(tokenizer, calibration: dict) -> list[dict]:
    """One shipped calibration question of every second subject, none of which a run with the
    settings `calibration` sees."""
    records = load_records("builtin")
    seen = {p.ids for p in load_prompts(tokenizer, **calibration, records=records).prompts}
    unseen = {
        r.subject: r
        for r in records
        if load_prompts(tokenizer, records=[r]).prompts[0].ids not in seen
    }
    return [
        {"question": r.question, "choices": r.choices, "answer": r.answer}
        for r in list(unseen.values())[::2]
    ]


def right(said: str, words: Sequence[str]) -> bool:
    """Whether an answer has one of the words, and is no order."""
    if said.lstrip().startswith("{"):
        return False
    found = (re.search(rf"(?<!\w){re.escape(w)}(?!\w)", said, re.IGNORECASE) for w in words)
    return any(found)


@dataclass
class Probes:
    """What is asked, and what the base says.

    Attributes:
        asked: the twenty questions as prompts; shown: a few held-out messages.
        own: these questions with the base's answers; text: plain paragraphs.
        choices: per question a sequence per choice.
        reference: what the base's head reads at every target of `own` and `text`.
    """

    tokenizer: Any
    asked: list[list[int]]
    shown: list[list[int]]
    own: list[Asked]
    text: list[Asked]
    facts: list[Asked]
    choices: list[list[Asked]]
    answers: list[int]
    lengths: list[list[int]]
    orders: list[Asked]
    reference: Reference

    @classmethod
    def of(cls, model, tokenizer, calibration: dict) -> Probes:
        """Ask the base what the others are compared with."""

        def prompt(words: str) -> list[int]:
            return chat(tokenizer, [("user", words)], "a question of the demo")

        asked = [prompt(q["question"]) for q in questions()]
        said = answers(model, tokenizer, asked, TOKENS)
        own = [Asked(p + a, len(p)) for p, a in zip(asked, said, strict=True)]
        text = [Asked(tokenizer(p)["input_ids"], 1) for p in corpus.paragraphs()]
        kept = score(model, own + text, keep=True).hidden
        assert kept is not None
        held_out, several = orders.held_out(), choices(tokenizer, calibration)
        return cls(
            tokenizer=tokenizer,
            asked=asked,
            shown=[prompt(message) for message, _ in held_out[:SHOWN]],
            own=own,
            text=text,
            facts=[cloze(tokenizer, f["prompt"], f["ending"]) for f in facts()],
            choices=[
                [_without_end(dialogue(tokenizer, [("user", q["question"])], c))
                 for c in q["choices"]] for q in several
            ],
            answers=[q["answer"] for q in several],
            lengths=[[len(c.encode()) for c in q["choices"]] for q in several],
            orders=[dialogue(tokenizer, [("user", m)], order) for m, order in held_out],
            reference=Reference(kept, model.get_output_embeddings().weight.detach().clone()),
        )  # fmt: skip

    def beginnings(self) -> list[tuple[float, float]]:
        """How sure the base was of the first token of each answer: its probability, and that of the
        next best one."""
        first = torch.stack([self.reference.hidden[i][0] for i in range(len(self.asked))])
        logits = torch.nn.functional.linear(first, self.reference.head).float()
        return [(round(p, 4), round(q, 4)) for p, q in logits.softmax(-1).topk(2).values.tolist()]

    def measure(self, model, name: str, parts: Sequence[str] = PARTS) -> dict[str, Any]:
        """Ask `model`, which is told of as `name`: everything, or some of `PARTS`."""
        found: dict[str, Any] = {}
        for part in tqdm(parts, desc=f"  asking {name}", unit="part"):
            found |= getattr(self, f"_{part}")(model)
        return found

    def _answers(self, model) -> dict[str, Any]:
        said = self._say(model, self.asked, TOKENS)
        marks = [right(words, q["answers"]) for words, q in zip(said, questions(), strict=True)]
        shown = self._say(model, self.shown, 2 * TOKENS)
        return {"answers": said, "right": marks, "shown": shown}

    def _distance(self, model) -> dict[str, Any]:
        scored = score(model, self.own + self.text, self.reference)
        assert scored.kl is not None
        own, text = slice(len(self.own)), slice(len(self.own), None)

        def mean(of: torch.Tensor, part: slice) -> float:
            return float(of[part].sum() / scored.count[part].sum())

        kl = {"kl_answers": mean(scored.kl, own), "kl_text": mean(scored.kl, text)}
        return kl | {"loss_text": mean(-scored.log_p, text)}

    def _facts(self, model) -> dict[str, Any]:
        return {"facts": score(model, self.facts).whole.tolist()}

    def _choices(self, model) -> dict[str, Any]:
        """Which questions are answered rightly: log p over the choice's bytes, highest."""
        every = [a for question in self.choices for a in question]
        log_p = iter(score(model, every, together=[len(q) for q in self.choices]).log_p.tolist())
        found = []
        for lengths, answer in zip(self.lengths, self.answers, strict=True):
            per_byte = [next(log_p) / length for length in lengths]
            found.append(per_byte.index(max(per_byte)) == answer)
        return {"choices": found}

    def _orders(self, model) -> dict[str, Any]:
        task = score(model, self.orders)
        return {"orders": task.whole.tolist(), "loss_orders": task.loss}

    def _say(self, model, prompts: list[list[int]], tokens: int) -> list[str]:
        said = answers(model, self.tokenizer, prompts, tokens)
        return [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]


def _without_end(asked: Asked) -> Asked:
    return Asked(asked.ids[:-1], asked.first)


def _lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
