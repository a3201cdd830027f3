"""Damaged, foreign and ambiguous files: named in one line, and never taken for a proof."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from helpers.families import tiny
from safetensors.torch import load_file, save_file

from loki_plugin import RowSelection, implant
from loki_plugin.cli import loki
from loki_plugin.implanting.checkpoint import INDEX, SINGLE
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.verify import verify
from loki_plugin.model.fingerprint import fingerprint

POSITIONS = [[3, 1, 40], [0, 47, 5], [7, 8, 9]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A base, an adapter with its rows file, and both merged."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny("llama")
    model.save_pretrained(folder / "base")
    rows = RowSelection(POSITIONS, 48, fingerprint(model))
    model = implant(model, rows)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_()
    model.save_pretrained(folder / "adapter")
    merge_adapter(folder / "base", folder / "adapter", folder / "merged", rows, False)
    return folder


@pytest.fixture
def files(run, tmp_path):
    """A copy of all that, to be spoilt."""
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    config = {"base_model": str(tmp_path / "base"), "output_dir": str(tmp_path / "adapter")}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    return tmp_path


def fails(message, *arguments):
    """The command ends with one line that holds `message`, and with no traceback."""
    result = CliRunner().invoke(loki, [str(a) for a in arguments])
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("Error: ") and message in last, result.output


def fails_verifying(files, message, tuned="merged", rows="adapter/loki_rows.json"):
    fails(message, "verify", files / "base", files / tuned, "--rows", files / rows)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456789\n"


@pytest.mark.parametrize(
    "spoilt", [POINTER, b"", b"{}", None], ids=["lfs", "empty", "short", "cut"]
)
@pytest.mark.parametrize("which", ["base", "merged", "adapter"])
def test_a_file_that_holds_no_tensors_is_named(files, which, spoilt):
    name = "adapter_model.safetensors" if which == "adapter" else SINGLE
    file = files / which / name
    file.write_bytes(file.read_bytes()[:300] if spoilt is None else spoilt)
    said = f"{which}/{name}' is no whole safetensors file"
    fails_verifying(files, said, "adapter" if which == "adapter" else "merged")
    if which != "merged":
        fails(said, "merge", files / "run.yaml", "--output", files / "out")
    assert not (files / "out").exists()


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}'])
def test_an_index_that_names_no_shards_is_named(files, text):
    (files / "base" / SINGLE).rename(files / "base" / "part.safetensors")
    (files / "base" / INDEX).write_text(text)
    fails_verifying(files, f"base/{INDEX}' is no index of a checkpoint")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_adapter_configuration_is_named(files, content):
    (files / "adapter" / "adapter_config.json").write_bytes(content)
    fails("adapter/adapter_config.json' is not", "merge", files / "run.yaml")
    fails_verifying(files, "adapter/adapter_config.json' is not", "adapter")


def test_a_folder_that_is_none_is_no_adapter(files):
    for folder in (files / "nothing", files / "run.yaml"):
        fails("is no folder of a saved adapter", "merge", files / "run.yaml", "--adapter", folder)


def test_a_configuration_in_another_encoding_is_named(files):
    (files / "run.yaml").write_bytes(b"base_model: b\xe9\n")
    fails("run.yaml' is not YAML in UTF-8", "merge", files / "run.yaml")


def test_a_report_that_nobody_can_read_costs_no_adapter(tmp_path):
    (tmp_path / "loki_report.json").write_bytes(b'\xff"verified": true')
    model = implant(tiny("llama"), RowSelection(POSITIONS))
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "loki_report.json").exists()  # it must not vouch for the new adapter
    assert RowSelection.load(tmp_path / "loki_rows.json").counts == [3, 3, 3]


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def add_head(folder):
    file = folder / "adapter_model.safetensors"
    head = {"base_model.model.lm_head.weight": torch.randn(99, 48)}
    save_file(load_file(file) | head, file)


NOT_PROVED = {
    "a head": (add_head, "lm_head.weight has other values"),
    "a norm": (
        lambda a: save_file(
            load_file(a / "adapter_model.safetensors")
            | {"base_model.model.model.norm.weight": torch.ones(48)},
            a / "adapter_model.safetensors",
        ),
        "neither a LoRA matrix nor an embedding",
    ),
    "dora": (lambda a: edit(a, use_dora=True), "is not a plain LoRA adapter"),
    "modules": (lambda a: edit(a, modules_to_save=["lm_head"]), "is not a plain LoRA adapter"),
    "failed": (lambda a: (a / "LOKI_FAILED.txt").write_text("NaN"), "LOKI_FAILED.txt' says: NaN"),
    "other rows": (
        lambda a: (a / "loki_rows.json").write_text(json.dumps([[3, 1, 400], *POSITIONS[1:]])),
        "row index 400 is outside [0, 48)",
    ),
    "other layers": (
        lambda a: (a / "loki_rows.json").write_text(json.dumps(POSITIONS[:2])),
        "this model has 3 x 48",
    ),
}


@pytest.mark.parametrize("case", NOT_PROVED)
def test_an_adapter_that_changes_more_than_rows_is_not_proved(files, case):
    spoil, message = NOT_PROVED[case]
    spoil(files / "adapter")
    fails_verifying(files, message, "adapter")


def test_an_adapter_is_proved_against_its_own_base(files):
    arguments = ["verify", str(files / "base"), str(files / "adapter")]
    arguments += ["--rows", str(files / "adapter" / "loki_rows.json")]
    result = CliRunner().invoke(loki, arguments)
    assert result.exit_code == 0, result.output
    assert "OK: an adapter on 3 down-projections" in result.output
    assert "architecture and every weight" in result.output
    file = files / "base" / SINGLE
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    fails_verifying(files, "its weights have other values", "adapter")


def split(folder, by=0.0):
    """Beside the one file, an index with a shard of the same tensors; the one file is changed."""
    tensors = load_file(folder / SINGLE)
    save_file(tensors, folder / "part.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))
    save_file({k: v + by for k, v in tensors.items()}, folder / SINGLE, {"format": "pt"})


def test_a_tuned_model_of_which_loaders_may_read_either_form_is_not_proved(files):
    rows = RowSelection.load(files / "adapter" / "loki_rows.json")
    split(files / "merged")
    report = verify(files / "base", files / "merged", rows, False)
    assert not report.ok and f"both {SINGLE} and {INDEX}" in report.faults[0]


def test_of_a_base_in_two_forms_that_one_is_merged_which_transformers_loads(files):
    rows = RowSelection.load(files / "adapter" / "loki_rows.json")
    split(files / "base", by=0.0)
    tensors = load_file(files / "base" / "part.safetensors")
    wrong = {k: v + 1 for k, v in tensors.items()}
    save_file(wrong, files / "base" / "part.safetensors", {"format": "pt"})
    merge_adapter(files / "base", files / "adapter", files / "out", rows, False)
    assert not (files / "out" / INDEX).exists()  # it names shards that are not there
    assert verify(files / "base", files / "out", rows, False).ok
    assert (files / "out" / SINGLE).read_bytes() == (files / "merged" / SINGLE).read_bytes()


def test_leakage_of_a_model_that_lacks_a_layer_is_refused(files):
    from loki_plugin.protecting.directions import Directions

    Directions([torch.eye(80)[:, :4]] * 3).save(files / "u.safetensors")
    tensors = load_file(files / "merged" / SINGLE)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, files / "merged" / SINGLE, {"format": "pt"})
    rows = files / "adapter" / "loki_rows.json"
    arguments = ["--rows", rows, "--directions", files / "u.safetensors"]
    said = "merged' has no model.layers.1.mlp.down_proj.weight"
    fails(said, "verify", files / "base", files / "merged", *arguments)


def test_a_configuration_that_another_run_has_left_is_not_merged_with(files):
    """A run that died in this folder wrote its own, with another rank and so another scale."""
    file = files / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"r": 6, "lora_alpha": 6, "rank_pattern": {}}))
    assert config["r"] != 6
    said = (
        "is of another run than the weights beside it: it gives model.layers.0.mlp.down_proj rank 6"
    )
    fails(said, "merge", files / "run.yaml", "--output", files / "again")
    fails(said, "export", files / "adapter", files / "small", "--rank", "1", "--no-kl")
    file.write_text(json.dumps(config))
    rows = RowSelection.load(files / "adapter" / "loki_rows.json")
    merge_adapter(files / "base", files / "adapter", files / "again", rows, False)
