"""The update norm that is logged is the norm of the update, in both forms, protected or not."""

from __future__ import annotations

import pytest
import torch
from helpers import runs
from peft.tuners.lora import LoraLayer

from loki_plugin import implant
from loki_plugin.implanting.recording import record, update_norm


@pytest.mark.parametrize("protected", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_norm_is_that_of_the_merged_update(rank, protected):
    model = runs.model()
    layers, inner = model.config.num_hidden_layers, model.config.intermediate_size
    torch.manual_seed(0)
    basis = [torch.linalg.qr(torch.randn(inner, 5))[0] for _ in range(layers)]
    rows = [[1, 4, 7, 9], [0, 2, 4, 8]] + [[3, 5, 6, 7]] * (layers - 2)
    tuned = implant(model, rows, rank, protect=basis if protected else None)
    assert update_norm(tuned) == 0
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    norm = update_norm(tuned)
    deltas = [m.get_delta_weight("default") for m in tuned.modules() if isinstance(m, LoraLayer)]
    expected = torch.stack([d.double().square().sum() for d in deltas]).sum().sqrt()
    assert len(deltas) == layers
    assert float(norm) == pytest.approx(float(expected), rel=1e-5)


class Trainer:
    """What `record` touches of one."""

    def __init__(self, model):
        self.model, self.logged = model, []

    def log(self, logs, start_time=None):
        self.logged.append(dict(logs))


def test_only_training_steps_carry_our_figures():
    trainer = Trainer(implant(runs.model(), [[1, 2]] * 3))
    kl = iter([None, torch.tensor(0.25)])
    record(trainer, 6, lambda: next(kl))
    trainer.log({"loss": 1.0}, start_time=0.0)
    trainer.log({"eval_loss": 1.0})
    trainer.log({"loss": 0.5})
    trainer.log({"train_loss": 0.7})
    assert trainer.logged == [
        {"loss": 1.0, "loki/update_norm": 0.0, "loki/rows": 6},
        {"eval_loss": 1.0},
        {"loss": 0.5, "loki/update_norm": 0.0, "loki/kl_to_base": 0.25},
        {"train_loss": 0.7},
    ]
