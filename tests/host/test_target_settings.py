"""Which linears a YAML may name, seen before anything is loaded."""

from __future__ import annotations

import pytest
from helpers.axolotl import load

from loki_plugin.host.files import Files
from loki_plugin.rows import RowSelection

QUERIES = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loki": {"targets": ["z_proj"]}}, "is called z_proj; there are down_proj, gate_proj"),
        ({"loki": {"targets": ["q_proj", "lm_head"]}}, "is called lm_head; there are"),
        ({"loki": {"targets": r".*\.z_proj"}}, r"is called .*z_proj; there are"),
        ({"lora_target_modules": ["w1"], "lora_r": 4}, "is called w1; there are"),
        ({"loki": {"linear_rank": 4}}, "`targets` names none; set `targets: all` too"),
        ({"loki": {"targets": []}}, "loki.targets: .*at least 1"),
        ({"loki": {"targets": "all", "linear_rank": 0}}, "loki.linear_rank: .*greater than or"),
    ],
)
def test_what_cannot_train_is_named_before_anything_is_loaded(run_config, change, message):
    run_config["loki"] |= change.pop("loki", {})
    with pytest.raises(ValueError, match=message):
        Files.read(load(run_config | change))


def test_the_rank_on_linears_may_stand_beside_loras_own_keys(run_config):
    run_config |= {"lora_target_linear": True}
    run_config["loki"]["linear_rank"] = 4
    block = load(run_config).loki
    assert (block.targets, block.linear_rank) == ("all", 4)


def test_a_rows_file_of_other_linears_is_refused(run_config, tmp_path):
    rows = RowSelection([[1], [2], [3]], 64, linears=QUERIES)
    run_config["loki"]["rows"] = str(rows.save(tmp_path / "rows.json"))
    with pytest.raises(ValueError, match="rows.json' names 3 further linears .q_proj.*targets"):
        Files.read(load(run_config))
    run_config["loki"]["targets"] = ["q_proj", "down_proj"]
    assert Files.read(load(run_config)).rows == rows
