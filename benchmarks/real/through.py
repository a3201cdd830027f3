"""Finalists once more as a user trains: a YAML, and the real `axolotl train` in a process.

What the sweep does is said in Axolotl's words. Three things differ: Axolotl trains in float32 on a
CPU, draws the sequences in its own order, and `protect: auto` takes all 570 calibration prompts
and has the model write its own text, where the sweep takes a quarter of them and text of before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from peft import PeftModel

from benchmarks.real import matching
from benchmarks.real.arms import ARMS, BATCH
from benchmarks.real.lab import Lab
from benchmarks.real.scoring import score
from benchmarks.real.sweep import _WARM_UP
from benchmarks.writer import RESULTS, command, write
from demo.running import NO_KERNELS, claim, environment, train

# What of an arm a YAML says, beside what all share.
_LINEARS = {"adapter": "lora", "lora_r": 16, "lora_alpha": 16, "lora_target_linear": True}
YAMLS: dict[str, dict[str, Any]] = {
    "lora_all_r16": {**_LINEARS, **NO_KERNELS},
    "auto_gain_frozen": {
        **_LINEARS, "plugins": ["loki"], "loki": {"quota": 100, "protect": "auto"},
    },
    "auto_q10": {"adapter": "loki", "plugins": ["loki"], "loki": {"quota": 10}},
}  # fmt: skip
_COMPARED = ("task_loss", "kl_dialogues", "kl_text", "facts_kept")


def run(lab: Lab, arm: str, name: str, steps: int, work: Path) -> dict[str, Any]:
    """Train `arm` on a task by the real command and measure it as the sweep does."""
    task, rate = lab.teach(name, 0, 0), ARMS[arm].rates[0]
    environment()
    claim(work)
    lines = [
        {
            "input_ids": a.ids,
            "attention_mask": [1] * len(a.ids),
            "labels": [-100] * a.first + a.ids[a.first :],
        }
        for a in task.learned
    ]
    (work / "task.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    settings = YAMLS[arm] | {
        "base_model": str(lab.folder),
        "datasets": [{"path": "task.jsonl", "ds_type": "json", "type": None}],
        "learning_rate": rate,
        "lr_scheduler": "constant_with_warmup",
        "warmup_steps": _WARM_UP,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    train(work, arm, settings, "", BATCH, steps, max(len(a.ids) for a in task.learned))
    model = PeftModel.from_pretrained(lab.model(), work / arm).eval()
    found = lab.probes.measure(model, lab.head, 1)
    return {"task_loss": score(model, task.tested).loss, **found}


def report(lab: Lab, arms: list[str], name: str, steps: int) -> None:
    """Write `results/real_through.md`: both ways at the same step, arm by arm as they come."""
    curves = matching.curves(matching.read(RESULTS, lab.amount_name))
    rows = []
    for arm in arms:
        found = run(lab, arm, name, steps, lab.work / "axolotl" / f"{name}-{arm}")
        curve = curves.get((lab.name, name, arm, 0, ARMS[arm].rates[0]), [])
        ours = matching.at(curve, "step", float(steps)) or {}
        for way, values in (("axolotl train", found), ("this benchmark's loop", ours)):
            told = {k: f"{values[k]:.3g}" if values.get(k) is not None else "" for k in _COMPARED}
            rows.append({"arm": arm, "way": way, "rate": ARMS[arm].rates[0], **told})
            print(rows[-1], flush=True)
        write(
            "real_through",
            f"{lab.name}, {name}, {steps} steps of {BATCH} sequences, seed 0, at each arm's first"
            f" rate ({os.environ['OMP_NUM_THREADS']} thread). Axolotl trains in float32 and in its"
            " own order, with all calibration prompts and with text that the model writes in the"
            " run.",
            command("real", DATA=str(lab.data.folder)),
            rows,
        )
