"""The model card, `README.md`: our section of it, and the fields that the hub reads.

PEFT and trainers write cards of their own into the same file. Ours stands between two marks, and
is replaced where it is written again; all else keeps its text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..model.writing import write_text

FILE_NAME = "README.md"
START, END = "<!-- loki: start -->", "<!-- loki: end -->"
_SECTION = re.compile(f"\n*{re.escape(START)}.*?{re.escape(END)}\n*", re.DOTALL)
_FIELDS = re.compile(r"\A\s*---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)", re.DOTALL)


def put(folder: Path, section: str, fields: dict[str, Any]) -> Path:
    """Write our section into the card of a folder, which need not have one.

    Args:
        section: Markdown.
        fields: for the hub; those that the card has already stay as they are, but that `tags` are
            added to its own.

    Raises:
        ValueError: the card begins with something that is no YAML.
    """
    path = folder / FILE_NAME
    text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    found = _FIELDS.match(text)
    body = _without(text[found.end() :] if found else text)
    try:
        kept = (yaml.safe_load(found[1] or "") if found else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"the fields at the top of '{path}' are no YAML ({error})") from error
    if not isinstance(kept, dict):
        raise ValueError(f"the fields at the top of '{path}' are no mapping; remove the file")
    tags = kept.get("tags") or []
    tags = list(tags) if isinstance(tags, list) else [tags]
    tags += [tag for tag in fields.get("tags", ()) if tag not in tags]
    merged = {**fields, **kept, "tags": tags}
    head = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)
    before = f"{body.strip()}\n\n" if body.strip() else ""
    write_text(path, f"---\n{head}---\n\n{before}{START}\n\n{section.strip()}\n\n{END}\n")
    return path


def withdraw(folder: Path) -> None:
    """Take our section away: it is about an adapter that is overwritten now."""
    path = folder / FILE_NAME
    if path.is_file() and START in (text := path.read_text(encoding="utf-8")):
        write_text(path, _without(text).rstrip() + "\n")


def _without(text: str) -> str:
    return _SECTION.sub("\n\n", text)
