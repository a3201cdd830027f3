"""Merging onto the weights that a quantised run learned its rows beside."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from loki_plugin import RowSelection, implant
from loki_plugin.blocks import CalibrationArgs
from loki_plugin.cli import loki
from loki_plugin.evaluating import adapters, log_probabilities
from loki_plugin.evaluating.forgetting import load_questions
from loki_plugin.implanting.checkpoint import Base
from loki_plugin.implanting.dequantised import write_dequantised
from loki_plugin.implanting.verify import verify
from loki_plugin.model.fingerprint import fingerprint
from loki_plugin.model.quantised import dequantise, evaluating

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


@pytest.fixture(autouse=True)
def few_questions(monkeypatch):
    """What a merge asks about the base; the other questions are alike."""
    monkeypatch.setattr(adapters, "QUICK_PROMPTS", 16)


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


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_says_how_large_the_rounding_is_and_what_it_advises(tmp_path, base, kind):
    """The truth: the weights of the model that transformers has quantised, as PEFT's ΔW."""
    model = quantised_run(tmp_path, base, kind)
    told = []
    for scale in (1.0, 1e-3):  # learned much, and hardly anything
        ratios = {}
        with torch.no_grad():
            for layer, rows in enumerate(ROWS):
                module = model.base_model.model.model.layers[layer].mlp.down_proj
                if scale != 1:
                    module.lora_A.default.weight.mul_(scale)
                name = f"model.layers.{layer}.mlp.down_proj"
                stored = load(base)[f"{name}.weight"][rows].float()
                seen = dequantise(module.base_layer, torch.float32)[rows]
                change = (module.lora_B.default.weight @ module.lora_A.default.weight)[rows]
                ratios[name] = float((stored - seen).norm() / change.float().norm())
        model.save_pretrained(tmp_path / "adapter")
        done = merge(tmp_path, base, "--output", str(tmp_path / f"to{scale}"), "--json")
        assert done.exit_code == 0, done.output
        advice = json.loads(done.stdout)["advice"]
        tolerance = 1e-4 if "float32" in kind else 0.02  # the run has rounded to bfloat16 before
        assert advice["ratios"] == pytest.approx(ratios, rel=tolerance)
        assert advice["losses"].keys() == {"original", "dequantised"}
        assert "shipped questions" in advice["asked"]
        told.append(advice)
    assert [a["onto"] for a in told] == ["original", "dequantised"]
    # The loss onto the dequantised base is that of the adapter on its quantised base.
    asked = load_questions(AutoTokenizer.from_pretrained(base), CalibrationArgs())
    asked = asked[:: -(-len(asked) // 16)]
    found = log_probabilities(model, [p.ids for p in asked])
    loss = -sum(float(row[p.target]) for row, p in zip(found, asked, strict=True)) / len(asked)
    assert told[-1]["losses"]["dequantised"] == pytest.approx(loss, rel=1e-3)
    assert told[-1]["losses"]["original"] != pytest.approx(loss, rel=1e-6)


def test_the_rounding_of_targeted_linears_counts_and_what_cannot_be_asked_is_said(
    tmp_path, base, monkeypatch
):
    dtype, settings = KINDS["nf4-bfloat16"]
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=BitsAndBytesConfig(**settings), device_map="cpu"
    )
    model = implant(model, ROWS, 2, targets="all", linear_rank=2)
    model._loki_selection = replace(model._loki_selection, fingerprint=fingerprint(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(adapters, "_ON_A_CPU", 1e4)
    done = merge(tmp_path, base)
    assert done.exit_code == 0 and "median of 21 modules" in done.output, done.output
    assert "not measured: the base has 0.0 GB of weights, more than what a CPU" in done.output
    assert done.output.count("advice: --onto ") == 1


def test_a_run_on_an_unquantised_base_gets_no_advice(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    selection = RowSelection(ROWS, 64, fingerprint(model))
    implant(model, selection).save_pretrained(tmp_path / "adapter")
    done = merge(tmp_path, base)
    assert done.exit_code == 0 and "advice" not in done.output


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
