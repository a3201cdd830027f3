"""The table of architectures is what happens: a few lines are made again, and every twelfth."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from benchmarks import architectures as arch

TABLE = {line.type: line for line in arch.read()}
SAME = version("transformers") == arch.made_with()
FEW = (
    "llama",
    "gpt2",
    "qwen2_5_vl",
    "deepseek_v3",
    "jamba",
    "mixtral",
    "florence2",
    "falcon_mamba",
)


def test_the_page_is_the_table():
    written = arch.PAGE.read_text(encoding="utf-8")
    assert written == arch.page(list(TABLE.values()), arch.made_with())


@pytest.mark.skipif(not SAME, reason="another transformers than the table's")
def test_every_type_of_transformers_stands_in_it():
    assert arch.types() == list(TABLE)


def test_nine_of_ten_classes_with_rows_train_and_every_other_one_has_a_reason():
    rows = [line for line in TABLE.values() if line.has_rows]
    trains = [line for line in rows if line.trains == line.merges == "yes"]
    assert len(trains) >= 0.9 * len(rows)
    for line in TABLE.values():
        if not line.trains == line.merges == line.analysed == "yes":
            assert line.why, line


@pytest.mark.skipif(not SAME, reason="another transformers than the table's")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in list(TABLE)[::12]]
)
def test_a_line_is_what_happens(name):
    assert list(arch.lines([name])) == [TABLE[name]]


@pytest.mark.skipif(not SAME, reason="another transformers than the table's")
@pytest.mark.parametrize("name", FEW)
def test_some_lines_are_what_happens(name):
    assert list(arch.lines([name])) == [TABLE[name]]


@pytest.mark.skipif(not SAME, reason="another transformers than the table's")
def test_what_register_lets_through_trains_and_merges():
    """One rule: the early check and the life agree, for every class that could be made."""
    for line in TABLE.values():
        if line.trains == "yes":
            assert line.merges == "yes", line
