"""Data sets that are read while they are trained on: text alone, and dialogues."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM

from loki_plugin.host import task
from loki_plugin.rows import RowSelection

pytestmark = pytest.mark.slow

PACKED = {"sample_packing": True, "flash_attention": False, "sdp_attention": True}


def of_text(config: dict, folder: Path) -> None:
    """The run's data is plain text, as pretraining has it."""
    path = folder / "plain.jsonl"
    told = (f"The number {i} stands between {i - 1} and {i + 1}." for i in range(400))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in told))
    del config["datasets"]
    config["pretraining_dataset"] = [{"path": "json", "data_files": str(path), "split": "train"}]


def of_dialogues(config: dict, folder: Path) -> None:
    """The same dialogues as ever, from a folder: of one file Axolotl makes no packed stream."""
    [data], home = config["datasets"], folder / "dialogues"
    home.mkdir()
    shutil.copy(data["path"], home / "train.jsonl")
    data |= {"path": str(home), "split": "train"}
    config["streaming"] = True


@pytest.mark.parametrize("packed", [False, True], ids=["single", "packed"])
@pytest.mark.parametrize("data", [of_text, of_dialogues])
def test_what_updates_read_is_set_from_a_stream_that_then_trains(
    data, packed, run_config, train, base, tmp_path, monkeypatch
):
    streamed, read = [], task.task_texts

    def seen(trainer):
        streamed.append(isinstance(trainer.train_dataset, IterableDataset))
        return read(trainer)

    monkeypatch.setattr(task, "task_texts", seen)
    data(run_config, tmp_path)
    run_config |= PACKED if packed else {}
    run_config["loki"] |= {"targets": "all", "rank": 2, "quota": 100, "protect": "auto"}
    train(run_config)
    assert streamed == [True]
    out = Path(run_config["output_dir"])
    report = json.loads((out / "loki_report.json").read_text())
    assert report["verified"] and report["protection"]["still"]
    assert report["protection"]["set_from"]["texts"] > 1
    saved = load_file(out / "adapter_model.safetensors")
    assert all(torch.count_nonzero(saved[name]) for name in saved if "lora_B" in name)
    a = "base_model.model.model.layers.0.self_attn.{}_proj.lora_A.weight"
    assert torch.equal(saved[a.format("q")], saved[a.format("k")])  # set, and not as drawn
    assert set(RowSelection.load(out / "loki_rows.json").counts) == {64}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
