"""After training: what was trained is always saved, and the verdict says what was compared."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from loki_plugin.plugin import LokiPlugin
from loki_plugin.rows import RowSelection

pytestmark = pytest.mark.slow


def report(out):
    return json.loads((out / "loki_report.json").read_text())


def at_step(monkeypatch, number, act):
    """Let `act(model)` happen after optimizer step `number` of the run."""

    class Act(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == number:
                act(model)

    create = LokiPlugin.post_trainer_create

    def post_trainer_create(self, cfg, trainer):
        create(self, cfg, trainer)
        trainer.add_callback(Act())

    monkeypatch.setattr(LokiPlugin, "post_trainer_create", post_trainer_create)


def test_a_fault_is_raised_after_the_adapter_is_saved_and_marked(run_config, train, monkeypatch):
    out = Path(run_config["output_dir"])
    run_config["max_steps"] = 2
    with monkeypatch.context() as patch:
        at_step(patch, 1, lambda m: m.base_model.model.model.norm.weight.data.mul_(1.5))
        with pytest.raises(RuntimeError, match="saved to .*do not use it: weights of the base"):
            train(run_config)
    assert load_file(out / "adapter_model.safetensors")  # hours of training are not lost
    assert "weights of the base model have changed" in (out / "LOKI_FAILED.txt").read_text()
    assert report(out)["verified"] is False
    assert "weights of the base model have changed" in report(out)["faults"][0]
    train(run_config)
    assert not (out / "LOKI_FAILED.txt").exists()
    assert report(out)["verified"] is True and report(out)["faults"] == []


@pytest.mark.parametrize("given", [None, "main"])
def test_the_adapter_names_the_revision_of_its_base(run_config, train, given):
    """Tools that load the base which an adapter names load that one."""
    out = Path(run_config["output_dir"])
    train(run_config | {"max_steps": 1} | ({"revision_of_model": given} if given else {}))
    assert json.loads((out / "adapter_config.json").read_text())["revision"] == given


def test_a_check_that_cannot_run_costs_no_training(run_config, train, monkeypatch):
    import loki_plugin.model.fingerprint as module

    out = Path(run_config["output_dir"])
    run_config["max_steps"] = 2

    def broken(model):
        raise IndexError("a base that nobody foresaw")

    at_step(monkeypatch, 2, lambda m: monkeypatch.setattr(module, "fingerprint", broken))
    with pytest.raises(RuntimeError, match="the check itself failed .IndexError.'a base that"):
        train(run_config)
    assert load_file(out / "adapter_model.safetensors")
    assert "nobody foresaw" in (out / "LOKI_FAILED.txt").read_text()
    assert report(out)["verified"] is False


@pytest.mark.parametrize("rank", [None, 2], ids=["dense", "rank2"])
def test_one_nan_loss_stops_the_training_and_is_named(
    run_config, train, monkeypatch, our_log, rank
):
    """With gradient clipping it used to be 'non-zero rows outside the selection' at the end."""
    out = Path(run_config["output_dir"])
    run_config["loki"]["rank"] = rank
    run_config |= {"max_grad_norm": 1.0, "max_steps": 50}
    create = LokiPlugin.post_trainer_create

    def post_trainer_create(self, cfg, trainer):
        create(self, cfg, trainer)
        compute = trainer.compute_loss

        def compute_loss(*args, **kwargs):
            loss = compute(*args, **kwargs)
            return loss * float("nan") if trainer.state.global_step == 2 else loss

        trainer.compute_loss = compute_loss

    monkeypatch.setattr(LokiPlugin, "post_trainer_create", post_trainer_create)
    with pytest.raises(RuntimeError, match="do not use it: .*lora_[AB].* holds NaN or Inf"):
        train(run_config)
    tensors = load_file(out / "adapter_model.safetensors")
    selection = RowSelection.load(out / "loki_rows.json")
    for layer, rows in enumerate(selection.rows):
        b = tensors[f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_B.weight"]
        b[rows] = 0
        assert not b.any()  # no NaN outside the rows either
    said = {r.getMessage() for r in our_log.records if "training stops" in r.getMessage()}
    assert len(said) == 1 and "step 3: training stops" in said.pop()
    assert report(out)["verified"] is False


@pytest.mark.parametrize(
    ("setting", "compared"),
    [
        ({}, "every byte"),
        ({"load_in_4bit": True}, "embeddings, norms and biases .quantised weights may"),
    ],
    ids=["fp32", "nf4"],
)
def test_the_report_says_what_was_compared(run_config, train, setting, compared):
    train(run_config | setting | {"max_steps": 2})
    what = report(Path(run_config["output_dir"]))["verified_what"]
    assert what.keys() == {"adapter", "base", "saved"}

    assert re.match(compared, what["base"])
    assert "lora_B is confined to its rows" in what["adapter"]
    assert "B against loki_rows.json" in what["saved"]


def test_an_older_adapter_keeps_its_rows_until_it_is_overwritten(
    run_config, train, monkeypatch, tmp_path
):
    out = Path(run_config["output_dir"])
    run_config["max_steps"] = 2
    train(run_config)
    before = (out / "loki_rows.json").read_bytes()
    other = RowSelection([range(6)] * 3, 64)
    run_config["loki"] = {"rows": str(other.save(tmp_path / "rows.json"))}

    def die(model):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        at_step(patch, 1, die)
        with pytest.raises(KeyboardInterrupt):
            train(run_config)
    assert (out / "loki_rows.json").read_bytes() == before
    train(run_config)
    assert RowSelection.load(out / "loki_rows.json") == other


def test_a_truncated_save_is_found_and_the_report_says_so(run_config, train, monkeypatch):
    from peft import PeftModel

    save = PeftModel.save_pretrained
    out = Path(run_config["output_dir"])

    def truncating(self, folder, *args, **kwargs):
        assert report(out)["verified"] is False  # nothing is on disk yet
        save(self, folder, *args, **kwargs)
        file = Path(folder) / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    monkeypatch.setattr(PeftModel, "save_pretrained", truncating)
    run_config["max_steps"] = 2
    with pytest.raises(RuntimeError, match="do not use it"):
        train(run_config)
    assert report(out)["verified"] is False and report(out)["faults"]
    assert (out / "LOKI_FAILED.txt").is_file()


def test_a_damaged_save_is_found(run_config, train, monkeypatch):
    """The proof reads what was saved, not what was in memory."""
    from peft import PeftModel
    from safetensors.torch import save_file

    save = PeftModel.save_pretrained

    def damaging(self, folder, *args, **kwargs):
        save(self, folder, *args, **kwargs)
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(n for n in tensors if "layers.1" in n and "lora_B" in n)
        tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, file)

    monkeypatch.setattr(PeftModel, "save_pretrained", damaging)
    run_config["max_steps"] = 2
    with pytest.raises(RuntimeError, match="layer 1: the saved lora_B is not the one-hot"):
        train(run_config)
    assert "layer 1" in (Path(run_config["output_dir"]) / "LOKI_FAILED.txt").read_text()
