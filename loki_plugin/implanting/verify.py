"""The proof: which tensors and rows of two checkpoints differ, byte by byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..rows import RowSelection
from .checkpoint import Stored, down_projections, resolve, tensors

_CHUNK = 64 << 20


@dataclass
class VerifyReport:
    """What differs between two checkpoints.

    Attributes:
        compared: number of tensors in both.
        faults: one sentence for each difference that no selected row explains.
        changed_rows: per layer, how many selected rows differ.
        selected_rows: per layer, how many rows the file selects.
    """

    compared: int = 0
    faults: list[str] = field(default_factory=list)
    changed_rows: list[int] = field(default_factory=list)
    selected_rows: list[int] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.faults

    def text(self) -> str:
        changed, selected = sum(self.changed_rows), sum(self.selected_rows)
        lines = [
            f"{self.compared} tensors compared byte by byte",
            f"{changed} of {selected} selected rows changed, in"
            f" {sum(c > 0 for c in self.changed_rows)} of {len(self.changed_rows)} layers",
        ]
        if self.ok:
            lines.append("OK: nothing outside the selected rows has changed")
        else:
            lines += [f"  {fault}" for fault in self.faults[:20]]
            if len(self.faults) > 20:
                lines.append(f"  ... and {len(self.faults) - 20} more")
            lines.append(f"FAILED: {len(self.faults)} differences outside the selected rows")
        return "\n".join(lines)


def verify(
    base: str | Path, tuned: str | Path, selection: RowSelection, progress: bool = True
) -> VerifyReport:
    """Compare two checkpoints in bounded memory; `.ok` only if all changes lie in the selection.

    Raises:
        ValueError: a folder without safetensors weights, or rows for another model.
    """
    base, tuned = resolve(base), resolve(tuned)
    anatomy, keys = down_projections(base)
    if selection.num_layers != anatomy.num_layers:
        raise ValueError(
            f"the rows are for {selection.num_layers} layers, the base has {anatomy.num_layers}"
        )
    selection = RowSelection(selection.rows, anatomy.hidden_size)
    layer_of = {key: i for i, key in enumerate(keys)}
    before, after = tensors(base), tensors(tuned)
    report = VerifyReport(changed_rows=[0] * anatomy.num_layers, selected_rows=selection.counts)
    report.faults += [f"{k} is missing in the tuned model" for k in sorted(before.keys() - after)]
    report.faults += [f"{k} is not in the base model" for k in sorted(after.keys() - before)]
    both = [k for k in before if k in after]
    for key in tqdm(both, desc="loki: verifying", unit="tensor", disable=not progress):
        report.compared += 1
        a, b = before[key], after[key]
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
            report.faults.append(f"{key} changed")
    return report


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
