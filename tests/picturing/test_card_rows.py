"""The model card says of rows and protection what their files say."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from test_card import cells, parts
from test_page import put, report_of
from transformers import AutoModelForCausalLM

from loki_plugin import RowSelection, implant
from loki_plugin.cli import loki
from loki_plugin.implanting.merge import MergeReport, Rounding
from loki_plugin.implanting.proven import ONTO
from loki_plugin.implanting.verify import VerifyReport
from loki_plugin.picturing import telling
from loki_plugin.picturing.card import write_adapter_card, write_merged_card

LEAST, MOST = (f"rows train that contribute {much} to what the model" for much in ("least", "most"))
SOME = [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("made", "rows", "said", "chosen"),
    [
        (
            {"strategy": "layer_balanced"},
            SOME,
            f"every layer's down-projection only those {LEAST}",
            "5 % of the rows by layer_balanced",
        ),
        (
            {"strategy": "global_lowest"},
            SOME,
            f"all down-projections together only those {LEAST}",
            "5 % of the rows by global_lowest",
        ),
        (
            {"strategy": "layer_highest"},
            SOME,
            f"every layer's down-projection only those {MOST}",
            "5 % of the rows by layer_highest",
        ),
        (
            {"strategy": "global_highest"},
            SOME,
            f"all down-projections together only those {MOST}",
            "5 % of the rows by global_highest",
        ),
        (
            {"strategy": "random"},
            SOME,
            "only rows train that were drawn at random; nothing was analysed.",
            "5 % of the rows, drawn at random",
        ),
        (
            {"strategy": "random", "exclude": ["a.json"]},
            SOME,
            "drawn at random, without those that were excluded; nothing was analysed.",
            "5 % of the rows, drawn at random, without the rows of a.json",
        ),
        (
            {"source": "bare list of lists"},
            SOME,
            "only the rows train that are listed in `loki_rows.json`.",
            None,
        ),
        ({}, SOME, "only the rows train that are listed in `loki_rows.json`.", None),
        (
            {"strategy": "layer_balanced", "quota": 100},
            [range(40)] * 3,
            "of every layer's down-projection all rows train; nothing was analysed.",
            "all",
        ),
        (
            {"strategy": "layer_balanced", "quota": 100, "scores": "kva.h5"},
            [range(40)] * 3,
            "of every layer's down-projection all rows train.",
            "all",
        ),
        (
            {"source": "bare list of lists"},
            [range(40)] * 3,
            "of every layer's down-projection all rows train.",
            "all",
        ),
        (
            {"parts": [{"strategy": "random"}, {"strategy": "random"}]},
            SOME,
            "drawn at random",
            None,
        ),
        ({"parts": [{"strategy": "layer_balanced"}, {}]}, SOME, "that are listed in", None),
    ],
    ids=[
        "lowest of a layer",
        "lowest of all",
        "highest of a layer",
        "highest of all",
        "random",
        "random beside others",
        "bare list",
        "no record",
        "quota 100",
        "quota 100 of scores",
        "all of a list",
        "random parts",
        "mixed parts",
    ],
)
def test_the_card_says_of_the_rows_what_their_file_says(tmp_path, made, rows, said, chosen):
    made = {"quota": 5} | made if "strategy" in made else made
    selection = RowSelection(rows, 40, made=made)
    selection.save(tmp_path / "loki_rows.json")
    put(tmp_path, report_of(selection))
    write_adapter_card(tmp_path)
    section = parts(tmp_path)[2]
    assert said in section
    assert cells(section).get("Rows chosen") == chosen
    assert section.count("contribute") == ("contribute" in said)
    moved = "the rows of the down-projections" if len(rows[0]) == 40 else "the selected rows"
    assert f"**Verified:** Only {moved} have changed" in section


def test_without_rows_the_card_tells_of_protection_where_there_is_some(tmp_path):
    selection = RowSelection([[], []], 40, linears=["layers.0.self_attn.q_proj"])
    selection.save(tmp_path / "loki_rows.json")
    some = {"directions_per_layer": [4, 5], "soft": True, "tokens": 1234}
    for more, said in ((some, "with LoKI's protection of inputs; 1 "), (None, "Implanting); 1 ")):
        put(tmp_path, report_of(selection, linears=selection.linears, protection=more))
        write_adapter_card(tmp_path)
        section = parts(tmp_path)[2]
        assert f"{said}further linear layers trained a LoRA." in section
        assert "contribute" not in section and "selected rows" not in section


@pytest.mark.parametrize("every", [True, False], ids=["all rows", "some rows"])
def test_the_card_of_a_merge_says_whether_all_rows_may_have_changed(tmp_path, base, every):
    rows = [range(64)] * 3 if every else [[1], [2], [3]]
    model = implant(AutoModelForCausalLM.from_pretrained(base), rows)
    model.save_pretrained(tmp_path / "out")
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"base_model": str(base), "output_dir": str(tmp_path / "out")}))
    done = CliRunner().invoke(loki, ["merge", str(config)])
    assert done.exit_code == 0, done.output
    section = parts(tmp_path / "out" / "merged")[2]
    where = "the rows of the down-projections" if every else "the selected rows"
    assert f"nothing outside {where} has changed." in section
    assert ("all rows train." in section) == every


def test_the_card_of_a_merge_onto_the_dequantised_base_names_what_it_was_compared_with(tmp_path):
    selection = RowSelection(SOME, 64)
    selection.save(tmp_path / "loki_rows.json")
    merged = MergeReport(tmp_path, 1, 3, 6, "all", 0, Rounding(), "bfloat16", [])
    for onto in ONTO:
        write_merged_card("me/base", [tmp_path], merged, VerifyReport(compared=9), onto)
        section = parts(tmp_path)[2]
        said = (
            f"of `{tmp_path.name}-base`, the base as the run's quantisation holds it. From me/base"
        )
        assert (said in section) == (onto != "original")
        assert ("selected rows has changed.\n" in section) == (onto == "original")


def test_the_verdict_names_selected_rows_where_there_are_some():
    report = {"verified": True, "linears": ["q"] * 8, "hidden_size": 64, "verified_what": {"a": ""}}
    only = telling.verdict(report | {"rows_per_layer": []}, False)["text"]
    assert only.startswith("Only 8 targeted linears have changed")
    both = telling.verdict(report | {"rows_per_layer": [3, 3]}, False)["text"]
    assert both.startswith("Only the selected rows and 8 targeted linears have changed")
