"""`loki analyse`: what is found ahead of a run is what the run takes, and it analyses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from loki_plugin import pipeline
from loki_plugin.cli import loki
from loki_plugin.commands.shared import check_adapter_beside
from loki_plugin.protecting import preparing
from loki_plugin.protecting.directions import FILE_NAME, Directions
from loki_plugin.rows import RowSelection


def invoke(config, tmp_path, *options):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return CliRunner().invoke(loki, ["analyse", str(path), *options])


@pytest.mark.slow
@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
def test_training_takes_rows_and_directions_from_the_cache(
    run_config, train, tmp_path, monkeypatch, four_bit
):
    run_config |= {"load_in_4bit": four_bit, "max_steps": 2}
    run_config["loki"]["protect"] = {"inputs": 0.5}
    done = invoke(run_config, tmp_path)
    assert done.exit_code == 0, done.output
    out = Path(run_config["output_dir"])
    ahead = RowSelection.load(out / "loki_rows.json")
    assert ahead.made["prompts_analysed"] == 8
    (kept,) = (tmp_path / "cache" / "directions").iterdir()
    for part in ("8 prompts", "made now in", "6 of 64 in each of 3 layers", "does not read"):
        assert part in done.stdout
    assert done.stdout.endswith(f"next        axolotl train {tmp_path / 'run.yaml'}\n")

    def again(*_, **__):
        raise AssertionError("analysed again")

    monkeypatch.setattr(pipeline, "analyse", again)
    monkeypatch.setattr(preparing, "find_directions", again)
    train(run_config)
    trained = RowSelection.load(out / "loki_rows.json")
    assert trained == ahead and trained.fingerprint == ahead.fingerprint
    assert trained.made["prompts_analysed"] == 0
    before, after = (Directions.load(f).basis for f in (kept, out / FILE_NAME))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_rows_of_an_adapter_of_another_base_are_not_overwritten(tmp_path):
    """Where all rows train, or random ones, they are the same rows, under another fingerprint."""
    file = tmp_path / "loki_rows.json"
    (tmp_path / "adapter_model.safetensors").touch()
    marks = [{"config": "c", "identity": i, "weights": "w", "quantisation": "q"} for i in "ab"]
    RowSelection([[0, 1]], 2, marks[0]).save(file)
    for found in (marks[0], None):
        check_adapter_beside(file, RowSelection([[0, 1]], 2, found))
    with pytest.raises(ValueError, match="adapter beside it, which trained another base; give"):
        check_adapter_beside(file, RowSelection([[0, 1]], 2, marks[1]))


@pytest.mark.slow
def test_the_rows_of_a_trained_adapter_are_not_overwritten(run_config, train, tmp_path):
    train(run_config | {"max_steps": 1})
    file = Path(run_config["output_dir"]) / "loki_rows.json"
    assert invoke(run_config, tmp_path).exit_code == 0  # the same rows: nothing is lost
    run_config["loki"]["quota"] = 20
    done = invoke(run_config, tmp_path)
    assert done.exit_code == 1 and f"'{file}' belongs to the adapter beside it" in done.output
    assert RowSelection.load(file).counts == [6, 6, 6]
    other = tmp_path / "other.json"
    assert invoke(run_config, tmp_path, "--output", str(other)).exit_code == 0
    assert RowSelection.load(other).counts == [12, 12, 12]


def test_a_run_with_rows_of_its_own_has_nothing_to_analyse(run_config, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[[1], [2], [3]]")
    run_config["loki"]["rows"] = str(rows)
    done = invoke(run_config, tmp_path, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"rows_from": str(rows)}


def test_a_run_without_loki_is_refused(run_config, tmp_path):
    plain = {k: v for k, v in run_config.items() if k not in ("plugins", "loki")}
    plain |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj"]}
    done = invoke(plain, tmp_path)
    assert done.exit_code == 1 and "does not list loki; add `plugins: [loki]`" in done.output


@pytest.mark.slow
def test_deepspeed_is_left_to_the_run(run_config, tmp_path):
    """A sharded run's rows are found in one process; what the run is refused for, this is too."""
    output = tmp_path / "rows.json"
    zero = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    done = invoke(run_config | {"deepspeed": zero}, tmp_path, "--json", "--output", str(output))
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["rows_file"] == str(output) and facts["rows_per_layer"] == [6, 6, 6]
    assert RowSelection.load(output).made == facts["selection"]
    zero["zero_optimization"]["stage"] = 3
    done = invoke(run_config | {"deepspeed": zero}, tmp_path)
    assert done.exit_code == 1 and "ZeRO-3 shards the base" in done.output
