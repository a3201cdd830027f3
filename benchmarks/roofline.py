"""What the analysis of an 8B model should take on GPUs that were not there: a prediction.

    python -m benchmarks.roofline      # needs g++ and bitsandbytes, no GPU

The engine runs on fake CUDA tensors (tests/helpers/fake_cuda), which show every kernel with its
FLOPs and the bytes that it moves. A kernel takes the longest of its FLOPs at the card's rate, its
bytes at the card's bandwidth, and what the smallest kernel takes; a batch takes its kernels, or
what the host takes to launch them where that is longer, since nothing in a batch makes the host
wait.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.floor import flops
from benchmarks.writer import command, table, write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from helpers.fake_cuda import build, dry_run  # noqa: E402


class Card(NamedTuple):
    """What is assumed that a card sustains: FLOP/s of bf16 products, and bytes/s."""

    flops: float
    bandwidth: float


CARDS = {
    "H200": Card(650e12, 4.0e12),
    "RTX 4090": Card(150e12, 0.90e12),
    "RTX 3090": Card(65e12, 0.82e12),
}
LEAST, LAUNCH = 2.5e-6, 9e-6  # seconds of the smallest kernel, and of the host to launch one
SHAPE = (32, 4096, 14336, 8, 128, 128256)  # Llama-3.1-8B
LENGTH, STEPS = 150, 7
BATCHES, AIMED_AT = (1, 8, 16), 8
WEIGHTS = {"bf16": False, "NF4": True}
# Milliseconds per prompt at B = 8 that were aimed at, and kernels per batch of version 0.1.1.
AIMS = {
    ("RTX 4090", "bf16"): 47,
    ("RTX 4090", "NF4"): 56,
    ("H200", "bf16"): 11,
    ("H200", "NF4"): 13,
}
KERNELS = {("bf16", 16): 7647, ("NF4", 1): 9445}
SHARE = 0.65  # of those

# (phase, kernels, FLOPs, bytes, how often), as a dry run counts them.
Costs = Sequence[tuple[str, int, int, int, int]]


def milliseconds(costs: Costs, card: Card, batch: int) -> tuple[float, str]:
    """Per prompt of a batch, and which of host and device it waits for."""
    device = sum(
        often * max(LEAST * kernels, count / card.flops, moved / card.bandwidth)
        for _, kernels, count, moved, often in costs
    )
    host = LAUNCH * sum(kernels * often for _, kernels, _, _, often in costs)
    return 1000 * max(host, device) / batch, "host" if host > device else "device"


def rows_of(found: dict[tuple[str, int, bool], dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each kind of weights, batch size and kind of prompts."""
    rows = []
    for (weights, batch, ragged), run in found.items():
        row = {
            "weights": weights,
            "B": batch,
            "prompts": "ragged, 40 tokens in common" if ragged else "uniform",
            "kernels per batch": sum(run["kernels"].values()),
            "TFLOP per prompt": f"{run['TFLOP'] / batch:.2f}",
            "GB moved per prompt": f"{run['moved_GB'] / batch:.1f}",
            "peak above the weights (GiB)": f"{run['peak_bytes'] / 2**30:.2f}",
        }
        for name, card in CARDS.items():
            time, waits_for = milliseconds(run["costs"], card, batch)
            row[f"{name} (ms per prompt)"] = f"{time:.1f}" + " (host)" * (waits_for == "host")
        rows.append(row)
    return rows


def aims_of(found: dict[tuple[str, int, bool], dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, and whether the prediction meets it."""
    rows = []
    for (name, weights), aim in AIMS.items():
        costs = found[weights, AIMED_AT, False]["costs"]
        time, _ = milliseconds(costs, CARDS[name], AIMED_AT)
        what = f"{name}, {weights}, B = {AIMED_AT}: ms per prompt"
        rows.append(_aim(what, aim, time))
    for (weights, batch), before in KERNELS.items():
        kernels = sum(found[weights, batch, False]["kernels"].values())
        what = f"{weights}, B = {batch}: kernels per batch, {SHARE:.0%} of 0.1.1's {before:,}"
        rows.append(_aim(what, int(SHARE * before), kernels))
    return rows


def _aim(what: str, aim: float, predicted: float) -> dict[str, Any]:
    said = "met" if predicted <= aim else f"MISSED by {100 * (predicted / aim - 1):.1f} %"
    return {"aim": what, "at most": aim, "predicted": round(predicted, 1), "": said}


def main() -> None:
    plans = [(w, batch, False) for w in WEIGHTS for batch in BATCHES]
    plans += [(w, AIMED_AT, True) for w in WEIGHTS]
    cases = [
        {"shape": SHAPE, "batch": batch, "length": LENGTH, "nf4": WEIGHTS[weights]}
        | ({"ragged": True, "shared": 40} if ragged else {})
        for weights, batch, ragged in plans
    ]
    with tempfile.TemporaryDirectory() as folder:
        runs = dry_run(build(Path(folder)), "llama", *cases)
    errors = [run["error"] for run in runs if "error" in run]
    if errors:
        raise SystemExit(f"dry runs failed: {errors}")
    found = dict(zip(plans, runs, strict=True))
    floor = flops(*SHAPE, length=LENGTH, steps=STEPS) / 1e12
    assumed = "; ".join(
        f"{name} {c.flops / 1e12:.0f} TFLOP/s and {c.bandwidth / 1e12:.2f} TB/s"
        for name, c in CARDS.items()
    )
    about = (
        "A prediction: no GPU was there, and none of these figures was measured. Analysis of a"
        f" model of Llama-3.1-8B's shapes, T = {LENGTH}, S = {STEPS}, run on fake CUDA tensors; the"
        f" floor is {floor:.2f} TFLOP per prompt. Assumed to be sustained: {assumed};"
        f" {1e6 * LEAST:.1f} µs for the smallest kernel, {1e6 * LAUNCH:.0f} µs of the host for each"
        " launch. Real kernels may add 15 to 25 %."
    )
    path = write("roofline", about, command("roofline"), rows_of(found), more=table(aims_of(found)))
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
