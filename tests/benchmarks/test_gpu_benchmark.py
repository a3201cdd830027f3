"""The run for the day a GPU is there goes through here too, from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import gpu, writer

ROOT = Path(__file__).parents[2]
BARE = """
import sys
from pathlib import Path
sys.modules["axolotl"] = sys.modules["bitsandbytes"] = None
folder = Path(sys.argv.pop())
from benchmarks import gpu, writer
writer.RESULTS = folder
gpu.main()
"""
OPTIONS = ["--device", "cpu", "--size", "tiny"]


def rows(folder):
    """By (what, weights, attention)."""
    found = json.loads((folder / "gpu.json").read_text())["rows"]
    assert not [row for row in found if "FAILED" in row["note"]]
    return {(r["what"], r["weights"], r["attention"]): r for r in found}


def test_every_part_is_measured_or_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu", *OPTIONS])
    gpu.main()
    found = rows(tmp_path)
    table = (tmp_path / "gpu.md").read_text()
    assert "`python -m benchmarks.gpu --device cpu --size tiny`" in table
    assert table.count("\n| ") == 1 + len(found)
    for weights in ("bf16", "NF4"):
        for what in (
            "analysis, B auto",
            "analysis, B = 8",
            "training step, LoKI dense",
            "training step, `auto`, all linears r = 16",
            "training step, `auto`, 10 % of the rows",
            "training step, `auto` with `freeze_a: false`, all linears r = 16",
            "setting what all linears read",
        ):
            assert found[what, weights, "sdpa"]["ms"] > 0
        eager = found["training step, LoKI dense", weights, "eager"]
        assert eager["ms"] > 0 and "x LoRA's" in eager["note"]
        flash = found["analysis, B auto", weights, "flash_attention_2"]
        assert flash["note"] == "not run: needs a GPU" and flash["ms"] == ""
    exact = found["scores against the obvious loop", "float32", ""]["note"]
    assert float(exact.split()[2]) < 1e-4, exact


def test_without_axolotl_bitsandbytes_or_time_the_rows_say_so(tmp_path):
    command = [sys.executable, "-c", BARE, *OPTIONS, "--minutes", "0", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    found = rows(tmp_path)
    for weights, reason in (("bf16", "0 s are left"), ("NF4", "bitsandbytes is not installed")):
        row = found["model built", weights, ""]
        assert row["ms"] == "" and row["note"].startswith("not run: ") and reason in row["note"]
