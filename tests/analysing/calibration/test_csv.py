"""Calibration sources that are CSV files: cells as they stand there, and nothing left out."""

from __future__ import annotations

import pytest

from loki_plugin.analysing.calibration.sources import load_records


def test_a_csv_cell_keeps_its_line_breaks(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b'subject,prompt\r\na,"line one\nline two\r\n\r\nline three"\r\nb,next\r\n')
    records = load_records(str(path))
    assert [r.prompt for r in records] == ["line one\nline two\r\n\r\nline three", "next"]
    assert records[1].where.endswith("p.csv:6")


def test_a_csv_row_with_more_cells_than_columns_is_refused(tmp_path):
    """What stands behind an unquoted comma would be left out."""
    path = tmp_path / "p.csv"
    path.write_text("prompt,target\nsay one,it is\nOne, two, three, four\n")
    with pytest.raises(ValueError, match=r"p\.csv:3: 4 cells, and the header has 2; put quotes"):
        load_records(str(path))


def test_a_csv_cell_may_be_long(tmp_path):
    path, text = tmp_path / "p.csv", "say one " * 20_000
    path.write_text(f"text\n{text}\n")
    assert load_records(str(path))[0].text.strip() == text.strip()


def test_a_csv_with_an_open_quote_is_refused_not_swallowed(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('prompt\nfirst\n"open\nnext\nlast\n')
    with pytest.raises(ValueError, match="p.csv:3: not CSV: unexpected end of data"):
        load_records(str(path))


def test_a_csv_header_with_a_name_twice_is_refused(tmp_path):
    """Of two columns `prompt` the first would be left out."""
    path = tmp_path / "p.csv"
    path.write_text("prompt,target,prompt,,\nsay one,it is,say two,,\n")
    with pytest.raises(ValueError, match=r"p\.csv:1: the header has 'prompt' twice"):
        load_records(str(path))
    path.write_text("prompt,target,,\nsay one,it is,,\n")  # empty columns of a spreadsheet
    assert load_records(str(path))[0].prompt == "say one"
