"""What protection costs in a step: seconds against the same LoRA without it, on one real base."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.real.arms import ARMS, BATCH
from benchmarks.real.lab import Lab
from benchmarks.real.scoring import Asked
from benchmarks.real.sweep import _built, _step
from benchmarks.writer import command, write

_ARMS = ("lora_all_r16", "lora_soft", "auto_all", "auto_gain_frozen", "auto_q10")
_STEPS, _WARM = 5, 2


def compare(lab: Lab, lengths: tuple[int, ...], precision: str) -> list[dict]:
    """A line per arm and length of sequence; the arms' steps take turns, medians count.

    The steps run twice: what the base says of an anchor's texts is known the second time.
    """
    lab.teach("snips", 0, 0)
    models = {name: (*_built(ARMS[name], lab), ARMS[name]) for name in _ARMS}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
        for name, (model, _, _) in models.items()
    }
    text = [i for text in lab.written for i in text]
    rows, steps = [], 0
    for length in lengths:
        batch = [Asked(text[k * length : (k + 1) * length], 1) for k in range(BATCH)]
        seconds: dict[tuple[str, bool], list[float]] = {}
        for known in (False, True):
            for step in range(steps, steps + _WARM + _STEPS):
                for name, (model, extra, arm) in models.items():
                    started = time.perf_counter()
                    _step(model.train(), arm, batch, extra, step, optimizers[name], precision)
                    took = time.perf_counter() - started
                    seconds.setdefault((name, known), []).append(took)
        steps += _WARM + _STEPS  # other texts
        median = {key: statistics.median(each[_WARM:]) for key, each in seconds.items()}
        for name in _ARMS:
            first, then = (median[name, k] / median[_ARMS[0], k] for k in (False, True))
            rows.append(
                {
                    "arm": name,
                    "tokens in a step": BATCH * length,
                    "seconds": round(median[name, True], 2),
                    "of LoRA's": round(then, 2),
                    "with texts that are new": round(first, 2),
                }
            )
    return rows


def report(lab: Lab, precision: str) -> None:
    """Write `results/real_pace.md`."""
    write(
        "real_pace",
        f"{lab.name}, {precision}, {torch.get_num_threads()} thread, {BATCH} sequences in a step;"
        f" median of {_STEPS} steps after {_WARM}, the arms take turns.",
        command("real", DATA=str(lab.data.folder)),
        compare(lab, (80, 256), precision),
    )
