"""The data: a folder of JSON Lines and text files; README.md tells their shapes and sources.

None of their lines is part of this project: `building` makes the folder out of public files.
"""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path

from benchmarks.real import bases

_BESIDE = Path(__file__).parents[3] / "shared" / "real-data"
TEXTS = {
    "wikipedia": "text_wikipedia_en",
    "web": "text_web_c4",
    "news": "text_news_wikinews",
    "fiction": "text_fiction_cranford",
    "code": "text_code_python",
    "german": "text_de_pud",
    "chinese": "text_zh_pud",
    "maths": "text_math_gsm8k",
    "service": "text_dialogue_sgd",
}


def built() -> Path:
    """Where `python -m benchmarks.real data` builds: `LOKI_REAL_DATA`, or beside the bases."""
    return Path(os.environ.get("LOKI_REAL_DATA") or bases.folder() / "data")


def folder() -> Path:
    """Where the data is read: `built()`; beside the checkout where that was never built."""
    given = os.environ.get("LOKI_REAL_DATA")
    return _BESIDE if not given and not built().is_dir() and _BESIDE.is_dir() else built()


class Data:
    """Records and texts of a folder; none: of `folder()`."""

    def __init__(self, place: Path | None = None):
        self.folder = folder() if place is None else Path(place)

    def records(self, name: str) -> list[dict]:
        """The objects of `NAME.jsonl`, in the file's order.

        Raises:
            ValueError: no such file, or a line that is no JSON object.
        """
        lines = self._read(f"{name}.jsonl").split("\n")  # other line breaks may stand in texts
        found = []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{name}.jsonl, line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{name}.jsonl, line {number}: expected an object, got {row!r:.40}"
                )
            found.append(row)
        return found

    def text(self, kind: str) -> str:
        """The whole text of a kind of `TEXTS`."""
        return self._read(f"{TEXTS[kind]}.txt")

    @cached_property
    def kinds(self) -> list[str]:
        """Kinds of text that the folder has."""
        return [k for k, name in TEXTS.items() if (self.folder / f"{name}.txt").is_file()]

    def _read(self, name: str) -> str:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(
                f"'{path}' is missing; `python -m benchmarks.real data --data '{self.folder}'`"
                " makes it out of public files (benchmarks/real/README.md)"
            )
        return path.read_text(encoding="utf-8")
