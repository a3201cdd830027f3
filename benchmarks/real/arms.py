"""The ways to train a real base. To add one: a line in `ARMS`.

An arm's `build` is a function (model, lab) -> the model to train, or (that model, extra). Its
trainable parameters train; `extra(step)` is a loss that is added in every step. The lab has the
tokenizer, the task, and what may be known of the base.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from benchmarks.forgetting.building import (
    ATTENTION,
    LINEARS,
    MLP,
    corda,
    freeze_bottom,
    full,
    loki,
    lora,
    osf,
)
from benchmarks.real.lab import Lab
from loki_plugin import implant
from loki_plugin.implanting.anchor import divergence
from loki_plugin.implanting.protection import ProtectedA, folded_delta
from loki_plugin.model.anatomy import find_anatomy


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
        eaft: Axolotl's loss `use_eaft` instead of cross-entropy.
        again: another order and another start of what is new: how much is noise?
    """

    build: Callable[[Any, Lab], Any]
    rates: tuple[float, ...]
    decay: float = 0.0
    replay: tuple[float, str] | None = None
    anchor: float = 0.0
    anchored: str = "both"
    eaft: bool = False
    again: bool = False


def soft_rows(
    quota: float = 90, strategy: str = "layer_balanced", rank: int | None = None, **of
) -> Callable:
    """LoKI's rows, reading through directions of normalised moments (`Lab.normalised`)."""

    def build(model, lab: Lab):
        torch.manual_seed(lab.draw)
        known = lab.normalised(**of)
        basis = [known[name] for name in find_anatomy(model).names]
        return implant(model, lab.rows(quota, strategy), rank=rank, protect=basis)

    return build


def soft_lora(targets=LINEARS, r: int = 16, **of) -> Callable:
    """LoRA, each layer reading through directions of normalised moments."""

    def build(model, lab: Lab):
        torch.manual_seed(lab.draw)
        known = lab.normalised(**of)
        names = {module: name for name, module in model.named_modules()}
        wrapped = get_peft_model(
            model, LoraConfig(r=r, lora_alpha=r, target_modules=targets, task_type="CAUSAL_LM")
        )
        kept = {id(m): n for m, n in names.items()}
        for module in wrapped.modules():
            if isinstance(module, LoraLayer):
                v = known[kept[id(module.get_base_layer())]]
                module.lora_A["default"] = ProtectedA(module.lora_A["default"].weight, v)
                module.get_delta_weight = functools.partial(folded_delta, module)
        return wrapped

    return build


LORA = (3e-4, 1e-3, 1e-4)
FULL = (5e-5, 2e-5, 1e-4)
ROWS = (1e-3, 5e-4, 2e-3)
# In the order in which a screening runs them.
ARMS: dict[str, Arm] = {
    "lora_all_r16": Arm(lora(), LORA),
    "loki_q30": Arm(loki(30), ROWS),
    "loki_soft_q90": Arm(soft_rows(90), ROWS),
    "lora_soft": Arm(soft_lora(), (1e-3, 5e-4, 2e-3)),
    "lora_anchor": Arm(lora(), (5e-4, 1e-3, 2e-3), anchor=1.0),
    "lora_soft_anchor": Arm(soft_lora(), (1e-3, 5e-4, 2e-3), anchor=1.0),
    "full": Arm(full, FULL),
    "lora_again": Arm(lora(), LORA, again=True),
    "lora_all_r16_wd0.1": Arm(lora(), LORA, decay=0.1),
    "lora_mlp_r10": Arm(lora(MLP, 10), LORA),
    "lora_attn": Arm(lora(ATTENTION), LORA),
    "lora_gateup": Arm(lora(["gate_proj", "up_proj"]), LORA),
    "dora": Arm(lora(use_dora=True), LORA),
    "osf": Arm(osf, FULL),
    "corda": Arm(corda, (1e-4, 3e-4, 3e-5)),
    "freeze_bottom": Arm(freeze_bottom, FULL),
    "lora_eaft": Arm(lora(), LORA, eaft=True),
    "lora_replay1": Arm(lora(), LORA, replay=(0.01, "real")),
    "lora_replay5": Arm(lora(), LORA, replay=(0.05, "real")),
    "lora_selfreplay": Arm(lora(), LORA, replay=(0.05, "own")),
    "lora_selfreplay50": Arm(lora(), LORA, replay=(0.5, "own")),
    "lora_anchor_prompts": Arm(lora(), (5e-4, 1e-3), anchor=1.0, anchored="prompts"),
    "lora_hard": Arm(soft_lora(energy=0.9, soft=False), ROWS),
    "loki_q10": Arm(loki(10), ROWS),
    "loki_q90": Arm(loki(90), ROWS),
    "random_q10": Arm(loki(10, "random"), ROWS),
    "random_q30": Arm(loki(30, "random"), ROWS),
    "random_q90": Arm(loki(90, "random"), ROWS),
    "loki_soft_q30": Arm(soft_rows(30), ROWS),
    "random_soft_q30": Arm(soft_rows(30, "random"), ROWS),
    "random_soft_q90": Arm(soft_rows(90, "random"), ROWS),
    "loki_soft_anchor_q90": Arm(soft_rows(90), ROWS, anchor=1.0),
    # Protection as it was in 0.6.0: moments that are not normalised, of the prompts alone.
    "loki_soft_q90_0.6": Arm(loki(90, protect=0.99, soft=True), ROWS),
    # The same two apart: normalised moments of the prompts alone; a sixth of the directions.
    "loki_soft_prompts_q90": Arm(soft_rows(90, of="prompts"), ROWS),
    "loki_soft_sixth_q90": Arm(soft_rows(90, energy=None, count=256), (6e-4, 1e-3, 3e-4)),
}


def extra_loss(model, arm: Arm, lab: Lab, count: int = 4, longest: int = 96):
    """weight · KL(base || tuned) on `count` texts in every step; None without an anchor."""
    if not arm.anchor:
        return None
    pool = [ids[:longest] for ids in lab.texts(arm.anchored)]
    draw = random.Random(f"anchor/{lab.seed}/{lab.draw}")

    def extra(step: int) -> torch.Tensor:
        return arm.anchor * divergence(model, draw.sample(pool, count))

    return extra
