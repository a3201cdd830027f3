"""Does what a base writes hold what is measured? Then an anchor on it would rehearse that."""

from __future__ import annotations

import csv
from pathlib import Path

from benchmarks.forgetting.base import Base
from benchmarks.forgetting.building import Context

FILE = "forgetting_written.csv"


def write(base: Base, folder: Path) -> None:
    """A line of `FILE` for this base; one that is there for it already is replaced."""
    found = overlap(base)
    folder.mkdir(parents=True, exist_ok=True)
    path, rows = folder / FILE, []
    if path.is_file():
        with path.open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if not _same(r, found)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, found)
        writer.writeheader()
        writer.writerows([*rows, found])
    print(found, flush=True)


def overlap(base: Base) -> dict[str, int]:
    """How many measured questions stand, with their answers, in the texts that the base writes."""
    texts = [base.tokenizer.decode(ids) for ids in Context(base, 0).written]
    measured = [item for items in base.world.measured().values() for item in items]
    standing = sum(any(f"{i.prompt} {i.answer}" in text for text in texts) for i in measured)
    return {
        "parameters": base.report["parameters"],
        "base": base.report["seed"],
        "texts": len(texts),
        "measured": len(measured),
        "standing": standing,
    }


def _same(row: dict, found: dict[str, int]) -> bool:
    return all(int(row[key]) == found[key] for key in ("parameters", "base"))
