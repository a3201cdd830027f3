"""Rows of a file as calibration records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .dialogues import Spelling, messages_of, tools_of

# What decides what a record is. A dialogue goes first: others beside it are mostly parts of it.
_READ = {
    "messages": ("messages", "tools", "system", "subject"),
    "question": ("question", "choices", "answer", "subject"),
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
        unread: columns that hold something and are no part of the record.
    """

    where: str
    subject: str = ""
    question: str | None = None
    choices: list[str] | None = None
    answer: int | None = None
    prompt: str | None = None
    target: str | None = None
    text: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    unread: frozenset[str] = frozenset()


def record_of(
    row: dict[str, Any],
    where: str,
    columns: Mapping[str, str] | None = None,
    spelling: Spelling | None = None,
) -> Record:
    """A row of a file as a record; `where` it stands is for messages.

    Args:
        columns: our names to the row's.
        spelling: of the messages of a dialogue.

    Raises:
        ValueError: a faulty row.
    """
    columns = columns or {}
    missing = [c for f, c in columns.items() if row.get(c) is None and f not in OPTIONAL]
    if missing:
        raise ValueError(f"{where}: the columns {missing} are missing or empty")
    stands = {field: field for field in FIELDS}
    if row.get("messages") is None and row.get("conversations") is not None:
        stands["messages"] = "conversations"
    if columns.keys() & _READ.keys():  # what was named, not what happens to be called so
        stands = {f: c for f, c in stands.items() if f not in _READ}
    stands |= columns
    given = {f: row[c] for f, c in stands.items() if row.get(c) is not None}
    kind = next((k for k in _READ if k in given), None)
    if kind is None:
        raise ValueError(
            f"{where}: needs `question`, `choices`, `answer`, or `prompt`, `text` or `messages`; it"
            f" has {sorted(k for k in row if row[k] is not None) or 'nothing'}"
        )
    if "target" in given and kind in ("text", "messages"):
        raise ValueError(f"{where}: `target` is what follows a `prompt`; {_NO_TARGET[kind]}")
    used = {stands[f] for f in _READ[kind] if f in given}
    unread = frozenset(c for c, value in row.items() if value is not None and c not in used)
    subject = str(given.get("subject") or "")
    if kind == "question":
        return Record(where, subject, unread=unread, **_question(given, where))
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
    return Record(where, subject, unread=unread, **{k: given.get(k) for k in _READ[kind][:-1]})


_NO_TARGET = {
    "text": "a `text` is cut at a token of its own. Call the text `prompt`, or leave `target` out",
    "messages": "of `messages` it is what the assistant says last. Leave `target` out",
}


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
