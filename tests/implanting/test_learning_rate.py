"""`lr_scale` multiplies the whole curve of every scheduler that Axolotl offers."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny
from transformers.trainer_utils import SchedulerType

from loki_plugin import RowSelection, implant
from loki_plugin.implanting.training import prepare_trainer

STEPS, RATE = 24, 0.01
# What a scheduler needs besides its name: keys of the training arguments.
SETTINGS = {
    "one_cycle": {"lr_scheduler_type": "cosine", "alternate_lr_scheduler_type": "one_cycle"},
    "rex": {"lr_scheduler_type": "cosine", "alternate_lr_scheduler_type": "rex"},
    "cosine, quadratic warmup": {"lr_scheduler_type": "cosine", "lr_quadratic_warmup": True},
    "cosine, least rate": {"lr_scheduler_type": "cosine", "cosine_min_lr_ratio": 0.1},
    "cosine, constant end": {
        "lr_scheduler_type": "cosine",
        "cosine_min_lr_ratio": 0.1,
        "cosine_constant_lr_ratio": 0.8,
    },
    "rex, least rate": {
        "lr_scheduler_type": "cosine",
        "alternate_lr_scheduler_type": "rex",
        "cosine_min_lr_ratio": 0.1,
    },
    "jagged restarts": {
        "lr_scheduler_type": "cosine",
        "jagged_restart_steps": 6,
        "jagged_restart_warmup_steps": 2,
    },
}
WATCHES_LOSS = ("reduce_lr_on_plateau", "greedy")
NEEDED = {
    "cosine_with_min_lr": {"min_lr": 0.001},
    "cosine_warmup_with_min_lr": {"min_lr": 0.001},
    "warmup_stable_decay": {"num_decay_steps": 8},
    "polynomial": {"lr_end": 0.001},
}
SETTINGS |= {
    kind.value: {"lr_scheduler_type": kind.value, "lr_scheduler_kwargs": NEEDED.get(kind, {})}
    for kind in SchedulerType
}


def rates(settings: dict, lr_scale: float, tmp_path) -> list[float]:
    """The learning rate of every step."""
    from axolotl.core.trainers import AxolotlTrainer
    from axolotl.core.training_args import AxolotlTrainingArguments

    watches_loss = settings["lr_scheduler_type"] in WATCHES_LOSS
    selection = RowSelection([range(4)] * 3, 48)
    model = implant(tiny("llama"), selection)
    args = AxolotlTrainingArguments(
        output_dir=str(tmp_path),
        learning_rate=RATE,
        max_steps=STEPS,
        warmup_steps=4,
        use_cpu=True,
        report_to=[],
        **({"eval_strategy": "steps", "eval_steps": 1} if watches_loss else {}),
        **{"lr_scheduler_kwargs": {}, **settings},
    )
    trainer = AxolotlTrainer(model=model, args=args, eval_dataset=[{"input_ids": [1]}])
    prepare_trainer(trainer, selection, lr_scale, None)
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(STEPS, trainer.optimizer)
    found = []
    for step in range(STEPS):
        found += {group["lr"] for group in trainer.optimizer.param_groups}
        trainer.optimizer.step()
        scheduler.step(*([float(step)] if watches_loss else []))
    assert trainer.args.learning_rate == RATE
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_lr_scale_holds_for_every_scheduler(name, tmp_path):
    plain, scaled = (torch.tensor(rates(SETTINGS[name], s, tmp_path)) for s in (1.0, 0.25))
    assert len(plain) == STEPS and plain.max() > RATE / 4
    assert torch.allclose(scaled, plain / 4, rtol=1e-6, atol=0)
