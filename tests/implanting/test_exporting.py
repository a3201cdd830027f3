"""`loki export`: the nearest LoRA of a smaller rank, on the same rows, for stock PEFT."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loki_plugin import implant, input_directions
from loki_plugin.blocks import CalibrationArgs
from loki_plugin.cli import loki
from loki_plugin.evaluating import compare, log_probabilities
from loki_plugin.evaluating.forgetting import load_questions
from loki_plugin.implanting.exporting import export
from loki_plugin.protecting.directions import Directions
from loki_plugin.rows import RowSelection

UNEVEN = [[3, 1, 40, 9, 10, 11], [0, 47], []]
EVEN = [[3, 1, 40, 9], [0, 47, 5, 12], [7, 8, 63, 2]]
IDS = torch.randint(3, 250, (1, 300), generator=torch.Generator().manual_seed(2))
FORMS = {
    "dense": {"rows": UNEVEN},
    "low-rank": {"rows": EVEN, "rank": 3},
    "targets": {"rows": UNEVEN, "targets": "all", "linear_rank": 3},
    "linears only": {"rows": EVEN, "targets": ["q_proj", "v_proj"], "linear_rank": 4},
    "protected": {"rows": EVEN},
    "bfloat16": {"rows": UNEVEN},
}


def trained(base, folder, form):
    """A saved adapter whose rows are of very different size, so that few directions hold most."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = dict(FORMS[form])
    if form == "protected":
        settings["protect"] = input_directions(model, IDS, energy=0.6)
    model = implant(model, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = 0.6 ** torch.arange(len(parameter))
                parameter.copy_(torch.randn_like(parameter) * scale[:, None])
                if form == "bfloat16":
                    parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    return folder


def changes(base, folder):
    """What stock PEFT makes of a saved adapter: name -> (rank, ΔW [out, in] in float64)."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    return {
        name: (
            module.r["default"],
            module.scaling["default"]
            * (module.lora_B.default.weight.double() @ module.lora_A.default.weight.double()),
        )
        for name, module in tuned.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_is_nearest_and_what_is_lost_is_said(tmp_path, base, form):
    adapter, out = trained(base, tmp_path / "adapter", form), tmp_path / "out"
    report = export(adapter, out, 2, progress=False)
    before, after = changes(base, adapter), changes(base, out)
    assert before.keys() == after.keys() and all(rank == 2 for rank, _ in after.values())
    update = error = 0.0
    for name, (_, wanted) in before.items():
        found = after[name][1]
        # The best that any update of rank 2 can do, by numpy's SVD of the whole of ΔW.
        values = np.linalg.svd(wanted.detach().numpy(), compute_uv=False)
        least = float((values[2:] ** 2).sum() / (values**2).sum())
        lost = float((wanted - found).square().sum() / wanted.square().sum())
        told = report.lost[name.removeprefix("base_model.model.")]
        rounding = 2e-5 if form == "bfloat16" else 1e-10
        assert lost == pytest.approx(least, rel=1e-6, abs=rounding)
        assert told == pytest.approx(lost, rel=1e-6, abs=1e-12)
        update += float(wanted.square().sum())
        error += float((wanted - found).square().sum())
    assert report.lost_share == pytest.approx(error / update, rel=1e-6) and report.lost_share > 1e-3

    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    rows = RowSelection.load(out / "loki_rows.json")
    assert rows == RowSelection.load(adapter / "loki_rows.json")
    assert rows.made["export"]["lost_share"] == report.lost_share
    tensors = load_file(out / "adapter_model.safetensors")
    dtypes = {t.dtype for t in load_file(adapter / "adapter_model.safetensors").values()}
    assert {t.dtype for t in tensors.values()} == dtypes
    for layer, chosen in enumerate(rows.rows):
        key = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_B.weight"
        assert (key in tensors) == bool(len(chosen))
        if len(chosen):
            outside = torch.ones(64, dtype=torch.bool).index_fill(0, chosen, False)
            assert not tensors[key][outside].any() and tensors[key][chosen].any()
    proof = CliRunner().invoke(
        loki, ["verify", str(base), str(out), "--rows", str(out / "loki_rows.json")]
    )
    assert proof.exit_code == 0 and "OK: an adapter on" in proof.output, proof.output


def test_a_protected_adapter_reads_its_directions_no_more_than_before(tmp_path, base):
    adapter, out = trained(base, tmp_path / "adapter", "protected"), tmp_path / "out"
    export(adapter, out, 2, progress=False)
    file = out / "loki_directions.safetensors"
    assert Directions.load(file) == Directions.load(adapter / file.name)
    arguments = ["verify", str(base), str(out), "--rows", str(out / "loki_rows.json")]
    done = CliRunner().invoke(loki, [*arguments, "--directions", str(file), "--json"])
    assert done.exit_code == 0, done.output
    assert max(json.loads(done.stdout)["leakage_per_layer"]) < 1e-4


def test_at_its_own_rank_nothing_is_lost(tmp_path, base):
    adapter, out = trained(base, tmp_path / "adapter", "dense"), tmp_path / "out"
    report = export(adapter, out, 6, progress=False)
    assert set(report.lost.values()) == {0.0} and report.lost_share == 0
    before, after = changes(base, adapter), changes(base, out)
    assert all(torch.equal(before[name][1], after[name][1]) for name in before)
    assert {rank for rank, _ in after.values()} == {6}  # one rank, for whoever reads no patterns


def test_what_it_costs_is_measured_on_calibration_prompts(tmp_path, base, questions):
    adapter, out = trained(base, tmp_path / "adapter", "low-rank"), tmp_path / "out"
    (adapter / "tokenizer_config.json").write_text('{"of": "the run"}')
    arguments = ["export", str(adapter), str(out), "--rank", "1", "--prompts", str(questions)]
    done = CliRunner().invoke(loki, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    asked = load_questions(
        AutoTokenizer.from_pretrained(base), CalibrationArgs(source=str(questions))
    )
    ids = [p.ids for p in asked]
    answers = [
        log_probabilities(PeftModel.from_pretrained(model, folder), ids)
        for folder in (adapter, out)
        for model in [AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)]
    ]
    truth = compare(*answers)
    assert truth.kl > 1e-4 and said["measured"]["kl"] == pytest.approx(truth.kl, rel=1e-4)
    assert said["measured"]["prompts"] == 8 and said["rank"] == 1 and said["of_rank"] == 3
    assert RowSelection.load(out / "loki_rows.json").made["export"]["kl"] == said["measured"]["kl"]
    assert (out / "tokenizer_config.json").read_text() == '{"of": "the run"}'


def test_the_embeddings_of_new_tokens_go_with_it(tmp_path, base, questions):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    model = implant(model, EVEN)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    model.save_pretrained(adapter)
    arguments = ["export", str(adapter), str(out), "--rank", "2", "--prompts", str(questions)]
    done = CliRunner().invoke(loki, [*arguments, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["measured"]["kl"] > 0, done.output
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, out))
    grown = [key for key in before if ".lora_" not in key]
    assert grown and all(torch.equal(before[key], after[key]) for key in grown)


def test_without_the_base_the_adapter_is_written_and_the_reason_said(tmp_path, base, questions):
    adapter = trained(base, tmp_path / "adapter", "low-rank")
    more = ["--rank", "2", "--prompts", str(questions)]
    for reason, options in (
        ("--no-kl", ["--no-kl"]),
        ("nowhere", ["--base", str(tmp_path / "nowhere")]),
    ):
        out = tmp_path / reason
        done = CliRunner().invoke(loki, ["export", str(adapter), str(out), *more, *options])
        assert done.exit_code == 0, done.output
        (told,) = [line for line in done.output.splitlines() if "was not measured" in line]
        assert reason in told and (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("rank", "change", "message"),
    [
        (0, None, "rank 0: the adapter in '.*' has rank 3; give 1 to 3"),
        (-2, None, "rank -2: the adapter in '.*' has rank 3"),
        (4, None, "rank 4: the adapter in '.*' has rank 3; give 1 to 3"),
        (2, "no rows", "'.*' is no LoKI adapter: it has no loki_rows.json"),
        (2, "no weights", "'.*' is no saved LoRA adapter: it has no adapter_model.safetensors"),
        (2, "other rows", "changes 3 modules besides .* rows in 2 layers"),
        (2, "full", "output '.*' exists and is not empty"),
        (2, "itself", "output '.*' exists and is not empty"),
        (2, "failed", "LOKI_FAILED.txt' says: it diverged"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(tmp_path, base, rank, change, message):
    adapter, out = trained(base, tmp_path / "adapter", "low-rank"), tmp_path / "out"
    if change == "no rows":
        (adapter / "loki_rows.json").unlink()
    if change == "no weights":
        (adapter / "adapter_model.safetensors").unlink()
    if change == "other rows":
        RowSelection([[1], [2], []], 64).save(adapter / "loki_rows.json")
    if change == "failed":
        (adapter / "LOKI_FAILED.txt").write_text("it diverged")
    if change == "full":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    if change == "itself":
        out = adapter
    before = sorted(p for p in tmp_path.rglob("*"))
    done = CliRunner().invoke(
        loki, ["export", str(adapter), str(out), "--rank", str(rank), "--no-kl"]
    )
    assert done.exit_code == 1 and len(done.output.strip().splitlines()) == 1, done.output
    with pytest.raises(ValueError, match=message):
        export(adapter, out, rank, progress=False)
    assert sorted(p for p in tmp_path.rglob("*")) == before  # nothing is left behind
