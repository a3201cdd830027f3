"""`python -m demo.rates FOLDER`: which rate each way to train gets in the demo, and why.

Every way trains at every rate as the demo does, and is measured on its way until it gets `TARGET`
of the held-out orders exactly right. Of each way the rate counts whose answers have moved least
from the base's there (KL on the base's own answers to the twenty questions), and the demo trains so
many steps at it. Written to demo/data/rates.csv, run by run; what stands there is not run again.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from . import orders, real, running
from .asking import Probes, load

TARGET = 0.7
EVERY, MOST = 5, 80  # steps from one point to the next, and at most
KEPT = Path(__file__).parent / "data" / "rates.csv"
FIELDS = ("way", "rate", "step", "orders", "loss_orders", "kl_answers", "kl_text")
DOWN = {"targets": "down", "quota": 90, "protect": "auto", "calibration": real.CALIBRATION}
WAYS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "lora": (real.LORA, (3e-4, 1e-3, 1e-4)),
    "loki": (real.LOKI, (2e-3, 4e-3, 1e-3)),
    "loki_down": (real.LOKI | {"loki": {**DOWN, "cache_dir": "cache"}}, (1e-3, 2e-3, 5e-4)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.rates", description="Rates of the demo.")
    parser.add_argument("work", type=Path, help="a folder of the demo's own, or a new one")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument(
        "--best", type=int, default=3, help="so many rates of each, the likely first"
    )
    options = parser.parse_args()
    work = options.work.resolve()
    running.claim(work)
    running.environment()
    real.hush()
    folder = real.base_folder()
    model, tokenizer = load(folder)
    probes = Probes.of(model, tokenizer, real.CALIBRATION)
    del model
    running.write_chats(work / "orders.jsonl", orders.taught())
    for way in options.ways.split(","):
        settings, rates = WAYS[way]
        for rate in rates[: options.best]:
            if any((r["way"], float(r["rate"])) == (way, rate) for r in read()):
                continue
            saved = {"learning_rate": rate, "save_strategy": "steps", "save_steps": EVERY}
            saved |= {"save_total_limit": MOST // EVERY, "save_only_model": True}
            real.teach(work, "rates", folder, settings | saved, MOST)
            for step in range(EVERY, MOST + 1, EVERY):
                tuned, _ = load(folder, work / "rates" / f"checkpoint-{step}")
                told = f"{way} {rate:g} at {step}"
                _keep(way, rate, step, probes.measure(tuned, told, ("distance", "orders")))
                if (way, rate) in reached(read()):
                    break
    print(*("  ".join(str(v) for v in row.values()) for row in read()), best(read()), sep="\n")


def read() -> list[dict[str, Any]]:
    """The rows of demo/data/rates.csv."""
    if not KEPT.exists():
        return []
    with KEPT.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{k: v if k == "way" else float(v) for k, v in row.items()} for row in rows]


def reached(rows: list[dict[str, Any]]) -> dict[tuple[str, float], dict[str, Any]]:
    """Per way and rate the first row with `TARGET` of the orders; missing where there is none."""
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: r["step"]):
        if row["orders"] >= TARGET:
            found.setdefault((row["way"], row["rate"]), row)
    return found


def best(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per way the row of the rate that changed the base's answers least at `TARGET`."""
    found: dict[str, dict[str, Any]] = {}
    for (way, _), row in reached(rows).items():
        if way not in found or row["kl_answers"] < found[way]["kl_answers"]:
            found[way] = row
    return found


def _keep(way: str, rate: float, step: int, measured: dict[str, Any]) -> None:
    new = not KEPT.exists()
    figures = {k: round(measured[k], 5) for k in ("loss_orders", "kl_answers", "kl_text")}
    figures["orders"] = sum(measured["orders"]) / len(measured["orders"])
    with KEPT.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({"way": way, "rate": rate, "step": step, **figures})


if __name__ == "__main__":
    main()
