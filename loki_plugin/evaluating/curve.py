"""`loki suppress`: answers with the lowest, random and highest rows silenced, over a curve of q."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from ..selecting.select import select_rows
from .quick import Forgetting, compare, log_probabilities
from .suppress import suppressed

# What is silenced, and the strategy that finds it.
WHICH = {"lowest": "layer_balanced", "random": "random", "highest": "layer_highest"}


@dataclass(frozen=True)
class Suppression:
    """What became of the answers when q % of the rows of every layer were silenced."""

    which: str
    quota: float
    magnitude: bool
    effect: Forgetting

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def curve(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    scores: Iterable[torch.Tensor] | torch.Tensor,
    quotas: Sequence[float] = (1, 2, 5, 10, 20),
    gold: Sequence[int | None] | None = None,
    magnitudes: Sequence[bool] = (False, True),
    seed: int = 0,
) -> list[Suppression]:
    """Silence the lowest, random and highest rows (per layer, by votes) and compare the answers.

    Args:
        prompts: N token id sequences whose next-token predictions are compared.
        scores: [N', L, H] or re-iterable chunks of it, as `select_rows` takes them.
        quotas: percent of the rows of every layer.
        gold: the right token of each prompt, where it has one.
        magnitudes: rank signed scores, |scores|, or both; random rows are drawn once.
    """
    base = log_probabilities(model, prompts)
    found = []
    for quota in quotas:
        for magnitude in magnitudes:
            for which, strategy in WHICH.items():
                if which == "random" and magnitude != magnitudes[0]:
                    continue
                rows = select_rows(scores, quota, strategy, magnitude=magnitude, seed=seed)
                with suppressed(model, rows):
                    tuned = log_probabilities(model, prompts)
                found.append(Suppression(which, quota, magnitude, compare(base, tuned, gold)))
    return found


def text(found: Sequence[Suppression]) -> str:
    """The curve as a table for the terminal."""
    lines = ["  q %  silenced             KL to the model  same answer  right"]
    for s in found:
        name = s.which + (" by |score|" if s.magnitude and s.which != "random" else "")
        right = "" if s.effect.accuracy_after is None else f"{100 * s.effect.accuracy_after:6.1f} %"
        lines.append(
            f"{s.quota:5g}  {name:20s} {s.effect.kl:15.4f}  {100 * s.effect.same_answer:9.1f} %"
            f"  {right}"
        )
    return "\n".join(lines)
