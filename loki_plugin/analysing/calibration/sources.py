"""Where calibration records come from, read and checked before any long work."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ...choices import SOURCE

FIELDS = ("subject", "question", "choices", "answer", "prompt", "target", "text", "messages")
MMLU = ("cais/mmlu", "all")


@dataclass(frozen=True, eq=False)
class Record:
    """A question with choices and answer, a prompt (and target), a raw text, or a dialogue."""

    where: str
    subject: str = ""
    question: str | None = None
    choices: list[str] | None = None
    answer: int | None = None
    prompt: str | None = None
    target: str | None = None
    text: str | None = None
    messages: list[tuple[str, str]] | None = None  # (role, content)


def load_records(
    source: str, columns: dict[str, str] | None = None, split: str | None = None
) -> list[Record]:
    """Read `builtin`, `mmlu`, a .jsonl/.csv/.parquet/.txt file, or any `datasets` path.

    `columns` maps our field names to the source's columns. A .txt file is cut into texts at blank
    lines.

    Raises:
        ValueError: an unreadable source, an unknown column, or a faulty record, named by file and
            line.
    """
    unknown = sorted(set(columns or {}) - set(FIELDS))
    if unknown:
        raise ValueError(
            f"calibration.columns names unknown fields {unknown}; known: {', '.join(FIELDS)}"
        )
    if source == SOURCE:
        file = resources.files("loki_plugin.analysing.calibration") / "data" / "builtin.jsonl"
        rows = _jsonl(file.read_text(encoding="utf-8"), "builtin.jsonl")
    elif Path(source).suffix.lower() in _READERS:
        rows = _read_file(Path(source))
    else:
        rows = _hub(source, split)
    records = [record_of(row, where, columns) for where, row in rows]
    if not records:
        raise ValueError(f"calibration source '{source}' is empty; it needs at least one record")
    return records


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


_KINDS = ("question", "prompt", "text", "messages")  # fields that decide what a record is


def record_of(row: dict[str, Any], where: str, columns: dict[str, str] | None = None) -> Record:
    """A row of a file as a record; `where` it stands is for messages.

    Raises:
        ValueError: a faulty row.
    """
    own, columns = dict(row), columns or {}
    if any(kind in columns for kind in _KINDS):  # what was named, not what happens to be called so
        own = {k: v for k, v in row.items() if k not in _KINDS}
    row = {**own, **{field: row.get(column) for field, column in columns.items()}}
    missing = [c for f, c in columns.items() if row.get(f) is None]
    if missing:
        raise ValueError(f"{where}: the columns {missing} are missing or empty")
    subject = str(row.get("subject") or "")
    if row.get("question") is not None:
        return Record(where, subject, **_question(row, where))
    for key in ("prompt", "text"):
        if row.get(key) is not None:
            if not isinstance(row[key], str) or not row[key].strip():
                raise ValueError(f"{where}: `{key}` must be a text, got {row[key]!r}")
            target = row.get("target")
            if target is not None and (not isinstance(target, str) or not target):
                raise ValueError(f"{where}: `target` must be a text, got {target!r}")
            if target is not None and key == "text":
                raise ValueError(
                    f"{where}: `target` is what follows a `prompt`; a `text` is cut at a token of"
                    " its own. Call the text `prompt`, or leave `target` out"
                )
            return Record(where, subject, target=target, **{key: row[key]})
    if row.get("messages") is not None:
        if row.get("target") is not None:
            raise ValueError(
                f"{where}: `target` is what follows a `prompt`; of `messages` it is what the"
                " assistant says last. Leave `target` out"
            )
        return Record(where, subject, messages=_messages(row["messages"], where))
    raise ValueError(
        f"{where}: needs `question`, `choices`, `answer`, or `prompt`, `text` or `messages`; it has"
        f" {sorted(k for k in row if row[k] is not None) or 'nothing'}"
    )


def _question(row: dict[str, Any], where: str) -> dict[str, Any]:
    missing = [key for key in ("choices", "answer") if row.get(key) is None]
    if missing:
        raise ValueError(f"{where}: missing field{'s' * (len(missing) > 1)} {', '.join(missing)}")
    question, choices, answer = row["question"], row["choices"], row["answer"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: `question` must be a text, got {question!r}")
    if isinstance(choices, str):  # as a CSV cell holds them
        try:
            choices = json.loads(choices)
        except ValueError as error:
            raise ValueError(
                f"{where}: `choices` must be a JSON list of four texts, got {choices!r}"
            ) from error
    if not isinstance(choices, list | tuple) or len(choices) != 4:
        count = len(choices) if isinstance(choices, list | tuple) else repr(choices)
        raise ValueError(f"{where}: `choices` must be four texts, got {count}")
    if any(isinstance(c, bool) or not isinstance(c, str | int | float) for c in choices):
        raise ValueError(f"{where}: `choices` must be four texts, got {choices!r}")
    if isinstance(answer, str) and answer.strip().upper() in tuple("ABCD"):
        answer = "ABCD".index(answer.strip().upper())
    elif isinstance(answer, str) and answer in tuple("0123"):
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer <= 3:
        raise ValueError(f"{where}: `answer` must be 0-3 or A-D, got {row['answer']!r}")
    return {"question": question, "choices": [str(c) for c in choices], "answer": answer}


def _messages(given: Any, where: str) -> list[tuple[str, str]]:
    found = []
    for message in given if isinstance(given, list | tuple) else [given]:
        role, content = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (0, 0)
        )
        if role not in _ROLES or not isinstance(content, str):
            raise ValueError(
                f"{where}: `messages` must be a list of {{'role': {' | '.join(_ROLES)}, 'content':"
                f" text}}, got {message!r}"
            )
        found.append((role, content))
    if not any(role == "user" and content.strip() for role, content in found):
        raise ValueError(f"{where}: `messages` holds nothing that a user says")
    return found


_ROLES = ("system", "user", "assistant")
_READERS = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt, ".parquet": None}
