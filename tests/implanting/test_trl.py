"""`implant()` outside Axolotl: TRL's trainers and transformers' own."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.laws import assert_equal, base_tensors
from helpers.merging import shaken
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loki_plugin import RowSelection, implant
from loki_plugin.implanting.adapter import check
from loki_plugin.implanting.saved import WEIGHTS, check_saved
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


def dpo_trainer(model, base, folder, **more):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    pairs = [(f"say {i}", f"number {i} it is", f"no, {i} it is not") for i in range(16)]
    data = [{"prompt": q, "chosen": y, "rejected": n} for q, y, n in pairs]
    return DPOTrainer(
        model,
        args=DPOConfig(str(folder), **ARGUMENTS | more),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


@FORMS
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
def test_dpo_trainer_refers_to_what_the_adapter_was(base, tmp_path, rank, fresh):
    """To the base where the adapter is fresh, exactly; and its own copy never trains."""
    model = implant(load(base), ROWS, rank)
    if not fresh:
        shaken(model, 0.1)
    at_first = logits(model)
    assert torch.equal(at_first, logits(load(base))) is fresh
    trainer = dpo_trainer(model, base, tmp_path)
    assert set(model.peft_config) == {"default", "ref"}
    trained(trainer, base, tmp_path / "adapter", rank)
    model.set_adapter("ref")
    assert torch.equal(logits(model), at_first)


@FORMS
def test_a_dpo_run_that_is_resumed_is_the_one_that_was_not_stopped(base, tmp_path, rank):
    """transformers resumes from the folders of single adapters, where a checkpoint has any, and
    from nothing else: TRL's copy must not be there."""

    def run(folder, checkpoint=None):
        model = shaken(implant(load(base), ROWS, rank), 0.1)
        at_first = logits(model)
        trainer = dpo_trainer(model, base, folder, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        trainer.save_model(str(folder / "end"))
        model.set_adapter("ref")
        assert torch.equal(logits(model), at_first)
        return load_file(folder / "end" / WEIGHTS)

    whole = run(tmp_path / "whole")
    for steps in (2, 4):  # half of the run; all of it, and no step is left
        checkpoint = tmp_path / "whole" / f"checkpoint-{steps}"
        assert_equal(whole, run(tmp_path / f"from {steps}", checkpoint))
        assert not (checkpoint / "ref").exists()
    half = load_file(tmp_path / "whole" / "checkpoint-2" / WEIGHTS)
    assert any(not torch.equal(half[key], whole[key]) for key in whole)
    assert not (tmp_path / "whole" / "end" / "ref").exists()


def test_a_checkpoint_that_holds_the_reference_is_refused(base, tmp_path):
    """Those that were saved before it was left out do; resuming would drop what was learned."""
    more = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = dpo_trainer(implant(load(base), ROWS), base, tmp_path, **more)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    trainer.model.save_pretrained(checkpoint, selected_adapters=["ref"])
    with pytest.raises(ValueError, match="remove the folder '.*checkpoint-2/ref' and resume again"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    shutil.rmtree(checkpoint / "ref")
    trainer.train(resume_from_checkpoint=str(checkpoint))
