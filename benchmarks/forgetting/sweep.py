"""The sweep: one line of a results file per run; what is there already is not run again."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.forgetting.arms import ARMS, Arm, passes
from benchmarks.forgetting.base import Base, encode, fit, packed
from benchmarks.forgetting.building import Context
from benchmarks.forgetting.measures import Before, before, measure
from benchmarks.forgetting.tasks import TASKS
from benchmarks.machine import PeakMemory, describe
from loki_plugin.protecting.anchor import divergence

# People to learn about (tasks b and c take as many items), steps of a screening run and of a final.
# Few steps favour whatever learns fast at a rate that does little harm, so that finals are longer.
AMOUNT = {
    "ci": (12, 60, 120),
    "brief": (40, 50, 300),
    "small": (60, 150, 450),
    "reported": (40, 50, 200),
}
STAGES = ("screen", "final", "reported")
ROWS, WIDTH = 8, 96
_ANCHOR_PROMPTS = 16
_ROUNDED = 0.006  # losses of a base that are told apart: older files have them rounded
# The ladder of rates, each twice the one before: `finals` takes the first five; `bracket` begins in
# their middle, where a task is learned, and may go further.
START, _LAST = {"facts": 2, "classes": 2, "calls": 4}, 7
_COLLAPSE = 10  # the last one that `climb` tries


@dataclass(frozen=True)
class Key:
    """What tells one run from another."""

    arm: str
    task: str
    seed: int
    lr: float


def _key(row: dict) -> Key:
    return Key(row["arm"], row["task"], int(row["seed"]), float(row["lr"]))


def screening(names: Iterable[str] | None = None) -> Iterator[Key]:
    """All arms, new facts, three rates, one seed."""
    for name in names or ARMS:
        for rate in ARMS[name].rates:
            yield Key(name, "facts", 0, rate)


def finals(names: Iterable[str], seeds: int, tasks: Iterable[str]) -> Iterator[Key]:
    """Five rates, each twice the one before.

    Rate by rate for all arms, the middle ones first, so that a sweep that is cut short compares
    all arms.
    """
    names, tasks = list(names), list(tasks)
    for seed in range(seeds):
        for task in tasks:
            for step in (2, 1, 3, 0, 4):
                for name in names:
                    yield Key(name, task, seed, rate(name, step))


def rate(arm: str, step: int) -> float:
    """The arm's learning rate at that step of the ladder, rounded as the file has it."""
    return float(f"{ARMS[arm].lowest * 2**step:.6g}")


def results(stage: str, seed: int = 0) -> str:
    """Name of the file that has a stage's runs with the base, and the world, of that seed."""
    return f"forgetting_{stage}" + (f"_base{seed}" if seed else "") + ".csv"


def about(file: Path) -> dict:
    """What is kept beside a results file: the base that it was made with, and the machine."""
    return json.loads(file.with_suffix(".json").read_text())


def keep_about(file: Path, base: dict, machine: str | None = None) -> None:
    """Write `about` where nothing is kept yet; the machine is this one where none is given.

    Raises:
        ValueError: what is kept is another base. The same seed trained on another processor gives
            one, and runs of two bases must not stand in one file.
    """
    if not file.with_suffix(".json").is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = {"base": base, "machine": machine or describe(torch.device("cpu"))}
        file.with_suffix(".json").write_text(json.dumps(kept, indent=2) + "\n")
        return
    was = about(file)["base"]
    losses = [k for k in was if "loss" in k]
    apart = [k for k in losses if not math.isclose(was[k], base[k], abs_tol=_ROUNDED)]
    if apart or was["size"] != base["size"]:
        raise ValueError(
            f"'{file}' was made with another base (it differs in {apart or 'size'}): the same seed"
            " trained on another processor gives other weights. Give --work the folder that has"
            " the first one, or write to another --output"
        )


def join(parts: Iterable[Path], into: Path) -> None:
    """Write the runs of several files into one, each run once.

    Raises:
        ValueError: two files disagree about a run, in more than time and memory, or were made with
            different bases.
    """
    parts = list(parts)
    for part in parts:
        if part.is_file() and part.with_suffix(".json").is_file():
            keep_about(into, **about(part))
    rows: dict[Key, dict] = {}
    for part in filter(Path.is_file, parts):
        with part.open(newline="") as file:
            for row in csv.DictReader(file):
                had = rows.setdefault(_key(row), row)
                apart = {k for k in row if row[k] != had[k]} - {"seconds", "peak_mib"}
                if apart:
                    raise ValueError(f"'{part}' has other figures of {_key(row)}: {sorted(apart)}")
    if rows:
        with into.open("w", newline="") as file:
            writer = csv.DictWriter(file, next(iter(rows.values())))
            writer.writeheader()
            writer.writerows(rows.values())


class Sweep:
    """Runs of one base; what several of them need is made once."""

    def __init__(self, base: Base, size: str, file: Path, final: bool = False):
        self.base, self.file = base, file
        keep_about(file, base.report)
        people, short, long = AMOUNT[size]
        self.people, self.steps = people, long if final else short
        self._contexts: dict[int, Context] = {}
        self._before: dict[tuple[str, int], Before] = {}
        self.weights = {k: v.detach().clone() for k, v in base.model().named_parameters()}

    def done(self) -> set[Key]:
        if not self.file.is_file():
            return set()
        with self.file.open(newline="") as file:
            return {_key(r) for r in csv.DictReader(file)}

    def run_all(self, keys: Iterable[Key], until: float | None = None) -> None:
        """Run what is missing; `until` is a time.time() after which no further run begins."""
        for key in keys:
            if until is not None and time.time() > until:
                print("the time is up; run the same command again to go on", flush=True)
                return
            if key not in self.done():
                self._append(self.run(key))

    def bracket(
        self, names: Iterable[str], task: str, seed: int, score: float, until: float | None = None
    ) -> None:
        """For each arm the two neighbouring rates between which it reaches that task score.

        Starts where the task is usually learned and climbs or descends; what `finals` runs in full,
        in two or three runs an arm.
        """
        for name in names:
            scores: dict[int, float] = {}
            step = START[task]
            while 0 <= step <= _LAST and step not in scores:
                key = Key(name, task, seed, rate(name, step))
                self.run_all([key], until)
                if key not in self.done():
                    return
                scores[step] = self.score(key)
                step += -1 if scores[step] >= score else 1

    def climb(
        self, names: Iterable[str], task: str, seed: int, score: float, until: float | None = None
    ) -> None:
        """For each arm the rates above those of `bracket`, up to one that no longer learns it."""
        for name in names:
            reached = False
            for step in range(_COLLAPSE + 1):
                key = Key(name, task, seed, rate(name, step))
                if reached:
                    self.run_all([key], until)
                if key not in self.done():
                    continue
                if reached and self.score(key) < score:
                    break
                reached = reached or self.score(key) >= score

    def score(self, key: Key) -> float:
        """The task score of a run that is in the file."""
        with self.file.open(newline="") as file:
            return next(float(r["task_score"]) for r in csv.DictReader(file) if _key(r) == key)

    def run(self, key: Key) -> dict:
        arm = ARMS[key.arm]
        learned, tested = TASKS[key.task](self.base.world, key.seed, self.people)
        context = self._contexts.setdefault(key.seed, Context(self.base, key.seed))
        context.draw = key.seed + 1000 * arm.again
        was = self._asked(key, tested)
        model = arm.build(self.base.model(), context)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, key.lr, weight_decay=arm.decay)
        coded = [encode(self.base.tokenizer, item) for item in learned]
        stream = packed(
            passes(coded, arm, context, key.seed),
            ROWS,
            WIDTH,
            self.base.tokenizer.pad_token_id,
            context.draw,
        )
        extra = _anchor(model, arm, context)
        started = time.perf_counter()
        with PeakMemory(torch.device("cpu")) as memory:
            losses = fit(model, optimizer, stream, self.steps, extra=extra)
        seconds = time.perf_counter() - started
        found = measure(model, self.base, was, key.task, tested)
        row = {
            "arm": key.arm,
            "task": key.task,
            "seed": key.seed,
            "lr": key.lr,
            **found,
            "delta_norm": self._moved(model),
            "params": sum(p.numel() for p in trained),
            "train_loss": sum(losses[-10:]) / len(losses[-10:]),
            "seconds": seconds,
            "peak_mib": memory.peak / 2**20,
            "steps": self.steps,
        }
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}

    def _asked(self, key: Key, tested) -> Before:
        which = (key.task, key.seed)
        if which not in self._before:
            self._before[which] = before(self.base.model(), self.base, {key.task: tested})
        return self._before[which]

    def _moved(self, model) -> float:
        """‖ΔW‖_F over all weights, with the adapter merged."""
        merged = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        total = 0.0
        for name, tensor in merged.named_parameters():
            if name in self.weights:
                total += float((tensor.detach() - self.weights[name]).square().sum())
        return total**0.5

    def _append(self, row: dict) -> None:
        new = not self.file.is_file()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(
            f"{row['arm']} {row['task']} seed {row['seed']} lr {row['lr']:g}: task"
            f" {row['task_score']:.3f}, kept {row['retention']:.3f}, forgetting"
            f" {row['forgetting']:.3f}, KL {row['kl_general']:.3f}, {row['seconds']:.0f} s",
            flush=True,
        )


def _anchor(model, arm: Arm, context: Context):
    """weight · KL(base || tuned) on a few calibration prompts, at all their positions."""
    if not arm.anchor:
        return None
    generator = torch.Generator().manual_seed(context.seed)

    pool = context.texts(arm.anchored)

    def extra(step: int) -> torch.Tensor:
        chosen = torch.randperm(len(pool), generator=generator)[:_ANCHOR_PROMPTS]
        return arm.anchor * divergence(model, [pool[i] for i in chosen])

    return extra
