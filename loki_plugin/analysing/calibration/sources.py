"""Where calibration records come from, read and checked before any long work."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from ...choices import SOURCE
from .data_sets import Split, rows_of_data_set
from .dialogues import Spelling
from .files import KINDS, Rows, jsonl, rows_of_file
from .records import FIELDS, OPTIONAL, Columns, Record, record_of, settled

__all__ = ["FIELDS", "Record", "load_records", "record_of"]
LOG = logging.getLogger("loki_plugin")
MMLU = ("cais/mmlu", "all")


def load_records(
    source: str,
    columns: Columns | None = None,
    split: str | None = None,
    name: str | None = None,
    streaming: bool = False,
    field_messages: str | None = None,
    field_tools: str | None = None,
    message_property_mappings: Mapping[str, str] | None = None,
    roles: Mapping[str, list[str]] | None = None,
) -> list[Record]:
    """Read `builtin`, `mmlu`, a file of `KINDS`, or a folder or a hub path for `datasets`.

    A .txt file is cut into texts at blank lines. Columns that are not read are told.

    Args:
        columns: our names to the source's.
        split, name, streaming: see `rows_of_data_set`.
        field_messages, field_tools: `columns` of a dialogue, as Axolotl spells them.
        message_property_mappings, roles: see `Spelling`.

    Raises:
        ValueError: an unreadable source, an unknown column, or a faulty record, named by file and
            line.
    """
    columns = _columns(columns, messages=field_messages, tools=field_tools)
    spelling = Spelling(message_property_mappings, roles)
    rows = _rows(source, split, name, streaming)
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


def _rows(source: str, split: str | None, name: str | None, streaming: bool) -> Rows:
    if source == "mmlu":
        return rows_of_data_set(MMLU[0], split, name or MMLU[1], streaming)
    local = source == SOURCE or Path(source).suffix.lower() in KINDS
    if not local and Path(source).is_file():
        raise ValueError(
            f"calibration.source '{source}' is a file of a kind that is not read; read are"
            f" {', '.join(KINDS)}"
        )
    if not local:
        return rows_of_data_set(source, split, name, streaming)
    if name or streaming:
        raise ValueError(
            f"calibration.source '{source}' is one file; leave `name` and `streaming` out"
        )
    if source == SOURCE:
        file = resources.files("loki_plugin.analysing.calibration") / "data" / "builtin.jsonl"
        rows = jsonl(file.read_text(encoding="utf-8"), "builtin.jsonl")
    else:
        rows = rows_of_file(Path(source))
    if not split:
        return rows
    part, every = Split.of(split), list(rows)
    if part.name != "train":
        raise ValueError(
            f"calibration.split '{split}': a file has one split, which `datasets` calls train; take"
            " train[:100], say, or leave `split` out"
        )
    return iter([every[i] for i in part.rows(len(every))])


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
