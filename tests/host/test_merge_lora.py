"""`axolotl merge-lora` of a run that went on from an earlier adapter (`lora_model_dir`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.axolotl import short_run, train
from safetensors.torch import load_file
from test_axolotl import checkpoint

from loki_plugin.cli import loki

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_runs(base, dataset, questions, tmp_path_factory):
    """(the YAML of the second run, the folder of the first, that of the second)."""
    folder = tmp_path_factory.mktemp("runs")
    config = short_run(base, dataset, questions, folder)
    first, second = Path(config["output_dir"]), folder / "second"
    config["loki"]["report"] = False
    train(config)
    config |= {"lora_model_dir": str(first), "output_dir": str(second)}
    train(config)
    return config, first, second


@pytest.fixture
def went_on(two_runs, tmp_path):
    """The same, with the YAML in a file; what was merged is gone."""
    config, first, second = two_runs
    shutil.rmtree(second / "merged", ignore_errors=True)
    file = tmp_path / "second.yaml"
    file.write_text(json.dumps(config))
    return file, first, second


def merge_lora(config, *options):
    from axolotl.cli.main import cli

    done = CliRunner().invoke(cli, ["merge-lora", str(config), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def sums(base, adapter):
    """The down-projections of the base with B A of the adapter added, in the base's type."""
    found, parts = checkpoint(base), load_file(adapter / "adapter_model.safetensors")
    for key in [k for k in parts if k.endswith(".lora_A.weight")]:
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        update = parts[key.replace("lora_A", "lora_B")].double() @ parts[key].double()
        found[name] = (found[name].double() + update).to(found[name].dtype)
    return found


def assert_is(merged, expected):
    found = checkpoint(merged)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=1e-7), name


def test_what_the_run_made_is_merged_and_not_what_it_went_on_from(went_on, base, tmp_path, our_log):
    config, first, second = went_on
    earlier, later = sums(base, first), sums(base, second)
    moved = max((earlier[n] - later[n]).abs().max().item() for n in later)
    assert moved > 1e-3  # the second run has learned something
    merge_lora(config)
    assert_is(second / "merged", later)
    (said,) = {r.getMessage() for r in our_log.records if "not lora_model_dir" in r.getMessage()}
    assert f"merging '{second}', which this run made, and not lora_model_dir '{first}'" in said
    ours = tmp_path / "ours"
    done = CliRunner().invoke(loki, ["merge", str(config), "--output", str(ours)])
    assert done.exit_code == 0, done.output
    for file in sorted(ours.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            assert (second / "merged" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_command_line_names_the_adapter_that_is_merged(went_on, base, our_log):
    config, first, second = went_on
    merge_lora(config, "--lora-model-dir", str(first))  # what the YAML says too
    assert_is(second / "merged", sums(base, first))
    assert "not lora_model_dir" not in our_log.text


def test_where_nothing_tells_which_adapter_is_meant_both_are_named(went_on, base, tmp_path):
    """Called from Python, Axolotl writes its arguments over the YAML's keys."""
    from axolotl.cli.merge_lora import do_cli

    config, first, second = went_on
    for options in ({}, {"lora_model_dir": str(first)}):
        with pytest.raises(ValueError) as error:
            do_cli(str(config), **options)
        said = str(error.value)
        assert f"lora_model_dir is '{first}'" in said and f"output_dir '{second}' holds" in said
        assert "`axolotl loki merge`, or delete `lora_model_dir` from the YAML" in said
        assert not (second / "merged").exists()
    content = json.loads(config.read_text())
    del content["lora_model_dir"]
    config.write_text(json.dumps(content))
    do_cli(str(config), lora_model_dir=str(first))  # the YAML says nothing of it
    assert_is(second / "merged", sums(base, first))
