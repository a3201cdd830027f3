"""How much of a finished update reads protected directions: ‖ΔW U‖/‖ΔW‖ from the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..implanting.adapters import Adapter, opened
from ..implanting.checkpoint import Base, Checkpoint, Stored, open_checkpoint, tensors
from ..implanting.identity import check_base
from ..implanting.saved import WEIGHTS, adapter_leakage
from ..implanting.verify import open_as_trained
from ..implanting.vocabulary import new_rows
from ..rows import RowSelection
from .directions import Directions
from .reading import leakage


@dataclass(frozen=True)
class LeakageReport:
    """Leakage per layer, beside what an update that knows nothing of U would have.

    Attributes:
        shares: L numbers ‖ΔW_l U_l‖/‖ΔW_l‖; 0 where nothing changed.
        chance: L numbers √(u_l/I).
        soft: whether the directions may be read, only less.
    """

    shares: list[float]
    chance: list[float]
    soft: bool = False

    def text(self) -> str:
        worst = max(range(len(self.shares)), key=self.shares.__getitem__)
        return (
            f"{'softly ' * self.soft}protected directions: at most {self.shares[worst]:.2g} of the"
            f" update reads them (layer {worst}; an update blind to them would read"
            f" {self.chance[worst]:.2g})"
        )


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a saved adapter instead of a model."""
    return (Path(folder) / WEIGHTS).is_file()


def measure_leakage(
    base: str | Path | Base, tuned: str | Path, selection: RowSelection, directions: Directions
) -> LeakageReport:
    """Leakage of a merged model or of an adapter, one layer in memory at a time.

    A merged model's ΔW is the difference of two rounded weights: in bfloat16 that rounding, which
    knows nothing of U, can be a large part of a small update.

    Raises:
        ValueError: rows or directions for another shape of model, or folders that cannot be read.
    """
    found = open_checkpoint(base)
    selection = selection.check_shape(found.anatomy)
    _check_sizes(found, directions)
    chance = [(u.shape[1] / len(u)) ** 0.5 for u in directions.basis]
    if is_adapter(tuned):
        shares = adapter_leakage(Path(tuned), found.anatomy.names, directions)
        return LeakageReport(shares, chance, directions.soft)
    after = tensors(Path(tuned))
    for key in found.down:
        if key not in after or after[key].shape != found.stored[key].shape:
            raise ValueError(f"'{tuned}' has no {key} of the base's shape; it is another model")
    shares = []
    layers = zip(found.down, found.anatomy.row_dims, selection.rows, directions.basis, strict=True)
    for key, dim, rows, u in layers:
        old, new = (_rows(stored[key], rows, dim) for stored in (found.stored, after))
        shares.append(leakage(new - old, u))
    return LeakageReport(shares, chance, directions.soft)


def _check_sizes(base: Checkpoint, directions: Directions) -> None:
    given = [len(u) for u in directions.basis]
    dims = base.anatomy.row_dims
    sizes = [base.stored[k].shape[1 - dim] for k, dim in zip(base.down, dims, strict=True)]
    if given != sizes:
        raise ValueError(
            f"the directions are for layers of {given} inputs, the base has {sizes}; give the file"
            " that stands beside the adapter"
        )


def _rows(stored: Stored, rows: torch.Tensor, dim: int) -> torch.Tensor:
    weight = stored.tensor()
    return (weight[rows] if dim == 0 else weight[:, rows].T).double()


def check_adapter(base: str | Path | Base, folder: Path, selection: RowSelection) -> str:
    """Check that a saved adapter changes selected rows only; says what was looked at.

    Raises:
        ValueError: what cannot be merged either: another base, no plain LoRA, a failed check of its
            training, a module that is no down-projection, a row of B outside the selection.
    """
    found = open_as_trained(Base.of(base), selection)
    selection = selection.check_shape(found.anatomy)
    compared = check_base(found, selection.fingerprint)
    with opened([Adapter(folder, selection)], found.anatomy.names) as (adapter,):
        grown = new_rows(found, adapter.lora)
        layers = len(adapter.layers)
    more = " but for new tokens" if grown else ""
    return (
        f"base compared with the rows file: {compared}\n"
        f"OK: an adapter on {layers} down-projections, whose B is zero outside the rows{more}"
    )
