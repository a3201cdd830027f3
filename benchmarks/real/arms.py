"""The ways to train a real base. To add one: a line in `ARMS`.

An arm's `build` is a function (model, lab) -> the model to train, or (that model, extra). Its
trainable parameters train; `extra(step)` is a loss that is added in every step. The lab has the
tokenizer, the task, and what may be known of the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.forgetting.building import (
    ATTENTION,
    MLP,
    corda,
    freeze_bottom,
    full,
    loki,
    lora,
    osf,
)
from benchmarks.real.lab import Lab
from benchmarks.real.protected import (
    blind_rows,
    blocks,
    by_gain,
    half_precision,
    other_form,
    rounded,
    soft_all,
    soft_rows,
)
from benchmarks.real.rivals import fora, lora_null, oplora
from loki_plugin.protecting.anchor import Anchor

BATCH = 4


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        build: see above.
        rates: learning rates, the first one the best guess.
        decay: AdamW's weight decay.
        replay: (share of the sequences, `real` or `own`: which of the lab's lists).
        anchor: weight of KL(base || tuned) on texts of the lab in every step.
        anchored: which texts, see `Lab.texts`.
        count: how many of them in a step.
        own: how many of the base's own texts are among them; None: all.
        behind: tokens of them that are kept behind the last beginning of an answer; None: all.
        every: steps from one anchor to the next, which counts that many times.
        starts: where answers begin counts as much as all other tokens, as in the product.
        marked: answers begin behind what stands before every answer of the task, wherever that is.
        rest: weight of KL(base || tuned) at the task's own targets, the target left out.
        eaft: Axolotl's loss `use_eaft` instead of cross-entropy.
        again: another order and another start of what is new: how much is noise?
        batch: sequences in a step.
    """

    build: Callable[[Any, Lab], Any]
    rates: tuple[float, ...]
    decay: float = 0.0
    replay: tuple[float, str] | None = None
    anchor: float = 0.0
    anchored: str = "both"
    count: int = 2
    own: int | None = None
    behind: int | None = None
    every: int = 1
    starts: bool = True
    marked: bool = False
    rest: float = 0.0
    eaft: bool = False
    again: bool = False
    batch: int = BATCH


LORA = (3e-4, 1e-3, 1e-4)
FULL = (5e-5, 2e-5, 1e-4)
ROWS = (1e-3, 5e-4, 2e-3)
# In the order in which a screening runs them.
ARMS: dict[str, Arm] = {
    "lora_all_r16": Arm(lora(), LORA),
    "loki_q30": Arm(loki(30), ROWS),
    "loki_soft_q90": Arm(soft_rows(90), ROWS),
    "lora_soft": Arm(soft_all(), (1e-3, 5e-4, 2e-3)),
    "lora_anchor": Arm(lora(), (5e-4, 1e-3, 2e-3), anchor=1.0),
    # `protect: auto` from 0.8.0 to 0.12.0: the anchor held calibration prompts too. So do all arms
    # with an anchor that do not say otherwise.
    "lora_soft_anchor": Arm(soft_all(), (1e-3, 5e-4, 2e-3), anchor=1.0),
    "full": Arm(full, FULL),
    "lora_again": Arm(lora(), LORA, again=True),
    "lora_all_r16_wd0.1": Arm(lora(), LORA, decay=0.1),
    "lora_mlp_r10": Arm(lora(MLP, 10), LORA),
    "lora_attn": Arm(lora(ATTENTION), LORA),
    "lora_gateup": Arm(lora(["gate_proj", "up_proj"]), LORA),
    "dora": Arm(lora(use_dora=True), LORA),
    "osf": Arm(osf, FULL),
    "corda": Arm(corda, (1e-4, 3e-4, 3e-5)),
    "oplora": Arm(oplora(), LORA),
    "fora": Arm(fora(), (1e-3, 3e-4, 3e-3)),
    "lora_null": Arm(lora_null(), LORA),
    "lora_null_frozen": Arm(lora_null(frozen=True), (1e-3, 3e-4, 3e-3)),
    "freeze_bottom": Arm(freeze_bottom, FULL),
    "lora_eaft": Arm(lora(), LORA, eaft=True),
    "lora_kl_rest": Arm(lora(), LORA, rest=1.0),
    "lora_soft_kl_rest": Arm(soft_all(), ROWS, rest=1.0),
    "lora_replay1": Arm(lora(), LORA, replay=(0.01, "real")),
    "lora_replay5": Arm(lora(), LORA, replay=(0.05, "real")),
    "lora_selfreplay": Arm(lora(), LORA, replay=(0.05, "own")),
    "lora_selfreplay50": Arm(lora(), LORA, replay=(0.5, "own")),
    # All tokens alike, and four texts, as anchors were up to 0.7.0.
    "lora_anchor_0.7": Arm(lora(), (5e-4, 1e-3), anchor=1.0, count=4, starts=False),
    "lora_soft_anchor_0.7": Arm(soft_all(), ROWS, anchor=1.0, count=4, starts=False),
    "lora_soft_anchor4": Arm(soft_all(), ROWS, anchor=1.0, count=4),
    # Cheaper ones, and a heavier one.
    "lora_soft_anchor1": Arm(soft_all(), ROWS, anchor=1.0, count=1),
    "lora_soft_anchor_every2": Arm(soft_all(), ROWS, anchor=1.0, every=2),
    "lora_soft_anchor_every4": Arm(soft_all(), ROWS, anchor=1.0, every=4),
    "lora_soft_anchor_w3": Arm(soft_all(), ROWS, anchor=3.0),
    # What a base writes that knows no turns, as up to 0.9.0: without a chat template plain text
    # only, with one anything behind the beginning of a turn. Plain text with people's dialogues,
    # and with line breaks taken for beginnings of answers.
    "lora_soft_anchor_plain": Arm(soft_all(of="both-plain"), ROWS, anchor=1.0, anchored="plain"),
    "lora_soft_anchor_begun": Arm(soft_all(of="both-begun"), ROWS, anchor=1.0, anchored="begun"),
    "lora_soft_anchor_talks": Arm(soft_all(of="both-plain"), ROWS, anchor=1.0, anchored="talks"),
    "lora_soft_anchor_marked": Arm(
        soft_all(of="both-plain"), ROWS, anchor=1.0, anchored="plain", marked=True
    ),
    # Fewer texts of the base's own, in the directions and in the anchor.
    "lora_soft_anchor_own20": Arm(soft_all(own=20), ROWS, anchor=1.0, own=20),
    "lora_soft_anchor_own60": Arm(soft_all(own=60), ROWS, anchor=1.0, own=60),
    "lora_anchor_prompts": Arm(lora(), (5e-4, 1e-3), anchor=1.0, anchored="prompts"),
    # `protect: auto` of today: an anchor on what the base writes alone.
    "auto_all": Arm(soft_all(), ROWS, anchor=1.0, anchored="written"),
    "auto_q10": Arm(soft_rows(10), ROWS, anchor=1.0, anchored="written"),
    "auto_w3": Arm(soft_all(), ROWS, anchor=3.0, anchored="written"),
    "auto_q10_rank16": Arm(soft_rows(10, rank=16), ROWS, anchor=1.0, anchored="written"),
    # The same with A frozen: as drawn, or in what the task gains.
    "auto_frozen": Arm(soft_all(frozen=True), (2e-3, 1e-3), anchor=1.0, anchored="written"),
    "auto_gain_frozen": Arm(by_gain(), ROWS, anchor=1.0, anchored="written"),
    "auto_gain": Arm(by_gain(frozen=False), ROWS, anchor=1.0, anchored="written"),
    "auto_gain_frozen_r32": Arm(by_gain(rank=32), ROWS, anchor=1.0, anchored="written"),
    # Frozen so beside as many directions as a small card could hold while they are looked for.
    "auto_gain_frozen_eighth": Arm(
        by_gain(energy=None, count=1 / 8), ROWS, anchor=1.0, anchored="written"
    ),
    # Larger batches, with as many texts in a step as ever, and with as many more; half as many.
    "auto_b16": Arm(soft_all(), ROWS, anchor=1.0, anchored="written", batch=16),
    "auto_b16_8": Arm(soft_all(), ROWS, anchor=1.0, anchored="written", batch=16, count=8),
    "auto_b32": Arm(soft_all(), ROWS, anchor=1.0, anchored="written", batch=32),
    "auto_one": Arm(soft_all(), ROWS, anchor=1.0, anchored="written", count=1),
    # LoRA-Null's A, frozen in the directions that inputs use least, beside the anchor: no P.
    "auto_null_frozen": Arm(lora_null(frozen=True), ROWS, anchor=1.0, anchored="written"),
    # With fewer of these texts, in the directions too.
    "auto_all_own80": Arm(soft_all(own=80), ROWS, anchor=1.0, anchored="written", own=80),
    "auto_all_own40": Arm(soft_all(own=40), ROWS, anchor=1.0, anchored="written", own=40),
    # On its dialogues alone, and on their beginnings.
    "lora_soft_anchor_dialogues": Arm(soft_all(), ROWS, anchor=1.0, anchored="dialogues"),
    "lora_soft_anchor_short": Arm(soft_all(), ROWS, anchor=1.0, anchored="dialogues", behind=24),
    "lora_hard": Arm(soft_all(energy=0.9, soft=False), ROWS),
    "loki_q10": Arm(loki(10), ROWS),
    "loki_q90": Arm(loki(90), ROWS),
    "random_q10": Arm(loki(10, "random"), ROWS),
    "random_q30": Arm(loki(30, "random"), ROWS),
    "random_q90": Arm(loki(90, "random"), ROWS),
    "loki_soft_q30": Arm(soft_rows(30), ROWS),
    "random_soft_q30": Arm(soft_rows(30, "random"), ROWS),
    "random_soft_q90": Arm(soft_rows(90, "random"), ROWS),
    "loki_soft_anchor_q90": Arm(soft_rows(90), ROWS, anchor=1.0),
    "loki_soft_anchor_q30": Arm(soft_rows(30), ROWS, anchor=1.0),
    "loki_soft_anchor_q10": Arm(soft_rows(10), ROWS, anchor=1.0),
    # Protection as it was in 0.6.0: moments that are not normalised, of the prompts alone.
    "loki_soft_q90_0.6": Arm(blind_rows, ROWS),
    # The mend's parts alone: moments of the prompts, or of what the base writes.
    "loki_soft_prompts_q90": Arm(soft_rows(90, of="prompts"), ROWS),
    "loki_soft_written_q90": Arm(soft_rows(90, of="written"), ROWS),
    "lora_soft_prompts": Arm(soft_all(of="prompts"), ROWS),
    "lora_soft_written": Arm(soft_all(of="written"), ROWS),
    # Rows with all linears.
    "all_soft_q90": Arm(soft_all(90, None), ROWS),
    "all_soft_q30": Arm(soft_all(30, None), ROWS),
    "all_soft_random_q30": Arm(soft_all(30, None, "random"), ROWS),
    "all_soft_random_q90": Arm(soft_all(90, None, "random"), ROWS),
    "all_soft_q10": Arm(soft_all(10, None), ROWS),
    # Forms that take less memory than V [I, u] in float32.
    "form_eighth": Arm(soft_all(energy=None, count=1 / 8), ROWS),
    "form_sixth": Arm(soft_all(energy=None, count=1 / 6), ROWS),
    "form_quarter": Arm(soft_all(energy=None, count=1 / 4), ROWS),
    "form_half": Arm(soft_all(energy=None, count=1 / 2), ROWS),
    "form_bf16": Arm(other_form(half_precision), ROWS),
    "form_8bit": Arm(other_form(rounded(8, 64)), ROWS),
    "form_v8": Arm(soft_all(small=True), ROWS),
    "form_v8_quarter": Arm(soft_all(small=True, energy=None, count=1 / 4), ROWS),
    "form_4bit": Arm(other_form(rounded(4, 64)), ROWS),
    "form_blocks": Arm(other_form(blocks(8)), ROWS),
    # `protect: auto` where a card holds no more of them: 8B on 24 GB has a seventh.
    **{
        f"lora_soft_anchor_{name}": Arm(soft_all(energy=None, count=1 / part), ROWS, anchor=1.0)
        for part, name in {4: "quarter", 8: "eighth", 16: "sixteenth", 32: "thirtysecond"}.items()
    },
    "loki_soft_sixth_q90": Arm(soft_rows(90, energy=None, count=1 / 6), (6e-4, 1e-3, 3e-4)),
}


def extra_loss(model, arm: Arm, lab: Lab):
    """weight · KL(base || tuned) on `count` texts in every step; None without an anchor."""
    if not arm.anchor:
        return None
    longest = 160 if arm.starts else 96  # those of 0.7.0 were measured so
    texts = [ids[:longest] for ids in lab.texts(arm.anchored, arm.own)]
    mark = lab.mark() if arm.marked else None
    starts = [lab.starts(ids, mark) for ids in texts] if arm.starts else None
    if arm.behind is not None and starts:
        texts = [ids[: at[-1] + 1 + arm.behind] for ids, at in zip(texts, starts, strict=True)]
    # It asks the base once per text and keeps the answer, as training does.
    anchor = Anchor(texts, arm.anchor, arm.count, arm.every, starts=starts)

    def extra(step: int) -> torch.Tensor | float:
        if step % anchor.every:
            return 0.0
        kl = anchor.divergence(model, anchor.draw(step, lab.draw))
        return anchor.weight * anchor.every * kl

    return extra
