"""The hand-over file."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.families import tiny

from loki_plugin import RowSelection
from loki_plugin.model.fingerprint import fingerprint


def write(tmp_path, content) -> str:
    path = tmp_path / "rows.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_save_load_keeps_everything_and_sorts(tmp_path):
    made = {"quota": 10, "calibration": {"source": "builtin"}}
    rows = RowSelection([[5, 1], [0, 47], [3]], 48, {"config": "x"}, made)
    loaded = RowSelection.load(rows.save(tmp_path / "loki_rows.json"))
    assert [r.tolist() for r in loaded.rows] == [[1, 5], [0, 47], [3]]
    assert loaded == rows and loaded.made == made and loaded.fingerprint == {"config": "x"}
    assert loaded.counts == [2, 2, 1] and loaded.hidden_size == 48
    assert [p.name for p in tmp_path.iterdir()] == ["loki_rows.json"]


def test_the_authors_bare_list_loads_and_gets_its_size_from_the_model(tmp_path):
    rows = RowSelection.load(write(tmp_path, [[7, 2], [1], [40]]))
    assert [r.tolist() for r in rows.rows] == [[2, 7], [1], [40]]
    assert rows.check(tiny("llama")).hidden_size == 48


OURS = {"format": "loki_rows", "version": 1, "num_layers": 2, "hidden_size": 8}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{oops", "rows.json' is not JSON"),
        ({"a": 1}, '"format": "loki_rows".*got dict'),
        ("3", "list of lists of integers, got int 3"),
        ([[1], 2], "layer 1: expected a list of row indices, got int 2"),
        ([[1], [2.0]], "layer 1: row index 2.0 is not an integer"),
        ([[1], [True]], "layer 1: row index True is not an integer"),
        ([[-1]], "layer 0: row index -1 is outside"),
        ([[1, 4, 1]], "layer 0: row 1 is listed twice"),
        ([], "at least one row"),
        ([[], []], "at least one row, got 2 layers with none"),
        (OURS | {"version": 2, "rows": []}, "format version 2, this package reads 1"),
        (OURS, r"fields \['rows'\] are missing"),
        (OURS | {"rows": [[1]]}, "has 1 layers but num_layers is 2"),
        (
            OURS | {"rows": [[1], [2]], "hidden_size": "64"},
            "hidden_size must be an integer, got str '64'",
        ),
        (OURS | {"rows": [[1], [2]], "fingerprint": "x"}, "`fingerprint` must be an object"),
        (OURS | {"rows": [[1], [2]], "made": [3]}, "`made` must be an object, got list"),
        (
            OURS | {"rows": [[1], [2]], "made": {"quota": "ten"}},
            "`made.quota` must be a number of percent, got str 'ten'",
        ),
        (OURS | {"rows": [[1], [8]]}, r"layer 1: row index 8 is outside \[0, 8\)"),
    ],
)
def test_a_faulty_file_is_named_with_its_fault(tmp_path, content, message):
    with pytest.raises(ValueError, match="rows file.*" + message):
        RowSelection.load(write(tmp_path, content))


def test_a_quota_that_version_0_1_1_wrote_as_text_is_a_number(tmp_path):
    for text, number in (("10", 10), ("2.5", 2.5)):
        old = OURS | {"rows": [[1], [2]], "made": {"quota": text, "strategy": "random"}}
        made = RowSelection.load(write(tmp_path, old)).made
        assert made == {"quota": number, "strategy": "random"}
        assert type(made["quota"]) is type(number)


def test_a_missing_file_says_what_rows_takes(tmp_path):
    with pytest.raises(ValueError, match="nowhere.json' cannot be read .No such file.*loki.rows"):
        RowSelection.load(tmp_path / "nowhere.json")


def test_rows_for_another_shape_are_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match="2 layers x unknown rows, this model has 3 x 48"):
        RowSelection([[1], [2]]).check(model)
    with pytest.raises(ValueError, match="3 layers x 64 rows, this model has 3 x 48"):
        RowSelection([[1], [2], [3]], 64).check(model)
    with pytest.raises(ValueError, match=r"layer 2: row index 48 is outside \[0, 48\)"):
        RowSelection([[1], [2], [48]]).check(model)


def test_rows_of_a_fine_tune_of_the_same_shape_are_refused():
    model = tiny("llama")
    rows = RowSelection([[1], [2], [3]], 48, fingerprint(model))
    assert rows.check(model) == rows
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    with pytest.raises(ValueError, match="made for another model: its weights have other values"):
        rows.check(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match="embeddings or norms have other values"):
        rows.check(model)


def test_numpys_integers_are_row_indices_and_its_other_numbers_are_not():
    numpy = pytest.importorskip("numpy")
    rows = RowSelection([numpy.array([4, 1]), [numpy.int32(2)], []])
    assert [r.tolist() for r in rows.rows] == [[1, 4], [2], []]
    for wrong in (numpy.array([1.0]), numpy.array([True])):
        with pytest.raises(ValueError, match="layer 0: row index .* is not an integer"):
            RowSelection([wrong])
