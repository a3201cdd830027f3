"""Rows of what `datasets` loads: sets on the hub, folders, slices of their splits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import KINDS, Rows
from .questions import Label

_SPLIT = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
# What `save_to_disk` leaves in a folder.
_SAVED = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Split:
    """A split, or a slice of one: `validation`, `train[:100]`, `test[10%:20%]`."""

    name: str
    start: str | None = None
    stop: str | None = None

    @classmethod
    def of(cls, given: str) -> Split:
        found = _SPLIT.fullmatch(given.replace(" ", ""))
        if not found:
            raise ValueError(
                f"calibration.split '{given}' must be the name of a split, or a slice of one such"
                " as train[:100] or test[10%:20%]"
            )
        return cls(*found.groups())

    def rows(self, length: int) -> range:
        """Of so many rows the numbers of those that are meant."""
        return range(length)[slice(*(_bound(b, length) for b in (self.start, self.stop)))]


def _bound(given: str | None, length: int) -> int | None:
    if given is None:
        return None
    return round(int(given[:-1]) * length / 100) if given.endswith("%") else int(given)


def rows_of_data_set(
    path: str, split: str | None = None, name: str | None = None, streaming: bool = False
) -> Rows:
    """The rows of a split: the one that is named, else `test`, else `train`.

    Args:
        name: the configuration, of a set that has several.
        streaming: read no more than the slice needs.

    Raises:
        ValueError: nothing that can be loaded, or no such split.
    """
    if streaming:
        return _streamed(path, split, name)
    found = _loaded(path, name)
    wanted = Split.of(split or ("test" if "test" in found else "train"))
    if wanted.name not in found:
        raise ValueError(
            f"calibration.split '{wanted.name}' is not in '{path}'; it has {sorted(found)}"
        )
    data = found[wanted.name]
    where = f"{path}[{wanted.name}]"
    return _numbered(where, ((i, data[i]) for i in wanted.rows(len(data))), data)


def _streamed(path: str, split: str | None, name: str | None) -> Rows:
    wanted = Split.of(split or "") if split else None
    stop = wanted.stop if wanted else None
    start = (wanted.start if wanted else None) or "0"
    if wanted is None or stop is None or not (start + stop).isdecimal():
        raise ValueError(
            f"calibration.streaming needs a slice that ends, such as split: train[:1000]; got"
            f" {split!r}"
        )
    data = _loaded(path, name, split=wanted.name, streaming=True)
    rows = enumerate(data.skip(int(start)).take(max(0, int(stop) - int(start))), int(start))
    return _numbered(f"{path}[{wanted.name}]", rows, data)


def _loaded(path: str, name: str | None, **how: Any) -> Any:
    import datasets

    if any((Path(path) / file).is_file() for file in _SAVED):
        if name or how:
            raise ValueError(
                f"calibration.source '{path}' was saved with `save_to_disk`: it has one"
                " configuration and is not streamed; leave `name` and `streaming` out"
            )
        found = datasets.load_from_disk(path)
        return found if isinstance(found, dict) else {"train": found}
    try:
        return datasets.load_dataset(path, name, **how)
    except Exception as error:
        why = " ".join(str(error).split())
        if "Config name is missing" in why or "BuilderConfig" in why:
            raise ValueError(
                f"calibration.source '{path}' has several configurations; say which one,"
                f" calibration.name: {why}"
            ) from error
        raise ValueError(
            f"calibration.source '{path}' is neither `builtin`, a {'/'.join(KINDS)} file nor a"
            f" data set that can be loaded ({type(error).__name__}: {why})"
        ) from error


def _numbered(where: str, rows: Iterator[tuple[int, dict[str, Any]]], data: Any) -> Rows:
    features = getattr(data, "features", None) or {}
    classes = {k: f.names for k, f in features.items() if type(f).__name__ == "ClassLabel"}
    for i, row in rows:
        named = {
            k: Label(row[k], names[row[k]])
            for k, names in classes.items()
            if row[k] is not None and row[k] >= 0
        }
        yield f"{where}[{i}]", row | named
