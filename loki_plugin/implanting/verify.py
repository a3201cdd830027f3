"""The proof: which tensors and rows of two checkpoints differ, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..rows import RowSelection
from .checkpoint import INDEX, SINGLE, Base, Checkpoint, Stored, open_checkpoint, tensors
from .identity import check_base
from .overriding import idle_overrides, what_counts

_CHUNK = 64 << 20


@dataclass
class VerifyReport:
    """What differs between two checkpoints.

    Attributes:
        compared: number of tensors in both.
        faults: one sentence for each difference that no selected row explains.
        changed_rows: per layer, how many selected rows differ.
        selected_rows: per layer, how many rows the file selects.
        base: which base was seen, and what of it was compared with the rows file.
        new_rows: per embedding that grew, how many tokens it has more than the base.
        linears: how many further linears the file lets change, and how many of them differ.
    """

    compared: int = 0
    faults: list[str] = field(default_factory=list)
    changed_rows: list[int] = field(default_factory=list)
    selected_rows: list[int] = field(default_factory=list)
    base: str = ""
    new_rows: dict[str, int] = field(default_factory=dict)
    linears: tuple[int, int] = (0, 0)

    @property
    def ok(self) -> bool:
        return not self.faults

    def text(self) -> str:
        changed, selected = sum(self.changed_rows), sum(self.selected_rows)
        lines = [
            f"base: {self.base}",
            f"{self.compared} tensors compared byte by byte, and the configuration",
            f"{changed} of {selected} selected rows changed, in"
            f" {sum(c > 0 for c in self.changed_rows)} of {len(self.changed_rows)} layers",
        ]
        where = "the selected rows"
        if self.linears[0]:
            lines.append(f"{self.linears[1]} of {self.linears[0]} targeted linears changed")
            where += " and the targeted linears"
        for key, count in self.new_rows.items():
            lines.append(f"{key} has {count} new rows, of added tokens, behind the base's own")
        if self.ok:
            more = " but for the new tokens" if self.new_rows else ""
            lines.append(f"OK: nothing outside {where} has changed{more}")
        else:
            lines += [f"  {fault}" for fault in self.faults[:20]]
            if len(self.faults) > 20:
                lines.append(f"  ... and {len(self.faults) - 20} more")
            lines.append(f"FAILED: {len(self.faults)} differences outside {where}")
        return "\n".join(lines)


def verify(
    base: str | Path | Base, tuned: str | Path, selection: RowSelection, progress: bool = True
) -> VerifyReport:
    """Compare two checkpoints in bounded memory; `.ok` only if all changes lie in the selection.

    Embeddings may have more rows than the base's; the base's own must be as they were.

    Raises:
        ValueError: a folder without safetensors weights, or rows for another shape of model.
    """
    base = Base.of(base)
    found = open_as_trained(base, selection)
    anatomy, before, after = found.anatomy, found.stored, tensors(Path(tuned))
    selection = selection.check_shape(anatomy)
    layer_of = {key: i for i, key in enumerate(found.down)}
    linears = {found.linear(name)[0] for name in selection.linears}
    changed_linears = 0
    vocabulary = {key for part in found.vocabulary for key in part.keys}
    report = VerifyReport(changed_rows=[0] * anatomy.num_layers, selected_rows=selection.counts)
    _see_base(report, base, found, selection, progress)
    if all((Path(tuned) / name).is_file() for name in (SINGLE, INDEX)):
        report.faults.append(
            f"'{tuned}' holds both {SINGLE} and {INDEX}, and loaders differ in which they read;"
            " remove one of the two"
        )
    report.faults += [f"{k} is missing in the tuned model" for k in sorted(before.keys() - after)]
    report.faults += [f"{k} is not in the base model" for k in sorted(after.keys() - before)]
    both = [k for k in before if k in after]
    for key in tqdm(both, desc="loki: verifying", unit="tensor", disable=not progress):
        report.compared += 1
        a, b = before[key], after[key]
        if key in vocabulary and _grown(a, b):
            report.new_rows[key] = b.shape[0] - a.shape[0]
            b = replace(b, shape=a.shape, size=a.size)  # the base's tokens come first
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            report.faults.append(
                f"{key} is {b.dtype} {list(b.shape)}, in the base {a.dtype} {list(a.shape)}"
            )
        elif key in layer_of:
            i = layer_of[key]
            changed = _changed_rows(a, b, anatomy.row_dims[i])
            inside = np.isin(changed, selection.rows[i].numpy())
            report.changed_rows[i] = int(inside.sum())
            if not inside.all():
                outside = changed[~inside]
                report.faults.append(
                    f"{key}: {len(outside)} rows outside the selection changed, such as row"
                    f" {outside[0]}"
                )
        elif _differs(a, b):
            changed_linears += key in linears
            if key not in linears:
                report.faults.append(f"{key} changed")
    report.linears = (len(linears), changed_linears)
    trained = replace(base, overrides=_overrides(base, selection))
    _compare_configurations(report, trained, found, Path(tuned))
    return report


def open_as_trained(base: Base, selection: RowSelection) -> Checkpoint:
    """The base, under the overrides that the rows file beside a merged model names."""
    trained = replace(base, overrides=_overrides(base, selection))
    return open_checkpoint(trained, selection.fingerprint)


def _overrides(base: Base, selection: RowSelection) -> dict[str, Any]:
    return base.overrides or (selection.made.get("merge") or {}).get("overrides") or {}


def _see_base(
    report: VerifyReport, base: Base, found: Checkpoint, selection: RowSelection, progress: bool
) -> None:
    seen = str(base.name) + (f" at {base.revision}" if base.revision else "")
    try:
        compared = check_base(found, selection.fingerprint, progress)
    except ValueError as error:
        report.faults.append(str(error))
        compared = "differs"
    report.base = f"{seen}; compared with the rows file: {compared}"


def _grown(a: Stored, b: Stored) -> bool:
    return a.dtype == b.dtype and a.shape[1:] == b.shape[1:] and b.shape[0] > a.shape[0]


def _compare_configurations(report: VerifyReport, base: Base, found: Checkpoint, tuned: Path):
    """All but what loading and tokenizers change; `vocab_size` may follow grown embeddings.

    The tuned model says the run's overrides, or, as those merged before 0.10.0, what the base says.
    """
    plain, read = base.read(found.folder), base.read(tuned)
    idle = idle_overrides(plain, base.overrides)
    old, new = what_counts(plain, idle), what_counts(read, idle)
    if any(w.rpartition(".")[2] != "vocab_size" for w, *_ in _differences(old, new)):
        old = what_counts(base.configuration(found.folder), idle)
    sizes = {found.stored[key].shape[0] + count for key, count in report.new_rows.items()}
    if len(sizes) > 1:
        report.faults.append(f"the embeddings have grown to different sizes: {report.new_rows}")
    for where, a, b in _differences(old, new):
        if where.rpartition(".")[2] == "vocab_size" and {b} == sizes:
            continue
        report.faults.append(f"config.json: {where} is {b!r}, in the base {a!r}")
    tokens = getattr(read.get_text_config(), "vocab_size", None)
    if sizes and tokens not in sizes:
        report.faults.append(f"config.json: vocab_size is {tokens}, the embeddings have {sizes}")


def _differences(old, new):
    a, b = dict(_leaves(old)), dict(_leaves(new))
    return [(k, a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]


def _leaves(value, where: str = ""):
    if not isinstance(value, dict):
        yield where.removeprefix("."), value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{where}.{key}")


def _differs(a: Stored, b: Stored) -> bool:
    x, y = a.bytes(), b.bytes()
    return any(
        not np.array_equal(x[i : i + _CHUNK], y[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)
    )


def _changed_rows(a: Stored, b: Stored, row_dim: int) -> np.ndarray:
    """Indices of rows with any differing byte."""
    first, second = a.shape
    x, y = (s.bytes().reshape(first, second, -1) for s in (a, b))
    step = max(1, _CHUNK // max(1, a.size // first))
    changed = np.zeros(a.shape[row_dim], bool)
    for i in range(0, first, step):
        different = (x[i : i + step] != y[i : i + step]).any(2)  # [step, second]
        if row_dim == 0:
            changed[i : i + step] = different.any(1)
        else:
            changed |= different.any(0)
    return changed.nonzero()[0]
