"""What the base knew, and how much of it a tuned model still does.

Facts that the base completes rightly; multiple choice by length-normalised log-likelihood; KL and
cross-entropy on plain text of several kinds and languages, and on answers of the base itself and of
people. The base is asked once; its answers are kept in a file.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.forgetting.measures import flips
from benchmarks.real.data import Data
from benchmarks.real.scoring import Asked, Reference, answers, score
from benchmarks.real.tasks import cloze, dialogue
from loki_plugin.analysing.calibration.rendering import chat
from loki_plugin.model.writing import replacing

_VERSION = 1


@dataclass(frozen=True)
class Amount:
    """How much is measured.

    Attributes:
        facts: that the base gets right.
        pieces, width: of every kind of text, and tokens of each.
        own, people: dialogues, answers of the base and of people.
        answer: tokens of an answer at most.
        choices: questions of each multiple-choice set.
        tested: held-out records of the task.
        every: one of so many of the shipped calibration prompts serves protection and choice.
        written, tokens: texts that the base writes by itself, and their tokens at most.
    """

    facts: int = 100
    pieces: int = 1
    width: int = 64
    own: int = 12
    people: int = 8
    answer: int = 48
    choices: int = 24
    tested: int = 24
    every: int = 4
    written: int = 160
    tokens: int = 80


AMOUNTS = {
    "ci": Amount(
        facts=12,
        width=24,
        own=3,
        people=2,
        answer=16,
        choices=4,
        tested=6,
        every=24,
        written=16,
        tokens=32,
    ),
    "brief": Amount(),
    "full": Amount(pieces=4, width=96, own=32, people=24, answer=64, choices=100, tested=64),
}
_OF_ARMS = ("every", "written", "tokens")
CHOICES = ("arc_easy", "piqa", "hellaswag", "blimp")


@dataclass
class Probes:
    """Sequences to ask, with what the base said.

    Attributes:
        facts, own, people: sequences.
        texts: sequences by kind.
        choices: by set a list of questions, each a list of sequences, one per choice.
        answers: by set the index of the right choice.
        lengths: by set and question the choices' lengths in bytes of UTF-8.
        hidden: what the base's head read, by group (`own`, `people`, `text/KIND`).
        loss: the base's cross-entropy by group.
        right: by set, which questions the base gets right.
    """

    facts: list[Asked]
    own: list[Asked]
    people: list[Asked]
    texts: dict[str, list[Asked]]
    choices: dict[str, list[list[Asked]]]
    answers: dict[str, list[int]]
    lengths: dict[str, list[list[int]]]
    hidden: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    right: dict[str, list[bool]] = field(default_factory=dict)

    def groups(self, without: str | None = None) -> dict[str, list[Asked]]:
        """All that KL and cross-entropy are measured on, but for one kind of text."""
        texts = {f"text/{k}": v for k, v in self.texts.items() if k != without}
        return {"own": self.own, "people": self.people, **texts}

    def measure(
        self, model, head: torch.Tensor, depth: int, without: str | None = None
    ) -> dict[str, float]:
        """What is left.

        Args:
            head: the base's head [V, H], on the model's device.
            depth: 0: KL on text and on the base's own answers; 1: facts and people's answers too;
                2: multiple choice too.
        """
        found: dict[str, float] = {}
        groups = self.groups(without)
        if depth < 1:
            del groups["people"]
        # All groups in one go: sequences of like length share a batch.
        names = [name for name, part in groups.items() for _ in part]
        hidden = [h for name in groups for h in self.hidden[name]]
        scored = score(model, [a for p in groups.values() for a in p], Reference(hidden, head))
        kl, rise = {}, {}
        for name in groups:
            mine = torch.tensor([n == name for n in names])
            count = scored.count[mine].sum()
            assert scored.kl is not None
            kl[name] = float(scored.kl[mine].sum() / count)
            rise[name] = float(-scored.log_p[mine].sum() / count) - self.loss[name]
        text = [name for name in groups if name.startswith("text/")]
        found["kl_dialogues"] = kl["own"]
        found["kl_text"] = _mean(kl[n] for n in text)
        found["ce_rise_text"] = _mean(rise[n] for n in text)
        found["ce_rise_dialogues"] = rise["own"]
        if "people" in groups:
            found |= {"kl_people": kl["people"], "ce_rise_people": rise["people"]}
            found["ce_rise"] = _mean(rise.values())
        found |= {f"kl_{n.replace('/', '_')}": kl[n] for n in text}
        if depth >= 1:
            asked = score(model, self.facts)
            found["facts_kept"] = float(asked.whole.float().mean())
            found["facts_first"] = float(asked.first.float().mean())
        if depth >= 2:
            found |= self._choices(model)
        return found

    def start(self, without: str | None = None) -> dict[str, float]:
        """The same of the base: nothing is lost."""
        text = {f"kl_{n.replace('/', '_')}": 0.0 for n in self.groups(without) if "text/" in n}
        zero = ("kl_dialogues", "kl_text", "ce_rise_text", "ce_rise_dialogues", "kl_people",
                "ce_rise_people", "ce_rise")  # fmt: skip
        scores = {f"choice_{k}": sum(v) / len(v) for k, v in self.right.items()}
        return {
            **dict.fromkeys(zero, 0.0),
            **text,
            "facts_kept": 1.0,
            "facts_first": 1.0,
            "choice_score": _mean(scores.values()),
            "choice_lost": 0,
            "choice_won": 0,
            **scores,
        }

    def _choices(self, model) -> dict[str, float]:
        right = self.choose(model)
        scores = {f"choice_{k}": sum(v) / len(v) for k, v in right.items()}
        pairs = [flips(self.right[k], right[k]) for k in right]
        return {
            "choice_score": _mean(scores.values()),
            "choice_lost": sum(p[0] for p in pairs),
            "choice_won": sum(p[1] for p in pairs),
            **scores,
        }

    def choose(self, model) -> dict[str, list[bool]]:
        """By set, which questions are answered rightly: log p over the choice's bytes, highest.

        Pairs of sentences (BLiMP) are compared as they are.
        """
        groups = [q for k, questions in self.choices.items() if k != "blimp" for q in questions]
        pairs = [a for q in self.choices["blimp"] for a in q]
        alike = score(model, [a for q in groups for a in q], together=[len(q) for q in groups])
        log_p = iter(alike.log_p.tolist() + score(model, pairs).log_p.tolist())
        right = {}
        for name, questions in self.choices.items():
            right[name] = []
            for q, answer, lengths in zip(
                questions, self.answers[name], self.lengths[name], strict=True
            ):
                per_byte = [next(log_p) / length for _, length in zip(q, lengths, strict=True)]
                right[name].append(per_byte.index(max(per_byte)) == answer)
        return right


def load(model, tokenizer, data: Data, amount: Amount, work: Path) -> Probes:
    """The probes of this base, from `work`, or made now with `model`, the base itself."""
    kept = {k: v for k, v in asdict(amount).items() if k not in ("tested", *_OF_ARMS)}
    key = json.dumps([_VERSION, kept, _digest(data)])
    file = work / f"probes-{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
    if file.is_file():
        return Probes(**torch.load(file, weights_only=False))
    print(f"asking the base what it knows, once; kept in '{file}'", flush=True)
    probes = _make(model, tokenizer, data, amount)
    work.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        torch.save(vars(probes), temporary)
    return probes


def _digest(data: Data) -> str:
    digest = hashlib.sha256()
    for path in sorted(data.folder.glob("*.*")):
        if path.name.startswith(("facts_", "text_", "chat_", "mc_")):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _make(model, tokenizer, data: Data, amount: Amount) -> Probes:
    draw = random.Random(0)
    asked = _questions(data, tokenizer, amount, draw)
    prompts = [chat(tokenizer, [("user", words)], "a prompt") for words, _ in asked]
    said = answers(model, tokenizer, prompts[: amount.own], amount.answer)
    people = list(zip(prompts, asked, strict=True))[amount.own :]
    probes = Probes(
        facts=_known(model, tokenizer, data, amount.facts, draw),
        own=[Asked(p + a, len(p)) for p, a in zip(prompts, said, strict=False)],
        people=[_cut(dialogue(tokenizer, [("user", q)], a), amount.answer) for _, (q, a) in people],
        texts={k: _pieces(data.text(k), tokenizer, amount) for k in data.kinds},
        **_multiple_choice(data, tokenizer, amount.choices, draw),
    )
    for name, part in probes.groups().items():
        scored = score(model, part, keep=True)
        assert scored.hidden is not None
        probes.hidden[name], probes.loss[name] = scored.hidden, scored.loss
    probes.right = probes.choose(model)
    return probes


def _known(model, tokenizer, data: Data, count: int, draw: random.Random) -> list[Asked]:
    """Facts whose object the base completes rightly as a whole, of all relations alike.

    Raises:
        ValueError: the base knows fewer.
    """
    by_relation = defaultdict(list)
    for r in data.records("facts_relations"):
        by_relation[r["relation"]].append((r["prompt"], r["object"]))
    for r in data.records("facts_known_1000"):
        if not r["in_newfacts"]:
            by_relation[r["relation"]].append((r["prompt"], r["object"]))
    for facts in by_relation.values():
        draw.shuffle(facts)
    # One of each relation, then a second, and so on.
    turns = max(map(len, by_relation.values()))
    order = [f[i] for i in range(turns) for f in by_relation.values() if i < len(f)]
    found: list[Asked] = []
    for start in range(0, len(order), 4 * count):
        part = [cloze(tokenizer, *fact) for fact in order[start : start + 4 * count]]
        right = score(model, part).whole.tolist()
        found += [a for a, good in zip(part, right, strict=True) if good]
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"the base completes {len(found)} facts rightly, {count} are asked for")


def _questions(data: Data, tokenizer, amount: Amount, draw: random.Random) -> list[tuple[str, str]]:
    """Short questions of people with people's answers: the first for the base, the rest as is."""
    rows = data.records("chat_userinstr_252") + data.records("chat_oasst1_en_valid")
    draw.shuffle(rows)
    found = []
    for row in rows:
        first, second = (m["content"] for m in row["messages"][:2])
        if len(tokenizer(first)["input_ids"]) <= amount.answer and second.strip():
            found.append((first, second))
    return found[: amount.own + amount.people]


def _cut(asked: Asked, targets: int) -> Asked:
    return Asked(asked.ids[: asked.first + targets], asked.first)


def _pieces(text: str, tokenizer, amount: Amount) -> list[Asked]:
    """Pieces from all over the text, each from the beginning of a line."""
    lines = text.splitlines(keepends=True)
    found = []
    for i in range(amount.pieces):
        start = (2 * i + 1) * len(lines) // (2 * amount.pieces)
        while start < len(lines) - 1 and not lines[start].strip():
            start += 1
        words = "".join(lines[start:])[: 12 * amount.width].lstrip("\n")
        found.append(Asked(tokenizer(words)["input_ids"][: amount.width], 1))
    return found


def _multiple_choice(data: Data, tokenizer, count: int, draw: random.Random) -> dict:
    choices: dict[str, list] = {}
    right: dict[str, list] = {}
    lengths: dict[str, list] = {}
    files = ("mc_arc_easy_test", "mc_piqa_valid", "mc_hellaswag_1000", "mc_blimp_40x67")
    for name, file in zip(CHOICES, files, strict=True):
        rows = draw.sample(data.records(file), count)
        if name == "blimp":
            start = tokenizer("\n")["input_ids"]
            choices[name] = [[_sentence(tokenizer, start, r[k]) for k in ("good", "bad")]
                             for r in rows]  # fmt: skip
            right[name], lengths[name] = [0] * count, [[1, 1]] * count
            continue
        prompt = "{}" if name == "hellaswag" else "Question: {}\nAnswer:"
        choices[name] = [[cloze(tokenizer, prompt.format(r["question"]), c) for c in r["choices"]]
                         for r in rows]  # fmt: skip
        right[name] = [r["answer"] for r in rows]
        lengths[name] = [[len(c.encode()) for c in r["choices"]] for r in rows]
    return {"choices": choices, "answers": right, "lengths": lengths}


def _sentence(tokenizer, start: list[int], words: str) -> Asked:
    return Asked([*start, *tokenizer(words, add_special_tokens=False)["input_ids"]], len(start))


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
