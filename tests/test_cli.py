"""Every command: help with an example and exit codes, JSON where a script wants it."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from helpers.runs import configure, model
from helpers.tokenizers import make_tokenizer

from loki_plugin.cli import loki
from loki_plugin.commands.shared import Answer, Command


def commands(group, path=()):
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


ALL = list(commands(loki))


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_has_an_example_and_the_exit_codes(path):
    done = CliRunner().invoke(loki, [*path, "--help"])
    assert done.exit_code == 0
    said = done.output[done.output.index("Examples:") :]
    assert f"\n    loki {' '.join(path)}" in said and "--json" in done.output
    assert "Exit codes:\n    0  done\n    1  a mistake, named in one line" in said


def test_axolotl_knows_the_commands():
    from axolotl.cli.main import cli

    done = CliRunner().invoke(cli, ["loki", "analyse", "--help"])
    assert done.exit_code == 0 and "ahead of training" in done.output


def test_starting_loads_nothing_heavy():
    code = "import sys, loki_plugin.cli; print('torch' in sys.modules, 'axolotl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_an_answer_is_text_or_json_and_decides_the_exit_code():
    def said(answer, *options):
        def callback():
            print("somebody else's line")
            return answer

        command = Command("x", callback=callback)
        done = CliRunner().invoke(command, options)
        return done.exit_code, done.stdout, done.stderr

    assert said(Answer("good", {"a": 1})) == (0, "somebody else's line\ngood\n", "")
    assert said(Answer("bad", {}, ok=False))[0] == 1
    code, out, err = said(Answer("good", {"a": 1}), "--json")
    assert code == 0 and json.loads(out) == {"a": 1} and err == "somebody else's line\n"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """A model, its analysis in a cache, and the calibration file."""
    from loki_plugin.pipeline import choose_rows

    folder = tmp_path_factory.mktemp("analysed")
    tokenizer = make_tokenizer(folder / "base")
    llama = model()
    llama.save_pretrained(folder / "base")
    source = folder / "prompts.jsonl"
    records = [{"prompt": f"say {i}", "target": str(i)} for i in range(4)]
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    choose_rows(llama, tokenizer, configure(str(source), folder / "cache"))
    return folder


def run_json(*arguments):
    done = CliRunner().invoke(loki, [*map(str, arguments), "--json"])
    assert done.exit_code in (0, 1) and done.stdout, done.output
    return done.exit_code, json.loads(done.stdout)


def _directions(folder):
    import torch

    from loki_plugin.protecting.directions import Directions

    basis = [torch.linalg.qr(torch.randn(20, 2))[0] for _ in range(3)]
    made = {"energy": [0.9] * 3, "held_out": [0.8, 0.7, 0.9], "tokens": 50}
    return Directions(basis, made=made).save(folder / "directions.safetensors")


def test_json_of_the_commands_that_read_an_analysis(analysed, tmp_path):
    cache, rows = ("--dir", analysed / "cache"), tmp_path / "rows.json"
    code, listed = run_json("cache", "list", *cache)
    (entry,) = listed["analyses"]
    assert code == 0 and entry["complete"] and entry["prompts"] == 4
    _, chosen = run_json("select", *cache, "--quota", "20", "--output", rows)
    assert chosen["rows_file"] == str(rows) and chosen["rows_per_layer"] == [9, 9, 9]
    assert chosen["quota"] == 20 and entry["key"] in chosen["scores"]
    _, stable = run_json("stability", *cache, "--quota", "20", "--rounds", "2")
    assert 0 < stable["overlap"] <= 1 and len(stable["overlap_per_layer"]) == 3
    assert stable["overlap_by_prompts"]["4"] == pytest.approx(stable["overlap"])
    files = ("--directions", _directions(tmp_path))
    _, covered = run_json("stability", *cache, "--quota", "20", "--rounds", "2", *files)
    assert covered["protection"]["directions_per_layer"] == [2, 2, 2]
    assert covered["protection"]["energy_of_held_out_prompts_per_layer"] == [0.8, 0.7, 0.9]
    options = ("--quotas", "10", "--prompts", analysed / "prompts.jsonl", "--device", "cpu")
    _, silenced = run_json("suppress", analysed / "base", *cache, *options)
    assert silenced["prompts"] == 4 and len(silenced["suppressed"]) == 5


def test_json_of_the_commands_that_compare_models(analysed, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    base, out = analysed / "base", tmp_path / "out"
    rows = tmp_path / "out" / "loki_rows.json"
    from loki_plugin import RowSelection, implant

    llama = AutoModelForCausalLM.from_pretrained(base)
    tuned = implant(llama, [[1, 2], [3], [4]])
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_A" in name:
                parameter.normal_(0, 0.1)
    tuned.save_pretrained(out)
    RowSelection([[1, 2], [3], [4]], 48).save(rows)
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"base_model": str(base), "output_dir": str(out)}))
    code, merged = run_json("merge", config)
    assert code == 0 and merged["rows"] == 4 and merged["proof"]["ok"]
    assert merged["output"] == str(out / "merged")
    code, proof = run_json("verify", base, out / "merged", "--rows", rows)
    assert code == 0 and proof["ok"] and proof["changed_rows"] == [2, 1, 1]
    RowSelection([[1, 2], [3], [5]], 48).save(tmp_path / "other.json")
    code, proof = run_json("verify", base, out / "merged", "--rows", tmp_path / "other.json")
    assert code == 1 and not proof["ok"] and "rows outside the selection" in proof["faults"][0]
    code, adapter = run_json("verify", base, out, "--rows", rows)
    assert code == 0 and "an adapter on 3 down-projections" in adapter["adapter"]
    make_tokenizer(out / "merged")
    _, lost = run_json("forgetting", config, "--prompts", analysed / "prompts.jsonl")
    assert lost["prompts"]["prompts"] == 4 and lost["prompts"]["kl"] > 0
