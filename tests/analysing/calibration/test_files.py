"""Files and data sets that calibration is read from: kinds, configurations, slices."""

from __future__ import annotations

import json

import pytest

from loki_plugin.analysing.calibration.prompts import read_texts
from loki_plugin.analysing.calibration.sources import load_records

TEXTS = [{"text": f"text {i}"} for i in range(20)]


def texts(source, **how) -> list[str]:
    return [r.text for r in load_records(str(source), **how)]


def lines(rows) -> str:
    return "".join(json.dumps(r) + "\n" for r in rows)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(TEXTS[:3]),
        json.dumps(TEXTS[:3], indent=2),
        " \n" + lines(TEXTS[:3]),
        "[\n" + ",\n".join(json.dumps(r) for r in TEXTS[:3]) + "\n]\n",
    ],
    ids=["one line", "indented", "lines", "a line each"],
)
def test_a_json_file_is_a_list_or_lines(tmp_path, content):
    path = tmp_path / "q.json"
    path.write_text(content)
    assert texts(path) == ["text 0", "text 1", "text 2"]
    assert [r.text for r in read_texts(str(path))] == ["text 0", "text 1", "text 2"]


def test_a_json_file_may_be_one_record(tmp_path):
    path = tmp_path / "q.json"
    path.write_text(json.dumps(TEXTS[0], indent=2))
    assert texts(path) == ["text 0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"text": "a"},\n3\n]', "q.json:3: expected a JSON object, got int"),
        ('[\n{"text": "a"},\n\n{"colour": "b"}\n]', "q.json:4: needs `question`"),
        ('[\n{"text": "a"}\n{"text": "b"}\n]', "q.json:3: not JSON: expected `,` or `]`"),
        ('[\n{"text": "a"},\n{oops}\n]', "q.json:3: not JSON"),
        ('[\n{"text": "a"}', "q.json:2: not JSON: expected `,` or `]`"),
        ('[{"text": "a"}]\n[]', "q.json:1: not JSON: text behind the list"),
        ('{"text": "a"}\n{oops}\n', "q.json:2: not JSON"),
        ("3", "q.json:1: expected a JSON object, got int"),
        ("[]", "q.json' is empty; it needs at least one record"),
    ],
)
def test_a_faulty_json_file_is_named_by_line(tmp_path, content, message):
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_records(str(path))


def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path):
    for name, message in (
        ("q.parquet", "q.parquet' is not Parquet: "),
        ("q.tsv", r"q.tsv' is a file of a kind that is not read; read are .jsonl, .json, .csv"),
    ):
        (tmp_path / name).write_text("question\tanswer\n")
        with pytest.raises(ValueError, match=message):
            load_records(str(tmp_path / name))


def test_a_folder_is_a_data_set_with_splits_and_slices(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines(TEXTS))
    (tmp_path / "test.jsonl").write_text(lines(TEXTS[:4]))
    assert len(texts(tmp_path)) == 4  # test goes first
    every = [row["text"] for row in TEXTS]
    for split, wanted in (
        ("train", every),
        ("train[:5]", every[:5]),
        ("train[5:8]", every[5:8]),
        ("train[-3:]", every[-3:]),
        ("train[10%:25%]", every[2:5]),
        ("train[ :5]", every[:5]),
    ):
        assert texts(tmp_path, split=split) == wanted, split
    (record,) = load_records(str(tmp_path), split="train[7:8]")
    assert record.where.endswith("[train][7]")
    for split in ("train[:5", "train[a:b]", "train+test", ""):
        if split:
            with pytest.raises(ValueError, match="must be the name of a split, or a slice"):
                load_records(str(tmp_path), split=split)
    with pytest.raises(ValueError, match=r"split 'validation' is not in .* it has \['test', 't"):
        load_records(str(tmp_path), split="validation[:5]")
    with pytest.raises(ValueError, match="is empty; it needs at least one record"):
        load_records(str(tmp_path), split="train[50:60]")


def test_a_slice_may_be_streamed(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text(lines(TEXTS))
    import datasets

    asked = []
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: (asked.append(k), load(*a, **k))[1]
    )
    records = load_records(str(tmp_path), split="train[2:5]", streaming=True)
    assert [r.text for r in records] == ["text 2", "text 3", "text 4"]
    assert records[0].where.endswith("[train][2]")
    assert asked == [{"split": "train", "streaming": True}]
    for split in (None, "train", "train[5:]", "train[:-1]", "train[:10%]"):
        with pytest.raises(ValueError, match=r"streaming needs a slice that ends, such as split: "):
            load_records(str(tmp_path), split=split, streaming=True)


def test_a_data_set_with_several_configurations_needs_a_name(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(lines([{"text": f"of {name}"}]))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: one/*.jsonl\n"
        "- config_name: two\n  data_files: two/*.jsonl\n---\n"
    )
    assert texts(tmp_path, name="two") == ["of two"]
    with pytest.raises(ValueError, match=r"several configurations; .*calibration.name: .*'one'"):
        load_records(str(tmp_path))
    with pytest.raises(ValueError, match=r"several configurations; .*calibration.name: .*'one'"):
        load_records(str(tmp_path), name="three")


def test_what_was_saved_to_disk_is_read(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(TEXTS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"validation": data}).save_to_disk(tmp_path / "several")
    assert texts(tmp_path / "one", split="train[:2]") == ["text 0", "text 1"]
    assert texts(tmp_path / "several", split="validation[:2]") == ["text 0", "text 1"]
    with pytest.raises(ValueError, match="was saved with `save_to_disk`: it has one config"):
        load_records(str(tmp_path / "one"), name="x")


def test_classes_of_a_data_set_count_from_zero(tmp_path):
    import datasets

    rows = {"question": ["Q?"] * 2, "choices": [["a", "b", "c"]] * 2, "answer": [1, 2]}
    rows |= {"subject": [0, 1]}
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
            "answer": datasets.ClassLabel(names=["A", "B", "C"]),
            "subject": datasets.ClassLabel(names=["law", "art"]),
        }
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    data.save_to_disk(tmp_path / "set")
    records = load_records(str(tmp_path / "set"))
    assert [(r.answer, r.subject) for r in records] == [(1, "law"), (2, "art")]


def test_one_file_has_one_split_and_no_configuration(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(lines(TEXTS))
    assert texts(path, split="train[:3]") == ["text 0", "text 1", "text 2"]
    assert len(load_records("builtin", split="train[:7]")) == 7
    with pytest.raises(ValueError, match="split 'test': a file has one split, which .* train"):
        load_records(str(path), split="test")
    for more in ({"name": "x"}, {"streaming": True}):
        with pytest.raises(ValueError, match="is one file; leave `name` and `streaming` out"):
            load_records(str(path), **more)
