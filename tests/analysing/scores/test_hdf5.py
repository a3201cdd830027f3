"""Files of the LoKI authors' code, written here as their `HDF5Manager` writes them."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from helpers.scores import score_file

from loki_plugin import RowSelection, select_rows
from loki_plugin.analysing.scores.hdf5 import Hdf5Scores


@pytest.mark.parametrize("prompts", [1, 64, 150])
def test_scores_are_read_in_order_and_again(tmp_path, prompts):
    scores = torch.randn(prompts, 3, 40, generator=torch.Generator().manual_seed(0))
    file = Hdf5Scores(score_file(tmp_path / "kva.h5", scores))
    assert file.shape == (prompts, 3, 40)
    for _ in range(2):
        chunks = list(file)
        assert torch.equal(torch.cat(chunks), scores.half().float())
        assert chunks[0].dtype == torch.float32
    for found, expected in zip(select_rows(file), select_rows(scores.half()), strict=True):
        assert torch.equal(found, expected)


def test_a_large_file_comes_in_parts(tmp_path):
    file = Hdf5Scores(score_file(tmp_path / "kva.h5", torch.zeros(400, 4, 256)))
    assert max(len(chunk) for chunk in file) < 400 == sum(len(chunk) for chunk in file)


def test_metadata_is_kept(tmp_path):
    path = score_file(
        tmp_path / "kva.h5", torch.zeros(1, 2, 3), model_name="m", ig_steps=7, sets='["a", "b"]'
    )
    assert Hdf5Scores(path).metadata == {"model_name": "m", "ig_steps": 7, "sets": ["a", "b"]}


def test_faulty_files_are_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    with pytest.raises(ValueError, match="'.*none.h5' cannot be read"):
        Hdf5Scores(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no scores")
    with pytest.raises(ValueError, match="'.*text.h5' cannot be read"):
        Hdf5Scores(tmp_path / "text.h5")
    with pytest.raises(ValueError, match=r"named 'dataset'; it holds 'scores' \[2, 3, 4\] float16"):
        Hdf5Scores(score_file(tmp_path / "name.h5", torch.zeros(2, 3, 4), name="scores"))
    with pytest.raises(ValueError, match=r"it holds 'dataset' \[2, 3\] float16"):
        Hdf5Scores(score_file(tmp_path / "flat.h5", torch.zeros(2, 3)))
    with pytest.raises(ValueError, match=r"it holds 'dataset' \[0, 2, 3\] float16"):
        Hdf5Scores(score_file(tmp_path / "empty.h5", torch.zeros(0, 2, 3)))
    with h5py.File(tmp_path / "group.h5", "w") as file:
        file.create_group("dataset")
    with pytest.raises(ValueError, match="it holds group 'dataset'"):
        Hdf5Scores(tmp_path / "group.h5")
    with h5py.File(tmp_path / "bare.h5", "w"):
        pass
    with pytest.raises(ValueError, match="it holds nothing"):
        Hdf5Scores(tmp_path / "bare.h5")


def test_without_h5py_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"'kva.h5' needs h5py: `pip install h5py`"):
        Hdf5Scores("kva.h5")


def test_positions_are_a_bare_list_and_come_back(tmp_path):
    selection = RowSelection([torch.tensor([1, 5]), torch.tensor([], dtype=torch.long)], 8)
    path = selection.save_positions(tmp_path / "new" / "10.json")
    assert json.loads(path.read_text()) == [[1, 5], []]
    assert RowSelection.load(path) == selection
