"""The trial of routed experts' rows: what it calls proven is, and its checks can fail."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks.routed import adapting, cost, trial


@pytest.mark.parametrize("own", [False, True], ids=["same rows", "own rows"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "granitemoe"])  # a layout each
def test_rows_of_experts_are_a_standard_adapter(family, own, tmp_path):
    tried = trial.Trial(family, own, tmp_path)
    for step in (tried.trains, tried.loads, tried.merges, tried.patches):
        step()


def test_experts_of_a_4_bit_base_stay_wide_and_packed_ones_do_not_merge(tmp_path):
    found = trial.Trial("gpt_oss", False, tmp_path).run()
    assert found["`load_in_4bit`: trains, loads"] == "yes; experts held as float32"
    assert found["experts in 4 bits too"] == "yes; experts held as uint8"
    assert found["and merged there"] == "no: without a word it answers as the base again"


def test_an_update_outside_the_rows_is_seen(tmp_path):
    tried = trial.Trial("qwen3_moe", False, tmp_path)
    tried.trains()
    rows = tried.chosen[0][2].nonzero()[:, 0]
    tried.chosen[0][2, rows[1:]] = False  # one expert of one layer is to change in one row only
    with pytest.raises(ValueError, match="merged: 5 rows outside the selection"):
        tried.merges()
    with pytest.raises(ValueError, match="patched: logits differ"):
        tried.patches()  # its other rows are not written


def test_a_changed_byte_elsewhere_is_seen(tmp_path, monkeypatch):
    tried = trial.Trial("granitemoe", False, tmp_path)
    tried.trains()
    write = adapting._write_rows

    def more(place, rows, change, dim):
        beside = torch.cat([rows, rows[-1:] + 1])
        return write(place, beside, torch.cat([change, change[-1:]]), dim)

    monkeypatch.setattr(adapting, "_write_rows", more)
    with pytest.raises(ValueError, match="the patched checkpoint: 4 rows outside"):
        tried.patches()


@pytest.mark.parametrize("checkpointed", [True, False])
def test_memory_of_a_step_is_as_predicted(checkpointed):
    found = cost.measured(3, torch.bfloat16, checkpointed, autocast=False, experts=True)
    assert cost.predicted(3, checkpointed, wide=True) == pytest.approx(found, rel=0.1)


def test_the_page_of_limits_has_the_figures():
    page = Path(__file__).parents[2].joinpath("docs", "limits.md").read_text(encoding="utf-8")
    told = re.search(r"- Rows of routed experts.*?\n- ", page, re.DOTALL)
    figures = set(re.findall(r"\d+\.\d|\d+(?= GB)|\d+(?= and \d)", told[0]))
    found = {r["model"]: r for r in cost.published()}
    columns = ("directions, a sixth of I, GB", "with `load_in_4bit`, GB")
    columns += ("a step, checkpointed, GB", "not checkpointed, GB")
    for model in ("Qwen3-30B-A3B", "Mixtral-8x7B"):
        for column in columns:
            assert found[model][column] in figures, (model, column)
