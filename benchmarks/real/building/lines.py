"""JSON Lines read and written; a recipe takes `Texts` and returns the text of a file."""

from __future__ import annotations

import json

Texts = dict[str, str]  # of the files that a recipe needs, by their paths, in `sources.py`'s order


def read(text: str) -> list[dict]:
    """The objects of JSON Lines; other line breaks than "\\n" may stand in their texts."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def write(rows: list[dict]) -> str:
    """JSON Lines of objects, letters of all languages as they are."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
