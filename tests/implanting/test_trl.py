"""`implant()` outside Axolotl: TRL's trainers and transformers' own."""

from __future__ import annotations

import pytest
import torch
from helpers.laws import assert_equal, base_tensors
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loki_plugin import RowSelection, implant
from loki_plugin.implanting.adapter import check
from loki_plugin.implanting.saved import check_saved
from loki_plugin.model.anatomy import find_anatomy

pytestmark = pytest.mark.slow

ROWS = RowSelection([[3, 1, 40], [0, 47, 5, 6], [7, 8, 63]], 64)  # layers of different ranks
IDS = torch.arange(3, 40)[None]
FORMS = pytest.mark.parametrize("rank", [None, 2], ids=["dense", "rank2"])
ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 0.02,
    "weight_decay": 0.1,
    "lr_scheduler_type": "constant",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "dataset_num_proc": 1,
}


def load(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(trainer, base, folder, rank):
    """Train, save with the trainer, and check every law; returns the model."""
    before = base_tensors(trainer.model)
    trainer.train()
    model = trainer.model
    assert_equal(before, base_tensors(model))
    check(model, finite=True)
    trainer.save_model(str(folder))
    check_saved(folder, find_anatomy(model).names, ROWS, rank)
    plain = load(base)
    untouched = logits(plain)
    tuned = logits(PeftModel.from_pretrained(plain, folder))
    assert not torch.equal(tuned, untouched)
    assert torch.allclose(tuned, logits(model), atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)
    return model


@FORMS
def test_sft_trainer(base, tmp_path, rank):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = [{"text": f"say {i}, number {i} it is"} for i in range(16)]
    trainer = SFTTrainer(
        implant(load(base), ROWS, rank),
        args=SFTConfig(str(tmp_path), **ARGUMENTS, gradient_checkpointing=rank is None),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trained(trainer, base, tmp_path / "adapter", rank)


@FORMS
@pytest.mark.parametrize("earlier", [False, True], ids=["fresh", "trained"])
def test_dpo_trainer_refers_to_what_the_adapter_was(base, tmp_path, rank, earlier):
    """To the base where the adapter is fresh, exactly; and its own copy never trains."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = implant(load(base), ROWS, rank)
    if earlier:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)
    at_first = logits(model)
    assert torch.equal(at_first, logits(load(base))) is not earlier
    pairs = [(f"say {i}", f"number {i} it is", f"no, {i} it is not") for i in range(16)]
    data = [{"prompt": q, "chosen": y, "rejected": n} for q, y, n in pairs]
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), **ARGUMENTS),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    assert set(model.peft_config) == {"default", "ref"}
    trained(trainer, base, tmp_path / "adapter", rank)
    model.set_adapter("ref")
    assert torch.equal(logits(model), at_first)
