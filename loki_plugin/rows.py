"""The hand-over between selecting and implanting: which rows train, in one small JSON file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import InvalidOperation
from numbers import Integral
from pathlib import Path
from typing import Any, TypedDict, cast

import torch

from .choices import plain_number
from .model.anatomy import Anatomy, find_anatomy
from .model.fingerprint import difference
from .model.writing import write_text

FILE_NAME = "loki_rows.json"
FORMAT = "loki_rows"
VERSION = 1


class Made(TypedDict, total=False):
    """How scores and rows were made, for the record; nothing is computed from it."""

    quota: int | float  # percent
    strategy: str
    magnitude: bool
    exclude: list[str]
    seed: int
    attribution: dict[str, Any]
    calibration: dict[str, Any]
    analysis: str
    convergence_error: float | None
    analysis_seconds: float
    prompts_analysed: int  # in this run; the cache had the others
    scores: str  # of `loki select`
    source: str  # of rows that were not selected here
    parts: list[Made]  # of rows that are the union of several files
    merge: dict[str, Any]  # of the rows file beside a merged model
    export: dict[str, Any]  # of the rows file beside an adapter of a smaller rank


@dataclass(frozen=True)
class RowSelection:
    """For each of L layers the sorted indices of the rows of the down-projection that train.

    Attributes:
        rows: L LongTensors of sorted distinct indices in [0, H); a layer may be empty.
        hidden_size: H, or None when it is not known (the bare list form without a model).
        fingerprint: of the model the rows were selected on, or None (bare list form).
        made: how the scores and the selection were made.
        linears: names of further linear modules, besides the down-projections, that train whole.

    Raises:
        ValueError: an index out of range or a duplicate (layer and index named), or nothing that
            trains.
    """

    rows: Sequence[torch.Tensor]  # anything that gives integers is taken
    hidden_size: int | None = None
    fingerprint: dict[str, str] | None = None
    made: Made = field(default_factory=Made)
    linears: Sequence[str] = ()

    def __post_init__(self):
        rows = [_checked(layer, i, self.hidden_size) for i, layer in enumerate(self.rows)]
        if not any(len(r) for r in rows) and not self.linears:
            raise ValueError(
                f"a row selection needs at least one row, got {len(rows)} layers with none"
            )
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "linears", tuple(self.linears))

    @property
    def num_layers(self) -> int:
        return len(self.rows)

    @property
    def counts(self) -> list[int]:
        """Rows per layer, L integers."""
        return [len(r) for r in self.rows]

    def __eq__(self, other):
        return (
            isinstance(other, RowSelection)
            and self.num_layers == other.num_layers
            and sorted(self.linears) == sorted(other.linears)
            and all(torch.equal(a, b) for a, b in zip(self.rows, other.rows, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def save(self, path: str | os.PathLike) -> Path:
        """Write the file atomically, so that a reader never sees half of it."""
        path = Path(path)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "fingerprint": self.fingerprint,
            "made": self.made,
            "rows": [r.tolist() for r in self.rows],
        }
        if self.linears:
            content["linears"] = list(self.linears)
        write_text(path, json.dumps(content))
        return path

    def save_positions(self, path: str | os.PathLike) -> Path:
        """Write the authors' position file: a bare JSON list of L lists of row indices."""
        path = Path(path)
        content = json.dumps([r.tolist() for r in self.rows])
        write_text(path, content + "\n")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> RowSelection:
        """Read a rows file: ours, or the bare list of lists that the LoKI authors publish.

        Raises:
            ValueError: missing file, not JSON, wrong form, or a failed check of the rows.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"rows file '{path}' cannot be read ({error.strerror}); `loki.rows` takes a"
                f" {FILE_NAME}, or leave it out to run the analysis"
            ) from error
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise ValueError(f"rows file '{path}' is not JSON: {error}") from error
        try:
            return cls._from_json(content)
        except ValueError as error:
            raise ValueError(f"rows file '{path}': {error}") from error

    @classmethod
    def _from_json(cls, content: Any) -> RowSelection:
        if isinstance(content, list):
            return cls(rows=content, made={"source": "bare list of lists"})
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(
                f'expected an object with "format": "{FORMAT}" or a list of lists of integers,'
                f" got {_short(content)}"
            )
        if content.get("version") != VERSION:
            raise ValueError(
                f"format version {content.get('version')!r}, this package reads {VERSION};"
                " update loki_plugin or make the file again"
            )
        missing = [k for k in ("rows", "num_layers", "hidden_size") if k not in content]
        if missing:
            raise ValueError(f"the fields {missing} are missing; make the file again")
        if not isinstance(content["rows"], list):
            raise ValueError(f"`rows` must be a list of lists, got {_short(content['rows'])}")
        if len(content["rows"]) != content["num_layers"]:
            raise ValueError(
                f"`rows` has {len(content['rows'])} layers but num_layers is"
                f" {content['num_layers']}; the file is damaged, make it again"
            )
        hidden, mark, made = (content.get(k) for k in ("hidden_size", "fingerprint", "made"))
        if hidden is not None and type(hidden) is not int:
            raise ValueError(f"hidden_size must be an integer, got {_short(hidden)}")
        for key, value in (("fingerprint", mark), ("made", made)):
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"`{key}` must be an object, got {_short(value)}")
        linears = content.get("linears", [])
        if not isinstance(linears, list) or not all(isinstance(name, str) for name in linears):
            raise ValueError(f"`linears` must be a list of module names, got {_short(linears)}")
        return cls(content["rows"], hidden, mark, _made(made or {}), linears)

    def check(self, model: torch.nn.Module) -> RowSelection:
        """Check that the rows belong to `model`; returns the selection with `hidden_size` known.

        Raises:
            ValueError: another layer count or hidden size, an index out of range, or another
                model by fingerprint.
        """
        selection = self.check_shape(find_anatomy(model))
        if self.fingerprint is not None:
            found = difference(self.fingerprint, model)
            if found:
                raise ValueError(
                    f"rows file was made for another model: {found}. Leave `loki.rows` out"
                    " to run the analysis on this one, or, if you mean to carry the rows over,"
                    " pass them as a bare list of lists"
                )
        return selection

    def check_shape(self, anatomy: Anatomy) -> RowSelection:
        """Check sizes and indices only; the rows of an earlier fine-tune need no more."""
        layers, hidden = anatomy.num_layers, anatomy.hidden_size
        if self.num_layers:
            anatomy.check_rows()
        if self.num_layers != layers or self.hidden_size not in (None, hidden):
            raise ValueError(
                f"rows file was made for {self.num_layers} layers x"
                f" {self.hidden_size or 'unknown'} rows, this model has {layers} x {hidden};"
                " use the file of this model, or leave `loki.rows` out to run the analysis for it"
            )
        return replace(self, hidden_size=hidden)


def common_rows(one: RowSelection, other: RowSelection) -> list[list[int]]:
    """Per layer, the rows that both select.

    Raises:
        ValueError: they have different numbers of layers.
    """
    if one.num_layers != other.num_layers:
        raise ValueError(
            f"rows for {one.num_layers} and for {other.num_layers} layers belong to different"
            " models"
        )
    pairs = zip(one.rows, other.rows, strict=True)
    return [sorted({*a.tolist()} & {*b.tolist()}) for a, b in pairs]


def union(selections: Sequence[RowSelection]) -> RowSelection:
    """Every row that one of them selects; how each was made is kept as `made["parts"]`.

    Raises:
        ValueError: no selection, or such for models of different shapes.
    """
    if not selections:
        raise ValueError("no rows file is given; give at least one")
    if len(selections) == 1:
        return selections[0]
    layers = {s.num_layers for s in selections}
    sizes = {s.hidden_size for s in selections if s.hidden_size is not None}
    if len(layers) > 1 or len(sizes) > 1:
        raise ValueError(
            f"these rows files belong to different models: they are for {sorted(layers)} layers of"
            f" {sorted(sizes)} rows"
        )
    rows = [
        torch.cat(layers).unique() for layers in zip(*(s.rows for s in selections), strict=True)
    ]
    # One that was made on an unquantised base says most about it.
    marks = sorted((s.fingerprint for s in selections if s.fingerprint), key=_is_quantised)
    made = Made(parts=[s.made for s in selections])
    linears = dict.fromkeys(name for s in selections for name in s.linears)
    mark = marks[0] if marks else None
    return RowSelection(rows, max(sizes, default=None), mark, made, tuple(linears))


def _is_quantised(fingerprint: dict[str, str]) -> bool:
    return not fingerprint.get("quantisation", "").startswith("none")


def _made(content: dict[str, Any]) -> Made:
    quota = content.get("quota")
    if isinstance(quota, str):  # `loki select` of version 0.1.1
        try:
            content = content | {"quota": plain_number(quota)}
        except (InvalidOperation, ValueError, OverflowError) as error:  # "ten", "nan", "inf"
            raise ValueError(
                f"`made.quota` must be a number of percent, got {_short(quota)}"
            ) from error
    return cast(Made, content)


def _checked(layer: Any, i: int, hidden_size: int | None) -> torch.Tensor:
    if isinstance(layer, torch.Tensor):
        layer = layer.tolist()
    if not isinstance(layer, Iterable) or isinstance(layer, str | bytes | dict):
        raise ValueError(f"layer {i}: expected a list of row indices, got {_short(layer)}")
    values = list(layer)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's are among these
            raise ValueError(f"layer {i}: row index {value!r} is not an integer")
        if int(value) < 0 or (hidden_size is not None and int(value) >= hidden_size):
            limit = "the hidden size" if hidden_size is None else hidden_size
            raise ValueError(f"layer {i}: row index {value} is outside [0, {limit})")
    ordered = sorted(values)
    for a, b in zip(ordered, ordered[1:], strict=False):
        if a == b:
            raise ValueError(f"layer {i}: row {a} is listed twice")
    return torch.tensor(ordered, dtype=torch.long)


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
