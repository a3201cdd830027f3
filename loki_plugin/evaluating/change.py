"""Before and after: scores of tasks, flips of single items, and whether they are chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any


@dataclass(frozen=True)
class TaskChange:
    """One task before and after fine-tuning.

    Attributes:
        before, after: the task's metric, in [0, 1] for accuracies.
        items: how many items both answered, or 0 where the metric is not one of right and wrong.
        flips_down: items that were right and are wrong now (1 -> 0).
        flips_up: items that were wrong and are right now (0 -> 1).
        higher_is_better: False for a perplexity.
        counts: whether it counts in a mean over tasks; a task inside a group that has a score of
            its own does not.
    """

    task: str
    metric: str
    before: float
    after: float
    items: int = 0
    flips_down: int = 0
    flips_up: int = 0
    higher_is_better: bool = True
    counts: bool = True

    @property
    def relative_drop(self) -> float | None:
        """(before - after) / |before|, negative for a gain; None where before is 0.

        Of a metric that is to be low, (after - before) / |before|. The size of `before` counts:
        some metrics (a correlation, a log-likelihood) are negative.
        """
        return self.worse / abs(self.before) if self.before else None

    @property
    def worse(self) -> float:
        """How far the metric has got worse; negative for a gain."""
        change = self.before - self.after
        return change if self.higher_is_better else -change

    @property
    def p_value(self) -> float:
        """Exact McNemar test: how often chance alone would split the flips as unevenly."""
        return mcnemar(self.flips_down, self.flips_up)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"relative_drop": self.relative_drop, "p_value": self.p_value}


def mcnemar(down: int, up: int) -> float:
    """Two-sided exact p of McNemar's test: flips down ~ Binomial(down + up, 1/2) by chance."""
    n = down + up
    if not n:
        return 1.0
    tail = sum(comb(n, i) for i in range(min(down, up) + 1))
    return min(1.0, 2 * tail / 2**n)


def flips(before: Sequence[bool], after: Sequence[bool]) -> tuple[int, int]:
    """(1 -> 0, 0 -> 1) over items in one order.

    Raises:
        ValueError: other numbers of items.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} items before and {len(after)} after; give the same ones")
    pairs = list(zip(before, after, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def mean_relative_drop(changes: Sequence[TaskChange], clip_gains: bool = False) -> float | None:
    """The paper's figure: the mean over tasks of (before - after) / before.

    It is signed, so that a gain hides a loss: `clip_gains` counts gains as 0. Tasks whose score
    was 0 before have no relative drop and do not count, nor do those inside a group with a score;
    None where no task is left.
    """
    drops = [c.relative_drop for c in changes if c.counts and c.relative_drop is not None]
    if clip_gains:
        drops = [max(0.0, d) for d in drops]
    return sum(drops) / len(drops) if drops else None
