"""Merging onto the weights that a quantised run learned its rows beside."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loki_plugin import RowSelection, implant
from loki_plugin.cli import loki
from loki_plugin.implanting.checkpoint import Base
from loki_plugin.implanting.dequantised import write_dequantised
from loki_plugin.implanting.verify import verify
from loki_plugin.model.fingerprint import fingerprint
from loki_plugin.model.quantised import evaluating

ROWS = [[3, 1, 40], [0, 47, 5], [7, 8, 63]]
IDS = torch.arange(1, 40)[None]
KINDS = {
    "nf4-double-float32": (
        torch.float32,
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": torch.bfloat16,  # as Axolotl packs
        },
    ),
    "nf4-bfloat16": (torch.bfloat16, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "int8-float32": (torch.float32, {"load_in_8bit": True}),
}


def load(folder):
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def quantised_run(tmp_path, base, kind):
    """The quantised model with an adapter of large values, saved with its rows file."""
    dtype, settings = KINDS[kind]
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=dtype),
        device_map={"": "cpu"},
    )
    selection = RowSelection(ROWS, 64, fingerprint(model))
    model = implant(model, selection)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    return model


def merge(tmp_path, base, *more):
    config = tmp_path / "run.yaml"
    run = {"base_model": str(base), "output_dir": str(tmp_path / "adapter")}
    config.write_text(json.dumps(run))
    return CliRunner().invoke(loki, ["merge", str(config), *more])


def logits(model):
    with torch.no_grad(), evaluating(model):
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_answers_as_the_adapter_on_its_quantised_base(tmp_path, base, kind):
    wanted = logits(quantised_run(tmp_path, base, kind))
    for onto in ("original", "dequantised"):
        done = merge(tmp_path, base, "--onto", onto, "--output", str(tmp_path / onto))
        assert done.exit_code == 0 and "OK: nothing outside" in done.output, done.output
    dtype = KINDS[kind][0]
    answers = {
        onto: logits(AutoModelForCausalLM.from_pretrained(tmp_path / onto, dtype=dtype))
        for onto in ("original", "dequantised")
    }
    missed = {onto: float((found - wanted).norm()) for onto, found in answers.items()}
    assert missed["dequantised"] < 0.2 * missed["original"], missed

    rows = RowSelection.load(tmp_path / "adapter" / "loki_rows.json")
    seen = tmp_path / "dequantised-base"
    assert verify(seen, tmp_path / "dequantised", rows, False).ok
    against_original = verify(base, tmp_path / "dequantised", rows, False)
    assert "rows outside the selection changed" in "".join(against_original.faults)
    before, after = load(base), load(seen)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if "_proj." in k}  # every linear layer, and no other


def test_another_base_or_rows_of_no_quantised_one_are_refused(tmp_path, base):
    quantised_run(tmp_path, base, "nf4-bfloat16")
    file = tmp_path / "adapter" / "loki_rows.json"
    rows = RowSelection.load(file)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 5] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="quantised here as bnb-nf4-64, is not the model"):
        write_dequantised(Base(tmp_path / "other"), rows, tmp_path / "out", False)
    # What cannot be merged leaves nothing behind, so that the next try finds its place free.
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    sound, tensors = weights.read_bytes(), load_file(weights)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    done = merge(tmp_path, base, "--onto", "dequantised")
    assert done.exit_code == 1 and "lora_A holds NaN" in done.output
    weights.write_bytes(sound)
    (tmp_path / "adapter" / "merged").mkdir()
    (tmp_path / "adapter" / "merged" / "notes.txt").write_text("mine")
    done = merge(tmp_path, base, "--onto", "dequantised")
    assert done.exit_code == 1 and "merged' exists and is not empty" in done.output
    (tmp_path / "adapter" / "merged" / "notes.txt").unlink()
    (tmp_path / "adapter" / "merged").rmdir()
    assert not list((tmp_path / "adapter").glob("*merged*"))
    RowSelection(rows.rows, 64).save(file)
    done = merge(tmp_path, base, "--onto", "dequantised")
    assert done.exit_code == 1 and "was not made on a quantised base" in done.output
    assert not (tmp_path / "out").exists() and not (tmp_path / "adapter" / "merged").exists()
