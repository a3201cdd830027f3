"""The ways to train: what may change, what protects the rest, and at which rates."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.forgetting import choosing
from benchmarks.forgetting.building import (
    ATTENTION,
    MLP,
    Context,
    Sequences,
    corda,
    freeze_bottom,
    full,
    kappatune,
    loki,
    lora,
    lora_protected,
    osf,
    rows_of,
    shira,
)
from loki_plugin import select_rows


@dataclass
class Arm:
    """A way to train.

    Attributes:
        build: (base model, context) -> the model to train, whose trainable parameters train.
        rates: three learning rates of the screening, the middle one a good guess.
        lowest: the lowest rate of the finals, which are longer; each of the others is twice the
            one before.
        decay: AdamW's weight decay.
        replay: (share of the sequences, which of the context's lists) mixed into the task.
        anchor: weight of KL(base || tuned) on calibration prompts in every step.
        anchored: which of the context's `texts` the anchor draws from.
        again: another order and another start of what is new: how much is noise?
    """

    build: Callable[[Any, Context], Any]
    rates: tuple[float, float, float] = (1e-3, 3e-3, 1e-2)
    lowest: float = 1e-4
    decay: float = 0.0
    replay: tuple[float, str] | None = None
    anchor: float = 0.0
    anchored: str = "prompts"
    again: bool = False


LOW, HIGH = (3e-4, 1e-3, 3e-3), (3e-3, 1e-2, 3e-2)


def _full(build, **more) -> Arm:
    return Arm(build, LOW, 1.5e-5, **more)


def _rows(build, lowest: float = 2.5e-4, **more) -> Arm:
    """The fewer weights an update has, the higher the rate that it needs."""
    return Arm(build, HIGH, lowest, **more)


def _chosen(scores: Callable[[Context], torch.Tensor]) -> Arm:
    return _rows(rows_of(lambda c: select_rows(scores(c), 30, "layer_balanced", seed=c.seed)))


def _least_fisher(
    context: Context, energy: float | None = None, soft: bool = False
) -> list[torch.Tensor]:
    kept = None if energy is None else context.directions(energy, soft=soft)
    return [choosing.lowest(f, 30) for f in choosing.fisher(context, kept)]


# In the order in which the screening runs them.
ARMS: dict[str, Arm] = {
    "lora_all_r16": Arm(lora()),
    "loki_q30": _rows(loki()),
    "loki_protect_q30": _rows(loki(protect=0.99), 1e-3),
    "random_q30": _rows(loki(strategy="random")),
    "full": _full(full),
    "lora_all_r16_wd0.3": Arm(lora(), decay=0.3),
    "lora_attn": Arm(lora(ATTENTION), lowest=2e-4),
    "lora_gateup": Arm(lora(["gate_proj", "up_proj"]), lowest=2e-4),
    "lora_mlp_r10": Arm(lora(MLP, 10), lowest=2e-4),
    "loki_magnitude_q30": _rows(loki(magnitude=True)),
    "random_protect_q30": _rows(loki(strategy="random", protect=0.99), 1e-3),
    "loki_protect_text_q30": _rows(loki(protect=0.99, of="text"), 1e-3),
    "loki_anchor_q30": _rows(loki(), anchor=1.0),
    "lora_anchor": Arm(lora(), anchor=1.0),
    "lora_protect": Arm(lora_protected(), lowest=2e-4),
    "lora_replay1": Arm(lora(), replay=(0.01, "pretraining")),
    "lora_replay5": Arm(lora(), replay=(0.05, "pretraining")),
    "lora_selfreplay": Arm(lora(), replay=(0.05, "generated")),
    "loki_protect_anchor_q30": _rows(loki(protect=0.99), 1e-3, anchor=1.0),
    "protect_q99": _rows(loki(quota=99, strategy="random", protect=0.99), 4e-4),
    "loki_q10": _rows(loki(10), 5e-4),
    "highest_q30": _rows(loki(strategy="layer_highest")),
    "loki_lowrank": _rows(loki(rank=16)),
    "smallest_weight_q30": _rows(loki(strategy="smallest_weight")),
    "lora_all_r16_wd0.1": Arm(lora(), decay=0.1),
    "dora": Arm(lora(use_dora=True)),
    "freeze_bottom": _full(freeze_bottom),
    "pissa": Arm(lora(init_lora_weights="pissa"), LOW, 5e-5),
    "mica": Arm(lora(init_lora_weights="mica")),
    "corda": Arm(corda, LOW, 5e-5),
    "osf": Arm(osf, LOW, 5e-5),
    "shira": Arm(shira),
    "kappatune": Arm(kappatune),
    "loki_q20": _rows(loki(20)),
    "loki_q5": _rows(loki(5), 1e-3),
    "random_q10": _rows(loki(10, "random"), 5e-4),
    "highest_q10": _rows(loki(10, "layer_highest"), 5e-4),
    "global_lowest_q30": _rows(loki(strategy="global_lowest")),
    "global_highest_q30": _rows(loki(strategy="global_highest")),
    "smallest_weight_q10": _rows(loki(10, "smallest_weight"), 5e-4),
    "loki_protect90_q30": _rows(loki(protect=0.9), 5e-4),
    "loki_protect_lowrank": _rows(loki(rank=16, protect=0.99), 1e-3),
    # The same again, and what was tried to keep more.
    "lora_again": Arm(lora(), again=True),
    "loki_again_q30": _rows(loki(), again=True),
    "loki_wd0.3_q30": _rows(loki(), decay=0.3),
    "loki_fisher_q30": _rows(rows_of(_least_fisher)),
    "loki_fisher_global_q30": _rows(
        rows_of(lambda c: choosing.lowest_of_all(choosing.fisher(c), 30))
    ),
    "loki_activation_q30": _chosen(choosing.at_activation),
    "loki_all_tokens_q30": _chosen(choosing.all_tokens),
    "loki_one_kind_q30": _chosen(choosing.one_kind),
    "loki_with_text_q30": _chosen(choosing.with_text),
    "loki_q60": _rows(loki(60)),
    "loki_q99": _rows(loki(99)),
    "loki_protect70_q30": _rows(loki(protect=0.7), 3.5e-4),
    "protect90_q99": _rows(loki(quota=99, strategy="random", protect=0.9)),
    "loki_protect_joint_q30": _rows(rows_of(lambda c: _least_fisher(c, 0.9), 0.9), 5e-4),
    "loki_protect_q60": _rows(loki(60, protect=0.99), 5e-4),
    "loki_protect90_q60": _rows(loki(60, protect=0.9), 3.5e-4),
    "loki_protect_q90": _rows(loki(90, protect=0.99), 4e-4),
    "loki_protect_anchor_q90": _rows(loki(90, protect=0.99), 4e-4, anchor=1.0),
    "loki_anchor_q60": _rows(loki(60), anchor=1.0),
    "random_q60": _rows(loki(60, "random")),
    "random_protect90_q60": _rows(loki(60, "random", protect=0.9), 3.5e-4),
    "loki_protect90_anchor_q60": _rows(loki(60, protect=0.9), 3.5e-4, anchor=1.0),
    "loki_protect90_anchor_q90": _rows(loki(90, protect=0.9), 2.5e-4, anchor=1.0),
    "loki_anchor4_q30": _rows(loki(), anchor=4.0),
    "loki_anchor_q99": _rows(loki(99), anchor=1.0),
    "lora_anchor4": Arm(lora(), anchor=4.0),
    # Soft directions: inputs whitened instead of taken away.
    "loki_soft90_q30": _rows(loki(30, protect=0.9, soft=True)),
    "loki_soft99_q10": _rows(loki(10, protect=0.99, soft=True), 1e-3),
    "loki_soft99_q30": _rows(loki(30, protect=0.99, soft=True), 5e-4),
    "loki_soft99_q60": _rows(loki(60, protect=0.99, soft=True), 3.5e-4),
    "loki_soft99_q90": _rows(loki(90, protect=0.99, soft=True)),
    "loki_soft99_lowrank": _rows(loki(rank=16, protect=0.99, soft=True), 1e-3),
    "random_soft99_q30": _rows(loki(30, "random", protect=0.99, soft=True), 5e-4),
    "random_soft99_q90": _rows(loki(90, "random", protect=0.99, soft=True)),
    "highest_soft99_q30": _rows(loki(30, "layer_highest", protect=0.99, soft=True), 5e-4),
    "loki_soft99_anchor_q30": _rows(loki(30, protect=0.99, soft=True), 5e-4, anchor=1.0),
    "loki_soft99_anchor_q90": _rows(loki(90, protect=0.99, soft=True), anchor=1.0),
    "loki_soft99_joint_q30": _rows(
        rows_of(lambda c: _least_fisher(c, 0.99, soft=True), 0.99, soft=True), 5e-4
    ),
    # What fits a consumer's card: 90 % of the rows, and a low rank.
    "loki_lowrank_q90": _rows(loki(90, rank=16), 5e-4),
    "loki_soft99_lowrank_q90": _rows(loki(90, rank=16, protect=0.99, soft=True), 5e-4),
    "loki_soft99_rank64_q90": _rows(loki(90, rank=64, protect=0.99, soft=True), 5e-4),
    "loki_soft999_q90": _rows(loki(90, protect=0.999, soft=True)),
    "loki_soft99_people_q90": _rows(loki(90, protect=0.99, of="people", soft=True)),
    "loki_soft99_eighth_q90": _rows(loki(90, protect=0.99, of="eighth", soft=True)),
    "loki_soft99_text_q90": _rows(loki(90, protect=0.99, of="text", soft=True)),
    "loki_soft99_text_q30": _rows(loki(30, protect=0.99, of="text", soft=True), 5e-4),
    "loki_protect90_q90": _rows(loki(90, protect=0.9)),
    "lora_soft99": Arm(lora_protected(0.99, soft=True), lowest=2e-4),
    "lora_soft99_anchor": Arm(lora_protected(0.99, soft=True), lowest=2e-4, anchor=1.0),
    "random_soft99_anchor_q90": _rows(loki(90, "random", protect=0.99, soft=True), anchor=1.0),
    # What the base writes by itself, beside the calibration's prompts, for directions and anchor.
    "loki_soft99_written_q90": _rows(loki(90, protect=0.99, of="written", soft=True)),
    "loki_soft99_written_anchor_q90": _rows(
        loki(90, protect=0.99, of="written", soft=True), anchor=1.0, anchored="written"
    ),
    "loki_written_anchor_q90": _rows(loki(90), anchor=1.0, anchored="written"),
    "loki_written_anchor_lowrank_q90": _rows(
        loki(90, rank=16), 5e-4, anchor=1.0, anchored="written"
    ),
    "random_written_anchor_q90": _rows(loki(90, "random"), anchor=1.0, anchored="written"),
    "lora_written_anchor": Arm(lora(), anchor=1.0, anchored="written"),
    "lora_soft99_written_anchor": Arm(
        lora_protected(0.99, soft=True, of="written"), lowest=2e-4, anchor=1.0, anchored="written"
    ),
    "lora_writtenreplay50": Arm(lora(), replay=(0.5, "own")),
}


def passes(learned: Sequences, arm: Arm, context: Context, seed: int) -> Iterator[Sequences]:
    """What each pass over the task trains on: the task, and fresh replay where the arm has some."""
    draw = random.Random(f"replay/{seed}")
    while True:
        if arm.replay is None:
            yield learned
            continue
        share, which = arm.replay
        count = max(1, round(share / (1 - share) * len(learned)))
        pool = getattr(context, which)
        yield [*learned, *draw.choices(pool, k=count)]
