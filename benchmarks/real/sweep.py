"""Runs, each measured on its way: a block of lines of a results file per run, resumable run by run.

The rate rises over the first steps and stays, so that a point of a run does not depend on how long
the run is: a run is a curve, and arms are compared where their curves reach the same task loss.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock

from benchmarks.machine import describe
from benchmarks.real import tasks
from benchmarks.real.arms import ARMS, Arm, extra_loss
from benchmarks.real.lab import Lab
from benchmarks.real.scoring import (
    answers,
    divergence_of_rest,
    hidden_at,
    inner,
    loss_of,
    score,
)

POINTS = (0, 3, 6, 10, 15, 20, 26, 33, 40, 50, 60, 80, 100)
_WARM_UP = 5
FIELDS = (
    "base", "task", "arm", "seed", "rate", "step", "task_loss", "task_score", "task_accepted",
    "facts_kept", "facts_first", "choice_score", "choice_lost", "choice_won", "kl_dialogues",
    "kl_people", "kl_text", "ce_rise", "ce_rise_text", "ce_rise_dialogues", "ce_rise_people",
    "train_loss", "trained_parameters", "seconds", "measuring_seconds", "amount", "precision",
    "device",
    "choice_arc_easy", "choice_piqa", "choice_hellaswag", "choice_blimp",
    "kl_text_wikipedia", "kl_text_web", "kl_text_news", "kl_text_fiction", "kl_text_code",
    "kl_text_german", "kl_text_chinese", "kl_text_maths", "kl_text_service",
)  # fmt: skip


@dataclass(frozen=True)
class Key:
    """What tells one run from another."""

    base: str
    task: str
    arm: str
    seed: int
    rate: float
    amount: str


def key_of(row: dict) -> Key:
    return Key(
        row["base"], row["task"], row["arm"], int(row["seed"]), float(row["rate"]), row["amount"]
    )


def done(file: Path) -> set[Key]:
    """Runs that stand in the file."""
    if not file.is_file():
        return set()
    with file.open(newline="") as lines:
        return {key_of(row) for row in csv.DictReader(lines)}


def run_all(
    labs: dict[str, Lab],
    keys: Iterable[Key],
    file: Path,
    until: float | None = None,
    steps: int = POINTS[-1],
    to_end: bool = False,
    *,
    precision: str,
    points: Sequence[int] = POINTS,
) -> list[Key]:
    """Run what is missing; returns what was not run because it is later than `until`."""
    keys = list(keys)
    for i, key in enumerate(keys):
        if until is not None and time.time() > until:
            print(f"the time is up with {len(keys) - i} runs to go: the same command goes on")
            return keys[i:]
        if key in done(file):
            continue
        rows = run(labs[key.base], key, steps, to_end, precision=precision, points=points)
        _append(file, rows)
    return []


def _append(file: Path, rows: list[dict]) -> None:
    """A run's lines stand in the file all or not at all; several processes may write."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        if rows and key_of(rows[0]) in done(file):
            return
        new = not file.is_file()
        with file.open("a", newline="") as out:
            writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
        about = file.with_suffix(".json")
        known = json.loads(about.read_text()) if about.is_file() else []
        machine = describe(torch.device("cuda" if rows[0]["device"] == "cuda" else "cpu"))
        if machine not in known:
            about.write_text(json.dumps([*known, machine], indent=2) + "\n")


def run(
    lab: Lab,
    key: Key,
    steps: int = POINTS[-1],
    to_end: bool = False,
    *,
    precision: str,
    points: Sequence[int] = POINTS,
) -> list[dict]:
    """Train one arm, measured at `points` up to `steps`; a line per point.

    A run ends one point after it has reached the loss, and the score, at which arms are compared,
    unless `to_end`. The old knowledge is measured in float32 whatever the training's precision:
    `bf16` is autocast, which takes many times as long on a CPU that does not multiply in it.
    """
    arm, kind = ARMS[key.arm], tasks.TASKS[key.task]
    task = lab.teach(key.task, key.seed, key.seed + 1000 * arm.again)
    model, extra = _built(arm, lab)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, key.rate, weight_decay=arm.decay)
    stream = lab.stream(arm, arm.batch)
    about = {
        **{k: getattr(key, k) for k in ("base", "task", "arm", "seed", "rate", "amount")},
        "trained_parameters": sum(p.numel() for p in trained),
        "precision": precision,
        "device": lab.device.type,
    }
    points = [0, *(p for p in points if 0 < p <= steps)]
    rows: list[dict] = []
    seconds, losses = 0.0, [math.nan]
    reached: set[str] = set() if kind.score is not None else {"score"}
    for number, point in enumerate(points):
        started = time.perf_counter()
        model.train()
        losses = losses if point == 0 else []
        for step in range(points[number - 1] if number else 0, point):
            for group in optimizer.param_groups:
                group["lr"] = key.rate * min(1.0, (step + 1) / _WARM_UP)
            losses.append(_step(model, arm, next(stream), extra, step, optimizer, precision))
        seconds += time.perf_counter() - started
        now = time.perf_counter()
        found = _task_score(lab, model, task)
        arrived = {"loss"} if found["task_loss"] <= kind.loss else set()
        arrived |= {"score"} if found["task_score"] >= (kind.score or 0) else set()
        last = point == points[-1] or (reached >= {"loss", "score"} and not to_end)
        depth = 2 if last or arrived - reached else number % 2
        reached |= arrived
        if point == 0:
            found |= lab.probes.start(kind.without)
        else:
            found |= lab.probes.measure(model, lab.head, depth, kind.without)
        if task.accepts and depth == 2:
            found["task_accepted"] = _accepted(lab, model, task)
        row = {**about, "step": point, **found, "train_loss": sum(losses) / len(losses)}
        row |= {"seconds": seconds, "measuring_seconds": time.perf_counter() - now}
        rows.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()})
        _tell(rows[-1])
        if last:
            break
    return rows


def _built(arm: Arm, lab: Lab):
    """(the model to train, the function of its extra loss or None)."""
    made = arm.build(lab.model(), lab)
    model, extra = made if isinstance(made, tuple) else (made, None)
    # New weights of adapters stand where the base stands.
    return model.to(lab.device), extra or extra_loss(model, arm, lab)


def _step(model, arm: Arm, batch, extra, step: int, optimizer, precision: str) -> float:
    device = inner(model).get_input_embeddings().weight.device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        loss = _eaft(model, batch) if arm.eaft else loss_of(model, batch)
        told = loss.item()
        if extra is not None:
            loss = loss + extra(step)
        if arm.rest:
            loss = loss + arm.rest * divergence_of_rest(model, batch)
    if not math.isfinite(told):
        raise FloatingPointError(f"the loss is {told} at step {step}; use a lower rate")
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return told


def _eaft(model, batch) -> torch.Tensor:
    """Axolotl's own entropy-aware loss, at the targets."""
    from axolotl.monkeypatch.loss.eaft import eaft_loss

    hidden, wanted = hidden_at(model, batch)
    logits = inner(model).get_output_embeddings()(hidden)
    # It shifts: the first label is not used, nor is the last position.
    first = wanted.new_full((1,), -100)
    shifted = torch.cat([logits, logits[-1:]])[None]
    return eaft_loss(SimpleNamespace(logits=shifted), torch.cat([first, wanted])[None])


def _task_score(lab: Lab, model, task: tasks.Task) -> dict[str, float]:
    found = score(model, task.tested)
    return {"task_loss": found.loss, "task_score": float(found.whole.float().mean())}


def _accepted(lab: Lab, model, task: tasks.Task) -> float:
    """Share of calls that are right by their `accept` lists, as the model writes them."""
    prompts = [a.ids[: a.first] for a in task.tested]
    longest = max(a.targets for a in task.tested) + 8
    said = answers(model, lab.tokenizer, prompts, longest)
    words = [lab.tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
    good = [tasks.accepted(w, accept) for w, accept in zip(words, task.accepts, strict=True)]
    return sum(good) / len(good)


def _tell(row: dict) -> None:
    parts = [f"{row['arm']} {row['task']} seed {row['seed']} rate {row['rate']:g}"]
    parts += [f"step {row['step']:3d}: loss {row['task_loss']:.3f}"]
    for what in ("task_score", "kl_dialogues", "kl_text", "facts_kept", "choice_score"):
        parts += [f"{what} {row[what]:.3f}"] if row.get(what) is not None else []
    print(", ".join(parts) + f", {row['seconds']:.0f} s", flush=True)
