"""End to end through Axolotl's own load_cfg and do_train."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loki_plugin.rows import RowSelection

pytestmark = pytest.mark.slow

# Runs where loki_plugin cannot be imported: what is saved must be an ordinary LoRA adapter.
STOCK_PEFT = """
import sys
sys.modules["loki_plugin"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, four_bit, training, out = sys.argv[1:]
config = None
if four_bit == "True":
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(
    base, dtype=torch.float32, quantization_config=config, attn_implementation="sdpa")
model = PeftModel.from_pretrained(model, adapter).train(training == "True")
with torch.no_grad():
    logits = model(input_ids=torch.arange(3, 40)[None]).logits
torch.save(logits, out)
"""


def checkpoint(folder):
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def assert_only_rows_changed(base, tuned, selection):
    """Every unselected row and every other tensor is bit-identical; selected rows are not."""
    before, after = checkpoint(base), checkpoint(tuned)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        if not name.endswith((".mlp.down_proj.weight", ".mlp.shared_expert.down_proj.weight")):
            assert torch.equal(after[name], tensor), name
            continue
        rows = selection.rows[int(name.split(".")[2])]
        frozen = torch.ones(len(tensor), dtype=torch.bool)
        frozen[rows] = False
        assert torch.equal(after[name][frozen], tensor[frozen]), name
        assert (after[name][rows] != tensor[rows]).any(1).all(), name


@pytest.fixture
def captured(monkeypatch):
    """The trained model as the last hook sees it, and the losses of the trainer."""
    from loki_plugin.plugin import LokiPlugin

    seen = {}
    finish, create = LokiPlugin.post_train, LokiPlugin.post_trainer_create

    def post_train(self, cfg, model):
        seen["model"] = model
        finish(self, cfg, model)

    def post_trainer_create(self, cfg, trainer):
        seen["trainer"] = trainer
        create(self, cfg, trainer)

    monkeypatch.setattr(LokiPlugin, "post_train", post_train)
    monkeypatch.setattr(LokiPlugin, "post_trainer_create", post_trainer_create)
    return seen


@pytest.mark.parametrize("rank", [None, 2], ids=["dense", "rank2"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
def test_trains_saves_and_merges(run_config, train, captured, base, tmp_path, rank, four_bit):
    run_config["loki"]["rank"] = rank
    run_config["load_in_4bit"] = four_bit
    train(run_config)
    out = Path(run_config["output_dir"])

    log = [h["loss"] for h in captured["trainer"].state.log_history if "loss" in h]
    assert len(log) == 6
    assert log[-1] < log[0] - 0.05

    selection = RowSelection.load(out / "loki_rows.json")
    assert selection.counts == [6, 6, 6]  # floor(0.1 * 64)
    report = json.loads((out / "loki_report.json").read_text())
    # dense: L k I; low-rank: L r (I + k)
    expected = 3 * 6 * 128 if rank is None else 3 * 2 * (128 + 6)
    assert report["trainable_parameters"] == expected

    # In evaluation bitsandbytes rounds otherwise on some CPUs; a model that has trained does not.
    assert_stock_peft_agrees(captured["model"], base, out, four_bit, tmp_path, four_bit)
    merge_and_verify(run_config, base, selection, tmp_path)


@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
def test_a_shared_expert_trains_saves_and_merges(
    run_config, train, captured, moe_base, tmp_path, four_bit
):
    run_config |= {"base_model": str(moe_base), "load_in_4bit": four_bit}
    train(run_config)
    out = Path(run_config["output_dir"])
    losses = [h["loss"] for h in captured["trainer"].state.log_history if "loss" in h]
    assert losses[-1] < losses[0] - 0.05
    selection = RowSelection.load(out / "loki_rows.json")
    assert selection.counts == [6, 6]
    # On a CPU, bitsandbytes cannot evaluate the one output of a 4-bit `shared_expert_gate`.
    assert_stock_peft_agrees(captured["model"], moe_base, out, four_bit, tmp_path, four_bit)
    merge_and_verify(run_config, moe_base, selection, tmp_path)


def assert_stock_peft_agrees(model, base, out, four_bit, tmp_path, training=False):
    """The saved adapter gives the same logits in a process that cannot import this package."""
    model = model.train(training)
    with torch.no_grad():
        ours = model(input_ids=torch.arange(3, 40)[None]).logits
    script = tmp_path / "stock.py"
    script.write_text(STOCK_PEFT)
    command = [sys.executable, script, base, out, four_bit, training, tmp_path / "logits.pt"]
    subprocess.run([str(c) for c in command], check=True, capture_output=True, timeout=300)
    theirs = torch.load(tmp_path / "logits.pt")
    assert torch.allclose(ours.float(), theirs, atol=1e-5, rtol=1e-5)


def merge_and_verify(run_config, base, selection, tmp_path):
    """`loki merge`, then `loki verify`, and an independent look at every tensor."""
    from click.testing import CliRunner

    from loki_plugin.cli import loki

    out = Path(run_config["output_dir"])
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(run_config))  # JSON is YAML
    result = CliRunner().invoke(loki, ["merge", str(config)])
    assert result.exit_code == 0, result.output
    assert_only_rows_changed(base, out / "merged", selection)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / "merged" / name).read_bytes() == (base / name).read_bytes(), name
    result = CliRunner().invoke(
        loki, ["verify", str(base), str(out / "merged"), "--rows", str(out / "loki_rows.json")]
    )
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
def test_axolotl_merge_lora_keeps_frozen_rows_and_proves_it(
    run_config, train, base, tmp_path, monkeypatch, four_bit
):
    from axolotl.cli.merge_lora import do_cli

    from loki_plugin.implanting import proven

    run_config["load_in_4bit"] = four_bit
    train(run_config)
    out = Path(run_config["output_dir"])
    run_config["bf16"] = True  # Axolotl's legacy merge would round this float32 base to bfloat16
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(run_config))
    do_cli(str(config))
    selection = RowSelection.load(out / "loki_rows.json")
    assert_only_rows_changed(base, out / "merged", selection)
    kept = RowSelection.load(out / "merged" / "loki_rows.json")
    assert kept.fingerprint == selection.fingerprint is not None
    assert "every weight" in kept.made["merge"]["base"] or four_bit

    merge = proven.merge_adapters

    def spoiled(*args):
        report = merge(*args)
        file = min(report.output.glob("model*.safetensors"))  # begins with the embeddings
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        return report

    shutil.rmtree(out / "merged")
    monkeypatch.setattr(proven, "merge_adapters", spoiled)
    with pytest.raises(proven.NotProven, match="do not use the merged model"):
        do_cli(str(config))


def test_without_adapter_key_it_is_dense_loki(run_config, train, our_log):
    del run_config["adapter"]
    with our_log.at_level("INFO", "loki_plugin"):
        train(run_config)
    assert "nothing, as in the paper; `protect: auto` keeps more" in our_log.text
    adapter = json.loads((Path(run_config["output_dir"]) / "adapter_config.json").read_text())
    assert adapter["r"] == adapter["lora_alpha"] == 6
    assert adapter["target_modules"] == ["down_proj"]


def test_qlora_with_lora_r_is_low_rank(run_config, train):
    run_config |= {"adapter": "qlora", "load_in_4bit": True, "lora_r": 3, "lora_alpha": 16}
    train(run_config)
    out = Path(run_config["output_dir"])
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["r"] == adapter["lora_alpha"] == 3
    selection = RowSelection.load(out / "loki_rows.json")
    tensors = load_file(out / "adapter_model.safetensors")
    for layer, rows in enumerate(selection.rows):
        b = tensors[f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_B.weight"]
        assert (b != 0).any(1).nonzero()[:, 0].tolist() == rows.tolist()


def rows_file(path, first):
    return str(RowSelection([range(first, first + 6)] * 3, 64).save(path))


def test_resumes_with_the_same_rows_and_refuses_others(run_config, train, tmp_path):
    out = Path(run_config["output_dir"])
    run_config["loki"] = {"rows": rows_file(tmp_path / "rows.json", 4)}
    run_config |= {"save_strategy": "steps", "save_steps": 3}
    train(run_config)
    whole = load_file(out / "adapter_model.safetensors")
    again = run_config | {"resume_from_checkpoint": str(out / "checkpoint-3")}
    again["output_dir"] = str(tmp_path / "resumed")
    train(again)
    resumed = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    again["loki"] = {"rows": rows_file(tmp_path / "others.json", 5)}
    with pytest.raises(ValueError, match="other rows"):
        train(again)


def test_goes_on_from_an_adapter_and_keeps_its_rows(run_config, train, base, tmp_path):
    train(run_config)
    first = Path(run_config["output_dir"])
    # `loki.rows` is absent and the quota another one: the adapter decides.
    run_config |= {"lora_model_dir": str(first), "output_dir": str(tmp_path / "second")}
    run_config["loki"]["quota"] = 50
    train(run_config)
    second = tmp_path / "second"
    assert RowSelection.load(second / "loki_rows.json") == RowSelection.load(
        first / "loki_rows.json"
    )
    before, after = (load_file(f / "adapter_model.safetensors") for f in (first, second))
    for name, tensor in before.items():
        changed = not torch.equal(after[name], tensor)
        assert changed == ("lora_A" in name), name
