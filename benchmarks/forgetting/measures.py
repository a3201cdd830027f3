"""What a model answers, what it lost, and how far it has moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from benchmarks.forgetting.world import COVERED, Item

# Items that are asked at once.
_BATCH = 128


@dataclass(frozen=True)
class Answers:
    """Right or wrong of each item, mean loss of an answer token, and log p of what was asked.

    Attributes:
        right: per item, whether greedy decoding gives the answer and its end exactly.
        loss: mean cross-entropy per answer token.
        log_p: [n, V], all next-token distributions at answer positions, in order.
    """

    right: list[bool]
    loss: float
    log_p: torch.Tensor

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


@torch.no_grad()
def ask(model, tokenizer, items: Sequence[Item]) -> Answers:
    """Greedy answers by one forward: right if every token of the answer is the arg-max there."""
    from benchmarks.forgetting.base import encode

    model.eval()
    right: list[bool] = [False] * len(items)
    rows, total, count = [None] * len(items), 0.0, 0
    coded = [encode(tokenizer, item) for item in items]
    order = sorted(range(len(items)), key=lambda i: len(coded[i][0]))
    for start in range(0, len(order), _BATCH):
        part = order[start : start + _BATCH]
        width = max(len(coded[i][0]) for i in part)
        ids = torch.full((len(part), width), tokenizer.pad_token_id)
        labels = torch.full((len(part), width), -100)
        for row, i in enumerate(part):
            whole, given = coded[i]
            ids[row, : len(whole)] = torch.tensor(whole)
            labels[row, given : len(whole)] = torch.tensor(whole[given:])
        logits, labels = model(input_ids=ids[:, :-1], use_cache=False).logits, labels[:, 1:]
        total += cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
        good = ((logits.argmax(-1) == labels) | (labels == -100)).all(1)
        for row, i in enumerate(part):
            right[i] = bool(good[row])
            rows[i] = logits[row][labels[row] != -100].log_softmax(-1)
    return Answers(right, total / count, torch.cat(rows))


def flips(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """(right -> wrong, wrong -> right)."""
    pairs = list(zip(before, after, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def kl(base: torch.Tensor, tuned: torch.Tensor) -> float:
    """Mean forward KL(base || tuned) over positions, [n, V] log-probabilities each."""
    return float((base.exp() * (base - tuned)).sum(-1).mean())


@dataclass(frozen=True)
class Before:
    """The base's answers, asked once and compared with every run."""

    kinds: dict[str, Answers]
    task: dict[str, Answers]


def before(model, base, tasks: dict[str, Sequence[Item]]) -> Before:
    kinds = {k: ask(model, base.tokenizer, items) for k, items in base.world.measured().items()}
    return Before(kinds, {t: ask(model, base.tokenizer, i) for t, i in tasks.items()})


def measure(model, base, was: Before, task: str, items: Sequence[Item]) -> dict[str, float]:
    """Everything that is measured after a run, in the order of the results file.

    `retention` is the share of what the base answered right that is still right, mean over kinds;
    `forgetting` is the rise of cross-entropy, mean over kinds.
    """
    found: dict[str, float] = {}
    down = up = 0
    kept, rise, kls = {}, {}, {}
    for kind, asked in base.world.measured().items():
        now, then = ask(model, base.tokenizer, asked), was.kinds[kind]
        lost, won = flips(then.right, now.right)
        down, up = down + lost, up + won
        kept[kind] = 1 - lost / max(1, sum(then.right))
        rise[kind] = now.loss - then.loss
        kls[kind] = kl(then.log_p, now.log_p)
        found[f"acc_{kind}"], found[f"ce_{kind}"] = now.accuracy, now.loss
    on_task = ask(model, base.tokenizer, items)
    other = [k for k in kept if k not in COVERED]
    mean = lambda values, keys: sum(values[k] for k in keys) / len(keys)  # noqa: E731
    return {
        "task_score": on_task.accuracy,
        "retention": mean(kept, list(kept)),
        "forgetting": mean(rise, list(rise)),
        "flips_down": down,
        "flips_up": up,
        "kl_task": kl(was.task[task].log_p, on_task.log_p),
        "kl_general": mean(kls, list(kls)),
        "kl_covered": mean(kls, COVERED),
        "kl_uncovered": mean(kls, other),
        "retention_covered": mean(kept, COVERED),
        "retention_uncovered": mean(kept, other),
        "task_loss": on_task.loss,
        **found,
    }
