"""The finalists once more as a user trains: a YAML, and the real `axolotl train` in a process."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from peft import PeftModel

from benchmarks.forgetting.base import Base, encode
from benchmarks.forgetting.building import LINEARS
from benchmarks.forgetting.measures import before, measure
from benchmarks.forgetting.sweep import ROWS, START, WIDTH, Key, Sweep, rate, results
from benchmarks.forgetting.tasks import TASKS

STAGE = "axolotl"
# Arms that a YAML can say; they run at the rate that `bracket` begins with.
ARMS: dict[str, dict[str, Any]] = {
    "lora_all_r16": {
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_target_modules": LINEARS,
        # Triton kernels, which Axolotl switches on by itself, do not run on a CPU.
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
    },
    "loki_q30": {"loki": {"quota": 30, "protect": "off"}},
    "loki_anchor_q30": {"loki": {"quota": 30, "protect": {"anchor": 1.0, "anchor_batch": 16}}},
    "loki_protect90_q60": {"loki": {"quota": 60, "protect": {"inputs": 0.9}}},
    "loki_soft99_q30": {"loki": {"quota": 30, "protect": {"inputs": 0.99, "soft": True}}},
    "loki_soft99_q90": {"loki": {"quota": 90, "protect": {"inputs": 0.99, "soft": True}}},
    "loki_protect_q30": {"loki": {"quota": 30, "protect": {"inputs": 0.99}}},
    "loki_written_anchor_q90": {
        "loki": {"quota": 90, "protect": {"anchor": 1.0, "anchor_batch": 16, "text": "self"}}
    },
    "loki_soft99_written_anchor_q90": {
        "loki": {
            "quota": 90,
            "protect": {
                "inputs": 0.99, "soft": True, "anchor": 1.0, "anchor_batch": 16, "text": "self"
            },
        }
    },
}  # fmt: skip


def run_all(
    base: Base, sweep: Sweep, folder: Path, work: Path, arms: Iterable[str], tasks: Iterable[str]
) -> None:
    """One line per arm and task in the stage's file; what is there already is not run again."""
    path = folder / results(STAGE, base.report["seed"])
    done = []
    if path.is_file():
        with path.open(newline="") as file:
            done = [(row["arm"], row["task"]) for row in csv.DictReader(file)]
    for arm, task in product(arms, tasks):
        if (arm, task) in done:
            continue
        row = _run(arm, task, base, sweep, work / f"axolotl-{base.folder.name}-{arm}-{task}")
        new = not path.is_file()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)


def _run(arm: str, task: str, base: Base, sweep: Sweep, work: Path) -> dict:
    key = Key(arm, task, 0, rate(arm, START[task]))
    learned, tested = TASKS[key.task](base.world, key.seed, sweep.people)
    work.mkdir(parents=True, exist_ok=True)
    coded = [encode(base.tokenizer, item) for item in learned]
    _lines(
        work / "task.jsonl",
        (
            {
                "input_ids": ids,
                "attention_mask": [1] * len(ids),
                "labels": [-100] * given + ids[given:],
            }
            for ids, given in coded
        ),
    )
    _lines(work / "calibration.jsonl", ({"prompt": i.prompt} for i in base.world.calibration()))
    # As many sequences as the sweep packs into a step.
    mean = sum(len(ids) for ids, _ in coded) / len(coded)
    config = _yaml(base, work, key.lr, sweep.steps, round(ROWS * WIDTH / mean)) | ARMS[arm]
    if "loki" in config:
        config["loki"] = config["loki"] | {
            "calibration": {"source": str(work / "calibration.jsonl"), "samples_per_subject": None},
            "cache_dir": str(work / "cache"),
        }
        config |= {"plugins": ["loki"], "adapter": "loki"}
    # JSON is YAML.
    (work / "run.yaml").write_text(json.dumps(config, indent=1))
    # The launcher is looked up on the path, where an environment that is not active is missing.
    bin = Path(sys.executable).parent
    path = f"{bin}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [str(bin / "axolotl"), "train", str(work / "run.yaml")],
        check=True,
        env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "AXOLOTL_DO_NOT_TRACK": "1"},
    )
    model = PeftModel.from_pretrained(base.model(), work / "out")
    was = before(base.model(), base, {key.task: tested})
    found = measure(model, base, was, key.task, tested)
    kept = ("task_score", "retention", "forgetting", "kl_general", "kl_uncovered")
    return {"arm": arm, "task": task, "lr": key.lr, "steps": sweep.steps} | {
        k: float(f"{found[k]:.6g}") for k in kept
    }


def _yaml(base: Base, work: Path, lr: float, steps: int, sequences: int) -> dict[str, Any]:
    """What the sweep does, in Axolotl's words."""
    return {
        "base_model": str(base.folder),
        "datasets": [{"path": str(work / "task.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(work / "prepared"),
        "output_dir": str(work / "out"),
        "sequence_len": WIDTH,
        "micro_batch_size": sequences,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "learning_rate": lr,
        "lr_scheduler": "linear",
        "warmup_steps": 10,
        "optimizer": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "save_strategy": "no",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "logging_steps": 50,
        "seed": 0,
    }


def _lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
