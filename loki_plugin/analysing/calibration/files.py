"""Rows of local files, each with the file and the line where it stands."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = Iterator[tuple[str, dict[str, Any]]]


def rows_of_file(path: Path) -> Rows:
    """The rows of a file of one of the `KINDS`.

    Raises:
        ValueError: no such file, or one that cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"calibration.source '{path}' does not exist or is not a file")
    read = _READERS[path.suffix.lower()]
    if read is None:
        return _parquet(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Excel begins with a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration.source '{path}' is not UTF-8: {error}") from error
    return read(text, str(path))


def _parquet(path: Path) -> Rows:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"calibration.source '{path}' is not Parquet: {error}") from error
    return ((f"{path}:{i}", row) for i, row in enumerate(rows, 1))


def jsonl(text: str, name: str) -> Rows:
    """A JSON object on each line."""
    for i, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}:{i}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{name}:{i}: expected a JSON object, got {type(row).__name__}")
        yield f"{name}:{i}", row


def _json(text: str, name: str) -> Rows:
    """A list of objects, one object, or, as `datasets` takes them too, an object on each line."""
    decoder, start = json.JSONDecoder(), len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        try:
            row = json.loads(text)
        except ValueError:
            return jsonl(text, name)
        return _objects(iter([(start, row)]), text, name)
    return _objects(_elements(decoder, text, start + 1, name), text, name)


def _elements(
    decoder: json.JSONDecoder, text: str, at: int, name: str
) -> Iterator[tuple[int, Any]]:
    """The elements of a list whose bracket is open, each with where it begins."""
    first = True
    while True:
        at = _behind_spaces(text, at)
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                raise ValueError(f"{name}:{_line(text, at)}: not JSON: text behind the list")
            return
        if not first:
            if text[at : at + 1] != ",":
                raise ValueError(f"{name}:{_line(text, at)}: not JSON: expected `,` or `]`")
            at = _behind_spaces(text, at + 1)
        first = False
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError as error:
            raise ValueError(f"{name}:{_line(text, at)}: not JSON: {error}") from error
        yield at, value
        at = end


def _objects(found: Iterator[tuple[int, Any]], text: str, name: str) -> Rows:
    line, before = 1, 0
    for at, row in found:
        line, before = line + text.count("\n", before, at), at
        if not isinstance(row, dict):
            raise ValueError(f"{name}:{line}: expected a JSON object, got {type(row).__name__}")
        yield f"{name}:{line}", row


def _behind_spaces(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _csv(text: str, name: str) -> Rows:
    # Its own line ends, so that one inside a quoted cell stays; an open quote is a fault.
    csv.field_size_limit(_CELL)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = reader.fieldnames or ()
        twice = sorted({n for n in names if n and names.count(n) > 1})
        if twice:
            raise ValueError(
                f"{name}:1: the header has {', '.join(map(repr, twice))} twice; which column"
                " counts? Rename the other"
            )
        for row in reader:
            if None in row:  # what is behind the last column
                raise ValueError(
                    f"{name}:{reader.line_num}: {len(names) + len(row[None])} cells, and the header"
                    f" has {len(names)}; put quotes around a cell with commas"
                )
            cells = {k: v for k, v in row.items() if v not in (None, "")}
            yield f"{name}:{reader.line_num}", cells
    except csv.Error as error:
        start = reader.line_num + 1  # of the record that cannot be read
        raise ValueError(f"{name}:{start}: not CSV: {error}") from error


def _txt(text: str, name: str) -> Rows:
    block: list[str] = []
    start = 1
    for i, line in enumerate([*_lines(text), ""], 1):
        if line.strip():
            start = start if block else i
            block.append(line)
        elif block:
            yield f"{name}:{start}", {"text": "\n".join(block)}
            block = []


def _lines(text: str) -> list[str]:
    """Cut at line ends only: `str.splitlines` also cuts at U+2028 and others, which are text."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


_CELL = 1 << 30  # characters; Python's own limit is that of a short text
_READERS: dict[str, Callable[[str, str], Rows] | None] = {
    ".jsonl": jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _txt,
    ".parquet": None,
}
KINDS = tuple(_READERS)
