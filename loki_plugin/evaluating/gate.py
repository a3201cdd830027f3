"""Forgetting as a gate: what of a report is worse than a user allows, a sentence each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .forgetting import ForgettingReport

_SLACK = 1e-9  # percent: what dividing counts and multiplying by 100 rounds to


@dataclass(frozen=True)
class Gate:
    """What may be forgotten; None: any.

    Attributes:
        max_kl: nats, KL to the base on the prompts.
        min_kept: percent of the prompts that are answered as the base does.
        max_drop: percent that a task, or the share of prompts answered right, may lose of what it
            was, (before - after) / before. Each counts alone: what one gains hides no other's loss.
    """

    max_kl: float | None = None
    min_kept: float | None = None
    max_drop: float | None = None

    @property
    def given(self) -> bool:
        return any(limit is not None for limit in (self.max_kl, self.min_kept, self.max_drop))

    def broken(self, report: ForgettingReport) -> list[str]:
        """A sentence for each threshold that the report does not keep; a NaN keeps none."""
        found, prompts = [], report.prompts
        if self.max_kl is not None and not prompts.kl <= self.max_kl:
            found.append(
                f"KL to the base is {prompts.kl:.4g} nats, more than --max-kl {self.max_kl:g}"
            )
        kept = 100 * prompts.same_answer
        if self.min_kept is not None and not kept >= self.min_kept - _SLACK:
            found.append(
                f"{kept:.4g} % of the prompts are answered as the base does, less than --min-kept"
                f" {self.min_kept:g}"
            )
        if self.max_drop is not None:
            limit = self.max_drop
            lost = [f"{n} lost {d:.4g} %" for n, d in _drops(report) if not d <= limit + _SLACK]
            lost += [
                f"{c.task} was 0 and is {c.after:.4g}"
                for c in report.tasks
                if c.relative_drop is None and not c.worse <= 0
            ]
            if lost:
                found.append(f"{', '.join(lost)}, more than --max-drop {limit:g}")
        return found

    def to_json(self, report: ForgettingReport) -> dict[str, Any]:
        """What a script is told: nothing where nothing was asked."""
        if not self.given:
            return {}
        broken = self.broken(report)
        return {"passed": not broken, "broken": broken}


def _drops(report: ForgettingReport) -> list[tuple[str, float]]:
    """Percent that each task has lost, and the prompts' right answers."""
    tasks = [(c.task, c.relative_drop) for c in report.tasks]
    before, after = report.prompts.accuracy_before, report.prompts.accuracy_after
    if before and after is not None:
        tasks.append(("the share of prompts answered right", (before - after) / before))
    return [(name, 100 * drop) for name, drop in tasks if drop is not None]
