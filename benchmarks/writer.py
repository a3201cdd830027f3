"""One form for every results file: hardware and versions, the command, and the table."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results"


def command(module: str, **stands_for: str | None) -> str:
    """The command that runs, with a path of this machine replaced by the name it `stands_for`.

    `command("selecting", CLONE=options.reference)` writes CLONE where that path was given.
    """
    names = {path: name for name, path in stands_for.items() if path}
    return " ".join(
        [f"python -m benchmarks.{module}", *(names.get(word, word) for word in sys.argv[1:])]
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of one set of columns as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(str(v) for v in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def write(
    name: str,
    about: str,
    ran: str,
    rows: Sequence[dict[str, Any]] = (),
    *,
    more: str = "",
    device: torch.device | str = "cpu",
    as_csv: bool = False,
) -> Path:
    """Write `results/NAME.md`, and its rows as `results/NAME.csv` where asked; returns the first.

    Args:
        about: what was measured, on what; stands behind the hardware and the versions.
        ran: the command, see `command`.
        more: text below the table.
    """
    RESULTS.mkdir(exist_ok=True)
    parts = [f"{describe(torch.device(device))}. {about}", f"Command: `{ran}`"]
    parts += [table(rows)] if rows else []
    parts += [more] if more else []
    path = RESULTS / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    if as_csv:
        with (RESULTS / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return path
