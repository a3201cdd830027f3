"""Where a tuned model says something else: at the first token of an answer, and behind it."""

from __future__ import annotations

import statistics

import torch

from benchmarks.real.arms import ARMS, BATCH
from benchmarks.real.lab import Lab
from benchmarks.real.scoring import score
from benchmarks.real.sweep import _WARM_UP, _built, _step
from benchmarks.writer import command, write

_ARMS = ("lora_all_r16", "lora_soft", "auto_gain_frozen")


def compare(lab: Lab, steps: int, precision: str) -> list[dict]:
    """A line per arm, trained `steps` steps on commands at its first rate: KL(base || tuned) in
    nats on the base's own answers to people's questions."""
    task, rows = lab.teach("snips", 0, 0), []
    for name in _ARMS:
        arm = ARMS[name]
        model, extra = _built(arm, lab)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, arm.rates[0], weight_decay=arm.decay)
        stream = lab.stream(arm, BATCH)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = arm.rates[0] * min(1.0, (step + 1) / _WARM_UP)
            _step(model.train(), arm, next(stream), extra, step, optimizer, precision)
        first, behind = [], []
        for asked in lab.probes.own:
            kl = _divergence(lab.known, model.eval(), asked.ids)[asked.first - 1 : -1]
            first.append(float(kl[0]))
            behind.append(float(kl[1:].mean()))
        rows.append(
            {
                "arm": name,
                "held-out loss": round(score(model, task.tested).loss, 3),
                "first token, least": round(min(first), 3),
                "median": round(statistics.median(first), 3),
                "most": round(max(first), 3),
                "tokens behind it, mean": round(statistics.mean(behind), 3),
            }
        )
    return rows


@torch.no_grad()
def _divergence(base, tuned, ids: list[int]) -> torch.Tensor:
    p, q = (m(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for m in (base, tuned))
    return (p.exp() * (p - q)).sum(-1)


def report(lab: Lab, steps: int, precision: str) -> None:
    """Write `results/beginning.md`."""
    write(
        "beginning",
        f"{lab.name}, {precision}, commands to JSON, {steps} steps: KL(base || tuned) in nats on"
        f" {len(lab.probes.own)} answers of the base's own.",
        command("real", DATA=str(lab.data.folder)),
        compare(lab, steps, precision),
    )
