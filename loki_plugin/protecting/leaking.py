"""How much of a finished update reads protected directions: ‖ΔW U‖/‖ΔW‖ from the files."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Leakage per site, beside what an update that knows nothing of U would have.

    Attributes:
        shares: per site ‖ΔW U‖/‖ΔW‖, the largest of its modules'; 0 where nothing changed.
        chance: √(u/I) of each.
        soft: whether the directions may be read, only less.
        names: of each site's first module.
    """

    shares: list[float]
    chance: list[float]
    soft: bool = False
    names: Sequence[str] = ()

    def text(self) -> str:
        if not any(self.chance):
            return "no directions are held: what each update reads stood still"
        worst = max(range(len(self.shares)), key=self.shares.__getitem__)
        where = self.names[worst] if self.names else f"layer {worst}"
        return (
            f"{'softly ' * self.soft}protected directions: at most {self.shares[worst]:.2g} of the"
            f" update reads them ({where}; an update blind to them would read"
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
    found = open_checkpoint(base, selection.fingerprint)
    selection = selection.check_shape(found.anatomy)
    down = {name: i for i, name in enumerate(found.anatomy.names)}
    sites = directions.sites or [[name] for name in down]
    _check_sizes(found, sites, directions)
    chance = [(u.shape[1] / len(u)) ** 0.5 for u in directions.basis]
    names = [site[0] for site in directions.sites or ()]
    if is_adapter(tuned):
        shares = adapter_leakage(Path(tuned), found.anatomy.names, directions)
        return LeakageReport(shares, chance, directions.soft, names)
    after = tensors(Path(tuned))

    def share(name: str, u: torch.Tensor) -> float:
        key, dim = found.linear(name)
        if key not in after or after[key].shape != found.stored[key].shape:
            raise ValueError(f"'{tuned}' has no {key} of the base's shape; it is another model")
        rows = selection.rows[down[name]] if name in down else slice(None)
        old, new = (_rows(stored[key], rows, dim) for stored in (found.stored, after))
        return leakage(new - old, u)

    pairs = zip(sites, directions.basis, strict=True)
    shares = [max(share(name, u) for name in site) for site, u in pairs]
    return LeakageReport(shares, chance, directions.soft, names)


def _check_sizes(base: Checkpoint, sites: Sequence[Sequence[str]], directions: Directions) -> None:
    if len(sites) != len(directions.basis):
        raise ValueError(
            f"the directions are for {len(directions.basis)} layers, the base has {len(sites)};"
            " give the file that stands beside the adapter"
        )
    for names, u in zip(sites, directions.basis, strict=True):
        key, dim = base.linear(names[0])
        size = base.stored[key].shape[1 - dim]
        if size != len(u):
            raise ValueError(
                f"the directions of {names[0]} are for {len(u)} inputs, the base has {size}; give"
                " the file that stands beside the adapter"
            )


def _rows(stored: Stored, rows: torch.Tensor | slice, dim: int) -> torch.Tensor:
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
    others = f", and on {len(selection.linears)} targeted linears" if selection.linears else ""
    return (
        f"base compared with the rows file: {compared}\n"
        f"OK: an adapter on {layers} down-projections, whose B is zero outside the rows{others}"
        f"{more}"
    )
