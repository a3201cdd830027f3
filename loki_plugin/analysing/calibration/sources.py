"""Where calibration records come from, read and checked before any long work."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

from ...choices import SOURCE
from .dialogues import Spelling
from .records import FIELDS, OPTIONAL, Columns, Record, record_of, settled

__all__ = ["FIELDS", "Record", "load_records", "record_of"]
LOG = logging.getLogger("loki_plugin")
MMLU = ("cais/mmlu", "all")


def load_records(
    source: str,
    columns: Columns | None = None,
    split: str | None = None,
    field_messages: str | None = None,
    field_tools: str | None = None,
    message_property_mappings: Mapping[str, str] | None = None,
    roles: Mapping[str, list[str]] | None = None,
) -> list[Record]:
    """Read `builtin`, `mmlu`, a .jsonl/.csv/.parquet/.txt file, or any `datasets` path.

    A .txt file is cut into texts at blank lines. Columns that are not read are told.

    Args:
        columns: our names to the source's.
        field_messages, field_tools: `columns` of a dialogue, as Axolotl spells them.
        message_property_mappings, roles: see `Spelling`.

    Raises:
        ValueError: an unreadable source, an unknown column, or a faulty record, named by file and
            line.
    """
    columns = _columns(columns, messages=field_messages, tools=field_tools)
    spelling = Spelling(message_property_mappings, roles)
    if source == SOURCE:
        file = resources.files("loki_plugin.analysing.calibration") / "data" / "builtin.jsonl"
        rows = _jsonl(file.read_text(encoding="utf-8"), "builtin.jsonl")
    elif Path(source).suffix.lower() in _READERS:
        rows = _read_file(Path(source))
    else:
        rows = _hub(source, split)
    records, filled = [], set()
    for where, row in rows:
        records.append(record_of(row, where, columns, spelling))
        filled |= {column for column, value in row.items() if value is not None}
    if not records:
        raise ValueError(f"calibration source '{source}' is empty; it needs at least one record")
    records = settled(records)
    gone = [c for f, c in columns.items() if f in OPTIONAL and c not in filled]
    if gone:
        raise ValueError(f"calibration source '{source}': no record has the columns {gone}")
    unread = sorted(frozenset().union(*(r.unread for r in records)))
    if unread:
        LOG.info("loki: columns of '%s' that are not read: %s", source, ", ".join(unread))
    return records


def _columns(given: Columns | None, **spelled: str | None) -> dict[str, str | list[str]]:
    """`columns`, and what Axolotl's names say of them."""
    columns = dict(given or {})
    unknown = sorted(columns.keys() - set(FIELDS))
    if unknown:
        raise ValueError(
            f"calibration.columns names unknown fields {unknown}; known: {', '.join(FIELDS)}"
        )
    several = [f for f, column in columns.items() if not isinstance(column, str)]
    if several not in ([], ["choices"]):
        raise ValueError(
            f"calibration.columns names several columns for {several}, and only `choices` may stand"
            " in several"
        )
    for field, column in spelled.items():
        if column is not None and columns.setdefault(field, column) != column:
            raise ValueError(
                f"calibration.field_{field} is '{column}' and calibration.columns says"
                f" {field}: {columns[field]}; give one of them"
            )
    return columns


def _read_file(path: Path) -> Iterator[tuple[str, dict]]:
    if not path.is_file():
        raise ValueError(f"calibration.source '{path}' does not exist or is not a file")
    read = _READERS[path.suffix.lower()]
    if read is None:
        import pyarrow.parquet as parquet

        return ((f"{path}:{i + 1}", r) for i, r in enumerate(parquet.read_table(path).to_pylist()))
    try:
        text = path.read_bytes().decode("utf-8-sig")  # Excel begins with a byte-order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration.source '{path}' is not UTF-8: {error}") from error
    return read(text, str(path))


def _jsonl(text: str, name: str) -> Iterator[tuple[str, dict]]:
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


def _csv(text: str, name: str) -> Iterator[tuple[str, dict]]:
    # Its own line ends, so that one inside a quoted cell stays; an open quote is a fault.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            cells = {k: v for k, v in row.items() if k is not None and v not in (None, "")}
            yield f"{name}:{reader.line_num}", cells
    except csv.Error as error:
        start = reader.line_num + 1  # of the record that cannot be read
        raise ValueError(f"{name}:{start}: not CSV: {error}") from error


def _txt(text: str, name: str) -> Iterator[tuple[str, dict]]:
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


def _hub(source: str, split: str | None) -> Iterator[tuple[str, dict]]:
    import datasets

    path, name = MMLU if source == "mmlu" else (source, None)
    try:
        found = datasets.load_dataset(path, name)
    except Exception as error:
        raise ValueError(
            f"calibration.source '{source}' is neither `builtin`, a {'/'.join(_READERS)} file nor a"
            f" data set that can be loaded ({type(error).__name__}: {error})"
        ) from error
    wanted = split or ("test" if "test" in found else "train")
    if wanted not in found:
        raise ValueError(f"calibration.split '{wanted}' is not in '{path}'; it has {sorted(found)}")
    return ((f"{path}[{wanted}][{i}]", row) for i, row in enumerate(found[wanted]))


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt, ".parquet": None}
