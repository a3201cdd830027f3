"""Protection end to end: the YAML's `protect:` block through Axolotl's own training."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.axolotl import load
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loki_plugin.cli import loki
from loki_plugin.host.files import Files
from loki_plugin.implanting.exporting import export
from loki_plugin.protecting.directions import FILE_NAME, Directions
from loki_plugin.protecting.reading import leakage
from loki_plugin.rows import RowSelection

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text(
        "\n\n".join(f"The number {i} stands between {i - 1} and {i + 1}." for i in range(9))
    )
    return str(path)


def update(folder, layer):
    saved = load_file(Path(folder) / ADAPTER)
    a, b = (
        saved[f"base_model.model.model.layers.{layer}.mlp.down_proj.lora_{x}.weight"] for x in "AB"
    )
    return b.double() @ a.double()


def assert_same_adapter(first, second):
    a, b = load_file(Path(first) / ADAPTER), load_file(Path(second) / ADAPTER)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "four_bit", "soft"),
    [(None, False, False), (2, False, True), (None, True, True), (2, True, False)],
    ids=["dense-fp32-hard", "rank2-fp32-soft", "dense-nf4-soft", "rank2-nf4-hard"],
)
def test_trains_saves_reports_and_merges(
    run_config, train, base, tmp_path, text, rank, four_bit, soft
):
    run_config["load_in_4bit"] = four_bit
    run_config["gradient_checkpointing"] = True
    run_config["loki"] |= {"rank": rank, "protect": {"inputs": 0.9, "soft": soft, "text": text}}
    train(run_config)
    out = Path(run_config["output_dir"])
    directions = Directions.load(out / FILE_NAME)
    selection = RowSelection.load(out / "loki_rows.json")
    report = json.loads((out / "loki_report.json").read_text())["protection"]
    assert report["directions_per_layer"] == directions.counts
    assert all(1 < count < 127 for count in directions.counts)
    assert all(0.9 <= share < 0.97 for share in report["energy_per_layer"])
    assert report["tokens"] > 4 * max(directions.counts) and report["prompts"] == 8 + 9
    kept_back = report["energy_of_held_out_prompts_per_layer"]
    assert all(0.3 < share < 1 for share in kept_back) and len(kept_back) == 3
    # An update that reads all directions evenly has √(u/I) of its norm in them.
    chance = [(u.shape[1] / len(u)) ** 0.5 for u in directions.basis]
    limits = chance if soft else [1e-6] * 3
    assert report["soft"] == directions.soft == soft
    within = zip(report["leakage_per_layer"], limits, strict=True)
    assert all(0 < share < limit for share, limit in within)
    for layer, (u, rows) in enumerate(zip(directions.basis, selection.rows, strict=True)):
        delta = update(out, layer)
        assert delta.norm() > 1e-3 and leakage(delta, u) < limits[layer]
        assert (delta != 0).any(1).nonzero()[:, 0].tolist() == rows.tolist()
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(run_config))
    merged = CliRunner().invoke(loki, ["merge", str(config)])
    assert merged.exit_code == 0, merged.output
    files = ["--rows", str(out / "loki_rows.json"), "--directions", str(out / FILE_NAME)]
    for tuned, proof in ((out, "B is zero outside the rows"), (out / "merged", "nothing outside")):
        verified = CliRunner().invoke(loki, ["verify", str(base), str(tuned), *files])
        assert verified.exit_code == 0 and proof in verified.output, verified.output
        share = float(re.search(r"at most (\S+) of the update reads them", verified.output)[1])
        assert 0 < share < (max(limits) if soft else 1e-4)
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (base, out / "merged"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(
            adapted(input_ids=ids).logits, after.eval()(input_ids=ids).logits, atol=1e-5
        )
    for layer, u in enumerate(directions.basis):
        old, new = (m.model.layers[layer].mlp.down_proj.weight.double() for m in (before, after))
        rounding = 1e-4  # of W in float32
        assert leakage(new - old, u) < limits[layer] + rounding


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(run_config, train, tmp_path, soft):
    out = Path(run_config["output_dir"])
    protect = {"inputs": 0.9, "soft": soft, "anchor": 0.5, "anchor_batch": 2}
    run_config["loki"]["protect"] = protect
    run_config |= {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    run_config["micro_batch_size"] = 2
    train(run_config)
    assert Directions.load(out / "checkpoint-3" / FILE_NAME) == Directions.load(out / FILE_NAME)
    assert json.loads((out / "loki_report.json").read_text())["anchor_kl_last_step"] > 0
    again = run_config | {
        "resume_from_checkpoint": str(out / "checkpoint-3"),
        "output_dir": str(tmp_path / "resumed"),
    }
    again["loki"] = run_config["loki"] | {"cache_dir": str(tmp_path / "empty")}
    train(again)
    assert_same_adapter(out, tmp_path / "resumed")
    assert not (tmp_path / "empty" / "directions").exists()  # the checkpoint's were used
    for protect in ({"inputs": 0.8, "soft": soft}, {"inputs": 0.9, "soft": not soft}, "off"):
        again["loki"] = run_config["loki"] | {"protect": protect}
        with pytest.raises(ValueError, match="trained with protect: {inputs: 0.9, directions: No"):
            train(again)
    (out / "checkpoint-3" / FILE_NAME).unlink()
    again["loki"] = run_config["loki"]
    with pytest.raises(ValueError, match="checkpoint-3' has no loki_directions.safetensors"):
        train(again)


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
def test_text_that_the_model_writes_protects_and_is_the_same_where_a_run_goes_on(
    run_config, train, tmp_path, four_bit, monkeypatch, our_log
):
    monkeypatch.setattr("loki_plugin.protecting.texts.TEXT_TOKENS", 16)
    run_config["load_in_4bit"] = four_bit
    run_config |= {"save_strategy": "steps", "save_steps": 3}
    protect = {"directions": 5, "soft": True, "anchor": 1.0, "text": "self", "count": 12}
    run_config["loki"]["protect"] = protect
    train(run_config)
    out = Path(run_config["output_dir"])
    report = json.loads((out / "loki_report.json").read_text())
    (file,) = (tmp_path / "cache" / "texts").iterdir()
    own = len(file.read_text().splitlines())
    assert 6 < own <= 12 and report["verified"]
    dialogues = sum('"messages"' in line for line in file.read_text().splitlines())
    assert f"wrote {dialogues} dialogues and {own - dialogues} plain texts" in our_log.text
    assert report["protection"]["text"] == "self" and report["protection"]["prompts"] == 8 + own
    said = f"every step adds 1 x KL(base || tuned) on 2 of {own} texts, in which {dialogues} "
    assert f"{said}answers begin" in our_log.text
    again = run_config | {
        "resume_from_checkpoint": str(out / "checkpoint-3"),
        "output_dir": str(tmp_path / "resumed"),
    }
    train(again)  # the anchor needs the texts, the directions come from the checkpoint
    assert_same_adapter(out, tmp_path / "resumed")


@pytest.mark.slow
def test_an_adapter_of_the_default_goes_on_under_it(run_config, train, tmp_path):
    del run_config["loki"]["protect"]  # `auto`
    train(run_config)
    first, more = Path(run_config["output_dir"]), tmp_path / "more"
    train(run_config | {"lora_model_dir": str(first), "output_dir": str(more)})
    assert Directions.load(more / FILE_NAME) == Directions.load(first / FILE_NAME)
    for folder in (first, more):
        report = json.loads((folder / "loki_report.json").read_text())
        assert report["protection"]["soft"] is True and "anchor_kl_last_step" in report


@pytest.mark.slow
def test_goes_on_from_an_adapter_with_its_directions_and_from_the_cache(
    run_config, train, tmp_path, our_log
):
    run_config["loki"]["protect"] = {"directions": 11}
    train(run_config)
    first = Path(run_config["output_dir"])
    (cached,) = (tmp_path / "cache" / "directions").iterdir()
    stamp = cached.stat().st_mtime_ns
    train(run_config | {"output_dir": str(tmp_path / "again")})
    assert cached.stat().st_mtime_ns == stamp
    assert_same_adapter(first, tmp_path / "again")
    # Without `protect` in the YAML: the adapter decides, as it does about the rows.
    del run_config["loki"]["protect"]
    more = run_config | {"lora_model_dir": str(first), "output_dir": str(tmp_path / "more")}
    train(more)
    directions = Directions.load(tmp_path / "more" / FILE_NAME)
    assert directions == Directions.load(first / FILE_NAME) and directions.counts == [11] * 3
    for layer, u in enumerate(directions.basis):
        delta = update(tmp_path / "more", layer)
        assert leakage(delta, u) < 1e-6 and not torch.equal(delta, update(first, layer))
    report = json.loads((tmp_path / "more" / "loki_report.json").read_text())
    assert "anchor_kl_last_step" not in report
    (first / FILE_NAME).unlink()
    our_log.clear()
    assert load(more).loki["protect"]["anchor"] == 0  # trained without any, and goes on so
    assert f"its directions or none, as '{first}' was trained, and no anchor" in our_log.text
    more["loki"] = more["loki"] | {"protect": {"inputs": 0.9}}
    with pytest.raises(ValueError, match="was trained without protected inputs"):
        train(more)


@pytest.mark.parametrize(
    ("protect", "message"),
    [
        ({"inputs": 1.0}, r"loki.protect.inputs: .*less than 1"),
        ({"inputs": 0.9, "directions": 3}, "two ways to say how many; give one"),
        ({"directions": 0}, "loki.protect.directions"),
        ({"anchor": -1}, "loki.protect.anchor"),
        ({"text": "plain.txt"}, "`text` needs something to protect"),
        ({"soft": True, "anchor": 1.0}, "`soft` says how directions are read; set `inputs` or"),
        (
            {"inputs": 0.9, "text": "plain.tsv"},
            "protect.text 'plain.tsv' must be `self`, or a .jsonl/.json/.csv",
        ),
        ({"inputs": 0.9, "text": "none.txt"}, "protect.text: .*'none.txt' does not exist"),
        ({"soft": True, "directions": 1}, "one alone protects nothing; give at least 2"),
        ({"share": 0.9}, "known fields: anchor, .*directions, freeze_a, inputs, .*soft, text"),
    ],
)
def test_faulty_blocks_are_named_before_anything_is_loaded(run_config, protect, message):
    run_config["loki"]["protect"] = protect
    with pytest.raises(ValueError, match=message):
        Files.read(load(run_config))


@pytest.mark.slow
def test_an_exported_adapter_goes_on_with_the_rank_that_it_has(run_config, train, tmp_path):
    run_config["loki"] |= {"quota": 30, "protect": {"inputs": 0.9, "soft": True}}
    train(run_config)
    export(run_config["output_dir"], tmp_path / "rank4", 4)
    config = run_config | {"output_dir": str(tmp_path / "on")}
    config["lora_model_dir"] = str(tmp_path / "rank4")
    with pytest.raises(ValueError, match="has rank 4 .* set `loki: {rank: 4}`"):
        train(config)
    train(config | {"loki": run_config["loki"] | {"rank": 4}})
    report = json.loads((tmp_path / "on" / "loki_report.json").read_text())
    assert report["verified"] is True
    for layer in range(3):
        assert not torch.equal(update(tmp_path / "on", layer), update(tmp_path / "rank4", layer))


@pytest.mark.slow
def test_a_run_that_goes_on_from_an_adapter_resumes_with_its_own_yaml(run_config, train, tmp_path):
    """It says nothing of protection: the adapter decides, and its own checkpoint is no other."""
    first = run_config | {"output_dir": str(tmp_path / "first")}
    first["loki"] = run_config["loki"] | {"protect": {"directions": 4}}
    train(first)
    block = {k: v for k, v in run_config["loki"].items() if k != "protect"}
    second = run_config | {"lora_model_dir": first["output_dir"], "loki": block}
    second |= {"save_strategy": "steps", "save_steps": 3, "auto_resume_from_checkpoints": True}
    train(second)
    out = Path(second["output_dir"])
    shutil.copytree(out, tmp_path / "whole")
    shutil.rmtree(out / "checkpoint-6")
    train(second)
    assert_same_adapter(out, tmp_path / "whole")


def test_with_a_rows_file_the_calibration_is_still_read_early(run_config, tmp_path):
    rows = RowSelection([[1], [2], [3]], 64).save(tmp_path / "rows.json")
    run_config["loki"] = {"rows": str(rows), "calibration": {"source": "none.jsonl"}}
    run_config["loki"]["protect"] = "off"
    Files.read(load(run_config))
    run_config["loki"]["protect"] = {"inputs": 0.9}
    with pytest.raises(ValueError, match="'none.jsonl' does not exist"):
        Files.read(load(run_config))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "protect", "told"),
    [
        ({}, {"freeze_a": True}, "`protect.freeze_a` changes nothing here"),
        ({"quota": 100, "rank": 2}, {"freeze_a": True, "memory": 1.0}, "`protect.memory` changes"),
        ({"quota": 100, "rank": 2}, {"freeze_a": True}, None),
    ],
)
def test_what_is_set_and_changes_nothing_is_told(block, protect, told, run_config, train, our_log):
    protect = {"inputs": 0.5, "soft": True} | protect
    run_config["loki"] |= {"protect": protect} | block
    train(run_config | {"max_steps": 1})
    assert ("changes nothing here" in our_log.text) == bool(told)
    assert (told or "") in our_log.text
