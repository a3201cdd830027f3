"""What a merge makes of the numbers: rounded, out of range, NaN, in a file at an odd place."""

from __future__ import annotations

import struct

import pytest
import torch
from helpers.merging import make, merged
from safetensors.torch import load_file, save_file

from loki_plugin import RowSelection
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.verify import verify
from loki_plugin.reporting import Verdict, mark


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_unaligned_file_merges(tmp_path, family, dtype):
    rows = make(tmp_path, family, dtype)
    merged(tmp_path, rows)
    file = tmp_path / "base" / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length].rstrip(b" ")
    header += b" " * ((3 - len(header)) % 8)  # 3 bytes after a multiple of 8
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    two = tmp_path / "two"
    merge_adapter(tmp_path / "base", tmp_path / "adapter", two, rows, False)
    assert verify(tmp_path / "base", two, rows, False).ok
    aligned = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in load_file(two / "model.safetensors").items():
        assert torch.equal(value, aligned[key]), key


def test_what_rounding_took_is_said(tmp_path):
    rows = make(tmp_path, dtype=torch.float32, scale=0.1)
    report = merged(tmp_path, rows)
    assert report.rounding.lost_share == report.rounding.unchanged_share == 0
    assert "longer" not in report.text()


def test_rounding_against_a_slow_loop(tmp_path):
    rows = make(tmp_path, dtype=torch.bfloat16, scale=3e-4)
    report = merged(tmp_path, rows)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "out"))
    lora = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lost = update = 0.0
    elements = unchanged = 0
    for i, positions in enumerate(rows.rows):
        name = f"model.layers.{i}.mlp.down_proj"
        a, b = (lora[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
        for j in positions.tolist():
            old, new = (t[f"{name}.weight"][j].float() for t in (before, after))
            for d, o, n in zip((b[j] @ a).tolist(), old.tolist(), new.tolist(), strict=True):
                lost += (o + d - n) ** 2
                update += d * d
                elements += d != 0
                unchanged += d != 0 and o == n
    assert report.rounding.lost_share == pytest.approx((lost / update) ** 0.5, rel=1e-3)
    assert report.rounding.unchanged_share == pytest.approx(unchanged / elements)
    assert report.rounding.lost_share > 0.1 and "train longer" in report.text()
    kept = RowSelection.load(tmp_path / "out" / "loki_rows.json").made["merge"]
    assert kept["rounded_away"] == report.rounding.lost_share
    assert kept["unchanged"] == report.rounding.unchanged_share and kept["dtype"] == "BF16"


def spoil_adapter(tmp_path, key, index, value):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.model.layers.1.mlp.down_proj.{key}.weight"][index] = value
    save_file(tensors, file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("key", "index"), [("lora_A", (0, 5)), ("lora_B", (47, 2))])
def test_an_adapter_with_nan_or_inf_is_not_merged(tmp_path, key, index, value):
    rows = make(tmp_path)
    spoil_adapter(tmp_path, key, index, value)
    with pytest.raises(ValueError, match=f"layer 1: the adapter's {key} holds NaN or Inf"):
        merged(tmp_path, rows)
    assert not (tmp_path / "out").exists()


def test_an_update_beyond_the_range_of_the_dtype_is_refused(tmp_path):
    rows = make(tmp_path, dtype=torch.float16, loaded=torch.float32)
    spoil_adapter(tmp_path, "lora_A", (0, 5), 1e6)
    with pytest.raises(ValueError, match="layer 1: .* beyond the range of F16.*float32"):
        merged(tmp_path, rows)
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_failed_its_check_is_not_merged(tmp_path):
    rows = make(tmp_path)
    mark(tmp_path / "adapter", Verdict(faults=["weights of the base model have changed"]))
    with pytest.raises(ValueError, match="LOKI_FAILED.txt.*weights of the base model have changed"):
        merged(tmp_path, rows)
    assert not (tmp_path / "out").exists()
    mark(tmp_path / "adapter", Verdict())
    merged(tmp_path, rows)
