"""Do the scores tell what matters? Rows are silenced in the base, and it is asked again."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from benchmarks.forgetting.base import Base
from benchmarks.forgetting.building import Context
from benchmarks.forgetting.measures import ask
from loki_plugin import select_rows
from loki_plugin.evaluating.suppress import suppressed


def suppress(base: Base, folder: Path) -> None:
    """Zero the lowest, highest and random rows of every layer: does the score tell what matters?"""
    context = Context(base, 0)
    model, measured = base.model().eval(), base.world.measured()
    rows, then = [], {k: ask(model, base.tokenizer, i) for k, i in measured.items()}
    known = {k: sum(a.right) for k, a in then.items()}
    hidden = context.scores.shape[-1]
    for quota in (q for q in (1, 2, 5, 10, 20, 30) if q * hidden >= 100):  # at least one row
        for magnitude in (False, True):
            for which, strategy in (
                ("lowest", "layer_balanced"),
                ("highest", "layer_highest"),
                ("random", "random"),
            ):
                if which == "random" and magnitude:
                    continue
                chosen = select_rows(context.scores, quota, strategy, magnitude=magnitude)
                with suppressed(model, chosen):
                    now = {k: ask(model, base.tokenizer, i) for k, i in measured.items()}
                kept = [
                    sum(a and b for a, b in zip(then[k].right, now[k].right, strict=True))
                    / max(1, known[k])
                    for k in measured
                ]
                rise = [now[k].loss - then[k].loss for k in measured]
                name = f"{which} by |score|" if magnitude else which
                rows.append(
                    {
                        "quota": quota,
                        "silenced": name,
                        "retention": round(float(np.mean(kept)), 4),
                        "forgetting": round(float(np.mean(rise)), 4),
                    }
                )
                print(rows[-1], flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "suppress.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
