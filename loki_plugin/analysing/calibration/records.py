"""Rows of a file as calibration records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .dialogues import Spelling, messages_of, tools_of
from .questions import FORMS, Label, from_zero, question_of

Columns = Mapping[str, str | list[str]]

# What decides what a record is. A dialogue goes first: others beside it are mostly parts of it.
_READ = {
    "messages": ("messages", "tools", "system", "subject"),
    "question": ("question", "context", "choices", "answer", "subject"),
    "prompt": ("prompt", "target", "subject"),
    "text": ("text", "subject"),
}
FIELDS = tuple(dict.fromkeys(field for fields in _READ.values() for field in fields))
# A column named for one of these may be empty in a row.
OPTIONAL = ("tools", "system")
_SEEN_OR_HEARD = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True, eq=False)
class Record:
    """A question with choices and answer, a prompt (and target), a raw text, or a dialogue.

    Attributes:
        where: the file and the line, for messages.
        messages: of a dialogue, as `messages_of` gives them.
        tools: the functions that a dialogue may call.
        counted: whether `answer` is a number of which only a whole file says from where it counts.
        unread: columns that hold something and are no part of the record.
    """

    where: str
    subject: str = ""
    question: str | None = None
    choices: list[str] | None = None
    answer: int | None = None
    counted: bool = False
    prompt: str | None = None
    target: str | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    unread: frozenset[str] = frozenset()


def record_of(
    row: dict[str, Any],
    where: str,
    columns: Columns | None = None,
    spelling: Spelling | None = None,
) -> Record:
    """A row of a file as a record; `where` it stands is for messages.

    Args:
        columns: our names to the row's; several columns may hold the `choices`.
        spelling: of the messages of a dialogue.

    Raises:
        ValueError: a faulty row.
    """
    columns = columns or {}
    missing = [c for f, column in columns.items() if f not in OPTIONAL for c in _empty(row, column)]
    if missing:
        raise ValueError(f"{where}: the columns {missing} are missing or empty")
    stands = _stands(row, columns)
    given = {f: _value(row, column) for f, column in stands.items() if not _empty(row, column)}
    kind = next((k for k in _READ if k in given), None)
    if kind is None:
        raise ValueError(
            f"{where}: needs `question`, `choices`, `answer`, or `prompt`, `text` or `messages`; it"
            f" has {sorted(k for k in row if row[k] is not None) or 'nothing'}"
        )
    if "target" in given and kind in ("text", "messages"):
        raise ValueError(f"{where}: `target` is what follows a `prompt`; {_NO_TARGET[kind]}")
    used = {column for f in _READ[kind] if f in given for column in _names(stands[f])}
    unread = frozenset(c for c, value in row.items() if value is not None and c not in used)
    subject = given.get("subject", "")
    subject = subject.name if isinstance(subject, Label) else str(subject)
    if kind == "question":
        found: dict[str, Any] = vars(question_of(given, where))
        return Record(where, subject, unread=unread, **found)
    if kind == "messages":
        for column in _SEEN_OR_HEARD:
            if row.get(column):
                raise ValueError(
                    f"{where}: the dialogue has `{column}`, and only text can be read; take a data"
                    " set of text, or leave the record out"
                )
        messages = messages_of(given["messages"], where, spelling, given.get("system"))
        tools = tools_of(given["tools"], where) if "tools" in given else None
        return Record(where, subject, messages=messages, tools=tools, unread=unread)
    for field in ("target", kind):
        value = given.get(field)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            if field == "target" and isinstance(value, str) and value:
                continue  # a space is a token
            hint = "; a dialogue is called `messages`" if isinstance(value, list) else ""
            raise ValueError(f"{where}: `{field}` must be a text, got {value!r}{hint}")
    rest: dict[str, Any] = {field: given.get(field) for field in _READ[kind] if field != "subject"}
    return Record(where, subject, unread=unread, **rest)


_NO_TARGET = {
    "text": "a `text` is cut at a token of its own. Call the text `prompt`, or leave `target` out",
    "messages": "of `messages` it is what the assistant says last. Leave `target` out",
}


def settled(records: Sequence[Record]) -> list[Record]:
    """Records of one file, with all answers counted from 0.

    Raises:
        ValueError: it cannot be told from where they count.
    """
    numbers = [(r.where, r.answer or 0, len(r.choices or [])) for r in records if r.counted]
    first = 0 if from_zero(numbers) else 1
    return [
        replace(r, answer=(r.answer or 0) - first, counted=False) if r.counted else r
        for r in records
    ]


def _stands(row: Mapping[str, Any], columns: Columns) -> dict[str, str | list[str]]:
    """Where each of our fields stands in a row."""
    stands: dict[str, str | list[str]] = {field: field for field in FIELDS}
    if row.get("messages") is None and row.get("conversations") is not None:
        stands["messages"] = "conversations"
    if columns.keys() & _READ.keys():  # what was named, not what happens to be called so
        stands = {f: c for f, c in stands.items() if f not in _READ}
    else:
        fits = (form for form in FORMS if not any(_empty(row, c) for c in form.values()))
        stands |= next(fits, {})
        if stands["choices"] == "options" and row.get("subject") is None:
            stands["subject"] = "category"  # of MMLU-Pro
    return stands | dict(columns)


def _names(column: str | list[str]) -> list[str]:
    return [column] if isinstance(column, str) else column


def _empty(row: Mapping[str, Any], column: str | list[str]) -> list[str]:
    return [c for c in _names(column) if row.get(c) is None]


def _value(row: Mapping[str, Any], column: str | list[str]) -> Any:
    return row[column] if isinstance(column, str) else [row[c] for c in column]
