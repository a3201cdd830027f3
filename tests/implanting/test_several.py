"""Several adapters of one base, on rows of their own, in one merge."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from helpers.families import tiny
from safetensors.torch import load_file, save_file

from loki_plugin import RowSelection, implant
from loki_plugin.cli import loki
from loki_plugin.implanting.adapters import Adapter
from loki_plugin.implanting.merge import merge_adapter, merge_adapters
from loki_plugin.implanting.verify import verify
from loki_plugin.rows import union

FIRST = RowSelection([[3, 1, 40], [0, 47, 5], []], 48)
SECOND = RowSelection([[2, 41], [46], [7, 8, 9]], 48)
THIRD = RowSelection([[40, 4], [], [8]], 48)  # 40 and 8 belong to others


def adapter(tmp_path, name, selection, rank=None, family="llama", dtype=torch.float32):
    """An adapter with large values on the base in tmp_path."""
    base = tiny(family, dtype=dtype)
    if not (tmp_path / "base").exists():
        base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = implant(base, selection, rank)
    torch.manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(tmp_path / name)
    return Adapter.load(tmp_path / name)


def load(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def assert_same(one, other):
    one, other = load(one), load(other)
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disjoint_adapters_merge_as_one_after_another_in_any_order(tmp_path, family, dtype):
    one = adapter(tmp_path, "one", FIRST, None, family, dtype)
    two = adapter(tmp_path, "second", SECOND, 2, family, dtype)
    base = tmp_path / "base"
    report = merge_adapters(base, [one, two], tmp_path / "both", progress=False)
    assert (report.adapters, report.layers, report.rows) == (2, 3, 12)
    assert "12 rows of 3 layers of 2 adapters" in report.text()
    merge_adapters(base, [two, one], tmp_path / "turned", progress=False)
    merge_adapter(base, one.folder, tmp_path / "half", FIRST, False)
    merge_adapter(tmp_path / "half", two.folder, tmp_path / "whole", SECOND, False)
    assert_same(tmp_path / "both", tmp_path / "turned")
    assert_same(tmp_path / "both", tmp_path / "whole")
    # Against the base, each alone explains its own rows only.
    assert verify(base, tmp_path / "both", union([FIRST, SECOND]), False).ok
    assert not verify(base, tmp_path / "both", FIRST, False).ok
    kept = RowSelection.load(tmp_path / "both" / "loki_rows.json")
    assert kept == union([SECOND, FIRST]) and kept.counts == [5, 4, 3]


def test_rows_in_common_are_refused_by_name_or_summed_when_asked(tmp_path):
    parts = [adapter(tmp_path, n, s) for n, s in (("one", FIRST), ("third", THIRD))]
    base, out = tmp_path / "base", tmp_path / "out"
    with pytest.raises(ValueError, match=r"one' and .*third' change 1 rows .*layer 0: \[40\]"):
        merge_adapters(base, parts, out, progress=False)
    assert not out.exists()
    merge_adapters(base, parts, out, sum_overlaps=True, progress=False)
    before, after = load(base), load(out)
    updates = [load(p.folder) for p in parts]
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.down_proj"
        change = torch.zeros(48, 80)
        for tensors in updates:
            key = f"base_model.model.{name}.lora_%s.weight"
            if key % "A" in tensors:
                change += tensors[key % "B"] @ tensors[key % "A"]
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"] + change)
    assert verify(base, out, union([FIRST, THIRD]), False).ok


def test_the_commands_take_several(tmp_path):
    folders = [str(adapter(tmp_path, n, s).folder) for n, s in (("a", FIRST), ("bb", SECOND))]
    config = tmp_path / "run.yaml"
    run = {"base_model": str(tmp_path / "base"), "output_dir": str(tmp_path / "a")}
    config.write_text(json.dumps(run))
    arguments = ["merge", str(config), "--adapter", folders[0], "--adapter", folders[1]]
    done = CliRunner().invoke(loki, arguments)
    assert done.exit_code == 0 and "OK: nothing outside" in done.output, done.output
    rows = [word for f in folders for word in ("--rows", f"{f}/loki_rows.json")]
    checked = ["verify", str(tmp_path / "base"), str(tmp_path / "a" / "merged")]
    done = CliRunner().invoke(loki, checked + rows)
    assert done.exit_code == 0 and "12 of 12 selected rows" in done.output, done.output
    assert CliRunner().invoke(loki, checked + rows[:2]).exit_code == 1
    again = ["--adapter", folders[0], "--output", str(tmp_path / "sum")]
    done = CliRunner().invoke(loki, arguments + again)
    assert done.exit_code == 1 and "--sum-overlaps" in done.output
    done = CliRunner().invoke(loki, [*arguments, *again, "--sum-overlaps"])
    assert done.exit_code == 0, done.output


def test_two_adapters_may_not_both_add_tokens(tmp_path):
    parts = [adapter(tmp_path, n, s) for n, s in (("one", FIRST), ("second", SECOND))]
    old = load(tmp_path / "base")
    for part in parts:
        file = part.folder / "adapter_model.safetensors"
        more = {
            f"base_model.model.{key}": torch.cat([old[key], torch.ones(2, 48)])
            for key in ("model.embed_tokens.weight", "lm_head.weight")
        }
        save_file(load_file(file) | more, file)
    with pytest.raises(ValueError, match="both add tokens, which would get the same ids"):
        merge_adapters(tmp_path / "base", parts, tmp_path / "out", progress=False)
    # The tokens of one are taken, wherever it stands in the list.
    file = parts[0].folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "lora_" in k}, file)
    for order in (parts, parts[::-1]):
        out = tmp_path / order[0].folder.name / "out"
        assert merge_adapters(tmp_path / "base", order, out, progress=False).new_tokens == 2


def test_rows_of_different_models_have_no_union():
    with pytest.raises(ValueError, match=r"for \[2, 3\] layers of \[48\] rows"):
        union([FIRST, RowSelection([[1], [2]])])
    with pytest.raises(ValueError, match=r"for \[3\] layers of \[48, 64\] rows"):
        union([FIRST, RowSelection([[1], [2], [3]], 64)])
    with pytest.raises(ValueError, match="no rows file is given"):
        union([])
