"""The hand-over between analysing and implanting, input side: protected directions in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..model.anatomy import find_anatomy
from ..model.fingerprint import fingerprint, same_model
from ..model.loading import is_loaded
from ..model.writing import replacing

FILE_NAME = "loki_directions.safetensors"
FORMAT = "loki_directions"
VERSION = 1
# How far VᵀV may be from diagonal, and hard columns from norm 1; float32 eigenvectors are at 1e-6.
_ORTHONORMAL = 1e-4
# What a soft direction loses at most; a column of V whose squared norm is larger is a hard one.
SOFTEST = 0.999


@dataclass(frozen=True)
class Directions:
    """For each of L layers the directions of which an update reads nothing, or less: P = I - V Vᵀ.

    Attributes:
        basis: L tensors V [I, u_l] with orthonormal columns (hard), or orthogonal ones of squared
            norm up to `SOFTEST` (soft); u_l = 0 leaves a layer unprotected.
        fingerprint: of the model they were found on, or None (plain tensors).
        made: how they were found, `energy` (L shares) and `tokens` among it; free JSON.

    Raises:
        ValueError: a tensor that is no [I, u] with u < I, whose columns are not orthogonal, or
            neither all hard nor all soft.
    """

    basis: Sequence[torch.Tensor]
    fingerprint: dict[str, str] | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        soft = {_check_basis(i, basis) for i, basis in enumerate(self.basis)} - {None}
        if len(soft) > 1:
            raise ValueError("some layers' directions are hard, others soft; give all of one kind")

    def __eq__(self, other):
        return (
            isinstance(other, Directions)
            and len(self.basis) == len(other.basis)
            and all(torch.equal(a, b) for a, b in zip(self.basis, other.basis, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def counts(self) -> list[int]:
        """Directions per layer, L integers."""
        return [basis.shape[1] for basis in self.basis]

    @property
    def soft(self) -> bool:
        """Whether they weaken what is read instead of taking it away."""
        return any(is_soft(basis) for basis in self.basis)

    def check_sizes(self, model: torch.nn.Module) -> None:
        """Check that the directions fit the layers of `model`.

        Raises:
            ValueError: another layer count, or another intermediate size.
        """
        sizes = find_anatomy(model).input_sizes
        given = [basis.shape[0] for basis in self.basis]
        if given != sizes:
            raise ValueError(
                f"the directions are for {len(given)} layers of {_few(given)} inputs, this model"
                f" has {len(sizes)} of {_few(sizes)}; find them on this model"
            )

    def check(self, model: torch.nn.Module, unchanged: bool = False) -> Directions:
        """Check that the directions belong to `model`, which may carry an adapter.

        On a rank without its weights only sizes can be compared. `unchanged` as in `fingerprint`.

        Raises:
            ValueError: as `check_sizes`, or another model by fingerprint.
        """
        self.check_sizes(model)
        if self.fingerprint is not None and is_loaded(model):
            difference = same_model(self.fingerprint, fingerprint(model, unchanged=unchanged))
            if difference:
                raise ValueError(
                    f"the directions were found on another model: {difference}. Find them on this"
                    " one (`input_directions`, or `loki.protect.inputs` without a file)"
                )
        return self

    def save(self, path: str | os.PathLike) -> Path:
        """Write the file atomically: tensors `layer.<l>`, the rest as metadata."""
        path = Path(path)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.fingerprint,
            "made": self.made,
        }
        tensors = {f"layer.{i}": b.detach().cpu().contiguous() for i, b in enumerate(self.basis)}
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"loki": json.dumps(header)})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Directions:
        """Read a directions file.

        Raises:
            ValueError: missing, not ours, another version, or damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("loki", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except OSError as error:
            raise ValueError(f"directions file '{path}' cannot be read: {error}") from error
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"directions file '{path}' is damaged: {error}") from error
        if (header.get("format"), header.get("version")) != (FORMAT, VERSION):
            raise ValueError(
                f"'{path}' is no directions file that this package reads: format"
                f" {header.get('format')!r} version {header.get('version')!r}, expected {FORMAT!r}"
                f" version {VERSION}"
            )
        names = [f"layer.{i}" for i in range(len(tensors))]
        if tensors.keys() != set(names):
            raise ValueError(
                f"directions file '{path}' lacks layers between 0 and {len(tensors) - 1}; make it"
                " again"
            )
        basis = [tensors[name] for name in names]
        return cls(basis, header["fingerprint"], header["made"])


def is_soft(basis: torch.Tensor) -> bool:
    """Whether a layer's V [I, u] is soft."""
    return bool(basis.shape[1]) and float(basis.square().sum(0).max()) <= SOFTEST + _ORTHONORMAL


def _check_basis(layer: int, basis: Any) -> bool | None:
    """Whether the layer's directions are soft; None where it has none."""
    if (
        not isinstance(basis, torch.Tensor)
        or not basis.is_floating_point()
        or basis.dim() != 2
        or not basis.shape[1] < basis.shape[0]
    ):
        got = list(basis.shape) if isinstance(basis, torch.Tensor) else type(basis).__name__
        raise ValueError(
            f"layer {layer}: directions must be a float tensor [I, u] with u < I, got {got}"
        )
    if not basis.shape[1]:
        return None
    gram, soft = basis.T @ basis, is_soft(basis)
    gram.diagonal().sub_(gram.diagonal() if soft else 1)
    error = float(gram.abs().max())
    if not error <= _ORTHONORMAL:
        raise ValueError(
            f"layer {layer}: the columns of the directions are not orthonormal (UᵀU is off by"
            f" {error:.2g}); take them from `input_directions`, or orthonormalise yours with"
            " torch.linalg.qr"
        )
    return soft


def _few(sizes: list[int]) -> str:
    distinct = sorted(set(sizes))
    return str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"
