"""The blocks of a run's log, word by word where a reader relies on it."""

from __future__ import annotations

import logging

from loki_plugin.host.patches import _ToAxolotl
from loki_plugin.host.telling import about_end, about_rows, about_training, block
from loki_plugin.rows import RowSelection

MADE = {
    "quota": 10,
    "strategy": "layer_balanced",
    "magnitude": False,
    "exclude": [],
    "attribution": {"steps": 7, "rule": "left"},
    "calibration": {"source": "builtin", "prompts": 570, "dropped": 2},
    "analysis": "9e4a",
    "convergence_error": 0.0312,
    "analysis_seconds": 95.0,
    "prompts_analysed": 570,
}


def rows(**changes):
    return RowSelection([[1, 2], [3, 4], [5, 6]], 64, made=MADE | changes)


def test_rows_that_were_analysed_now():
    assert block("rows", about_rows(rows(), "analysis")).splitlines() == [
        "loki: rows",
        "  from        analysis 9e4a of 570 prompts (builtin, 2 too long), made now in 95 s,"
        " 6.0 prompts/s",
        "  chosen      quota 10 %, layer_balanced",
        "  rows        2 of 64 in each of 3 layers",
        "  scores      they miss 3.1 % of the change of p that they divide up (7 steps, left rule)",
    ]


def test_rows_from_elsewhere():
    def source(**changes):
        return dict(about_rows(rows(**changes), "analysis"))["from"]

    assert source(prompts_analysed=0).endswith("(builtin, 2 too long), taken from the cache")
    assert source(prompts_analysed=70).endswith("0.7 prompts/s, the other 500 from the cache")
    excluded = dict(about_rows(rows(exclude=["a.json"], magnitude=True), "analysis"))["chosen"]
    assert excluded == "quota 10 %, layer_balanced, by |score|, without the rows of a.json"
    bare = RowSelection([[1], [2, 3]], 64)
    assert about_rows(bare, "rows.json") == [
        ("from", "rows.json"),
        ("rows", "1 to 2 of 64 in each of 2 layers"),
    ]


def test_what_was_not_analysed_and_targets_without_rows():
    none = RowSelection([[], []], 64, linears=["layers.0.attn.q_proj", "layers.1.attn.q_proj"])
    assert about_rows(none, "no analysis") == [
        ("from", "no analysis"),
        ("rows", "none: `targets` names no down-projection"),
    ]
    planned = RowSelection(none.rows, 64, linears=none.linears, made=MADE)
    assert "chosen" not in dict(about_rows(planned, "no analysis"))  # there is nothing to choose of
    told = dict(about_training(none, None, 640, 6400))
    assert told["linears"] == "2 with a LoRA: q_proj"
    assert not {"form", "rows"} & told.keys()


def test_where_every_row_trains_none_was_chosen():
    every = RowSelection([[0, 1], [0, 1]], 2, made=MADE | {"quota": 100})
    told = dict(about_rows(every, "no analysis"))
    assert told["chosen"] == "every row of the down-projections"
    assert told["rows"] == "2 of 2 in each of 2 layers"


def test_what_trains():
    told = dict(about_training(rows(), None, 1536, 100000))
    assert told["form"].startswith("dense") and told["rows"] == "6 in all"
    assert told["trainable"] == "1,536 parameters, 1.536 % of 100,000"
    assert "rank 4" in dict(about_training(rows(), 4, 1, 2))["form"]


def test_the_end_names_the_files_that_are_there_and_what_to_type(tmp_path):
    (tmp_path / "loki_rows.json").write_text("{}")
    told = about_end({"base": "every byte"}, "KL 0.01", tmp_path, "run.yaml")
    assert told == [
        ("base", "every byte"),
        ("forgotten", "KL 0.01"),
        ("files", f"in {tmp_path}"),
        ("", "loki_rows.json  its rows"),
        ("next", "loki merge run.yaml       the plain merged model, and the proof of its rows"),
        ("", "loki forgetting run.yaml  what it lost, on lm-eval's tasks with --tasks"),
    ]


def test_the_first_rank_tells_for_all_and_every_rank_warns(monkeypatch):
    said = []
    monkeypatch.setattr(
        logging.getLogger("axolotl"), "handle", lambda record: said.append(record.getMessage())
    )
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        for level in (logging.INFO, logging.WARNING):
            record = logging.LogRecord("loki_plugin", level, "", 1, f"{rank} {level}", None, None)
            _ToAxolotl().emit(record)
    assert said == ["0 20", "0 30", "1 30"]
