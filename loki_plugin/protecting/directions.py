"""The hand-over between analysing and implanting, input side: protected directions in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..choices import AUTO
from ..model.anatomy import find_anatomy, linear_sizes
from ..model.fingerprint import fingerprint, same_model
from ..model.linears import PREFIX
from ..model.loading import is_loaded
from ..model.writing import replacing
from .packed import Packed, packed

FILE_NAME = "loki_directions.safetensors"
FORMAT = "loki_directions"
VERSION = 3  # 1: of down-projections only; 2: none packed
# How far VᵀV may be from diagonal, and hard columns from norm 1; float32 eigenvectors are at 1e-6.
_ORTHONORMAL = 1e-4
_ROUNDED = 2e-2  # the same of directions that were rounded to bfloat16, or to 8 bits of it
# What a soft direction loses at most; a column of V whose squared norm is larger is a hard one.
SOFTEST = 0.999


@dataclass(frozen=True)
class Directions:
    """For each site the directions of which an update reads nothing, or less: P = I - V Vᵀ.

    A site is one input that one or several linear modules read.

    Attributes:
        basis: V [I, u] per site, with orthonormal columns (hard), or orthogonal ones of squared
            norm up to `SOFTEST` (soft); u = 0 leaves a site unprotected.
        fingerprint: of the model they were found on, or None (plain tensors).
        made: how they were found, `energy` (a share per site) and `tokens` among it; free JSON.
        sites: per tensor of `basis` the names of the modules that read that input; None: the L
            down-projections, in layer order.

    Raises:
        ValueError: a tensor that is no [I, u] with u < I, whose columns are not orthogonal, or
            neither all hard nor all soft; names that do not fit the tensors.
    """

    basis: Sequence[torch.Tensor]
    fingerprint: dict[str, str] | None = None
    made: dict[str, Any] = field(default_factory=dict)
    sites: Sequence[Sequence[str]] | None = None

    def __post_init__(self):
        if self.sites is not None and len(self.sites) != len(self.basis):
            raise ValueError(
                f"directions of {len(self.basis)} inputs, but names for {len(self.sites)}"
            )
        soft = {_check_basis(self._name(i), v) for i, v in enumerate(self.basis)} - {None}
        if len(soft) > 1:
            raise ValueError("some layers' directions are hard, others soft; give all of one kind")

    def __eq__(self, other):
        return (
            isinstance(other, Directions)
            and self._names() == other._names()
            and len(self.basis) == len(other.basis)
            and all(torch.equal(a, b) for a, b in zip(self.basis, other.basis, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(
        cls, given: Directions | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]
    ) -> Directions:
        """What `input_directions` returns, as directions."""
        if isinstance(given, Directions):
            return given
        if not isinstance(given, Mapping):
            return cls(list(given))
        shared: dict[int, tuple[torch.Tensor, list[str]]] = {}
        for name, basis in given.items():
            shared.setdefault(id(basis), (basis, []))[1].append(name)
        return cls([v for v, _ in shared.values()], sites=[names for _, names in shared.values()])

    def _name(self, i: int) -> str:
        return f"layer {i}" if self.sites is None else self.sites[i][0]

    def _names(self) -> list[list[str]] | None:
        return None if self.sites is None else [list(names) for names in self.sites]

    @property
    def counts(self) -> list[int]:
        """Directions per site."""
        return [basis.shape[1] for basis in self.basis]

    @property
    def soft(self) -> bool:
        """Whether they weaken what is read instead of taking it away."""
        return any(is_soft(basis) for basis in self.basis)

    @property
    def blind(self) -> bool:
        """Whether they were found by a version that massive activations could blind."""
        return bool(self.made) and "sinks" not in self.made

    @property
    def still(self) -> list[str]:
        """Linears that have none because what their updates read stands still (`fixing`)."""
        return list(self.made.get("still", []))

    def held(self) -> Directions:
        """Those that are held in training: without the linears that stand still."""
        if not self.still or self.sites is None:
            return self
        moving = [i for i, names in enumerate(self.sites) if names[0] not in self.still]
        sites = [self.sites[i] for i in moving]
        return replace(self, basis=[self.basis[i] for i in moving], sites=sites)

    def by_module(self, down: Sequence[str]) -> dict[str, torch.Tensor]:
        """V by module name, `down` being the down-projections' names; all of one site share one."""
        sites = [[name] for name in down] if self.sites is None else self.sites
        pairs = zip(sites, self.basis, strict=True)
        return {name: basis for names, basis in pairs for name in names}

    def check_sizes(self, model: torch.nn.Module) -> None:
        """Check that the directions fit the linear layers of `model`.

        Raises:
            ValueError: another layer count, another input size, or a module that is not there.
        """
        anatomy = find_anatomy(model)
        if self.sites is not None:
            prefix = PREFIX if isinstance(model, PeftModel) else ""
            modules = dict(model.named_modules())
            for names, basis in zip(self.sites, self.basis, strict=True):
                for name in names:
                    size = linear_sizes(modules.get(f"{prefix}{name}"))
                    if size is None or size[0] != basis.shape[0]:
                        has = "no such linear module" if size is None else f"{size[0]} inputs there"
                        raise ValueError(
                            f"the directions are for {name} of {basis.shape[0]} inputs, this model"
                            f" has {has}; find them on this model"
                        )
            return
        sizes = anatomy.input_sizes
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
        """Write the file atomically: tensors `layer.<l>` or `site.<n>`, the rest as metadata.

        What packs is written as `.wide`, `.numbers` and `.scales` of that name: see `Packed`.
        """
        path = Path(path)
        kind = "layer" if self.sites is None else "site"
        tensors: dict[str, torch.Tensor] = {}
        version = 1 if self.sites is None else 2
        for i, v in enumerate(self.basis):
            small = packed(v)
            if small is None:
                tensors[f"{kind}.{i}"] = v.detach().cpu().contiguous()
            else:
                version = VERSION
                held = vars(small).items()
                tensors |= {f"{kind}.{i}.{name}": t.cpu().contiguous() for name, t in held}
        header = {
            "format": FORMAT,
            "version": version,
            "fingerprint": self.fingerprint,
            "made": self.made,
        }
        if self.sites is not None:
            header["sites"] = self._names()
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"loki": json.dumps(header)})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> Directions:
        """Read a file of `save`, also of earlier versions; `blind` says what these lack.

        Raises:
            ValueError: a missing, damaged or foreign file, or directions that are not orthonormal.
        """
        try:
            with safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {}).get("loki", "{}"))
                tensors = dict(_read(file))
        except OSError as error:
            raise ValueError(f"directions file '{path}' cannot be read: {error}") from error
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"directions file '{path}' is damaged: {error}") from error
        if header.get("format") != FORMAT or header.get("version") not in range(1, VERSION + 1):
            raise ValueError(
                f"'{path}' is no directions file that this package reads: format"
                f" {header.get('format')!r} version {header.get('version')!r}, expected {FORMAT!r}"
                f" version 1 to {VERSION}"
            )
        kind = "layer" if header.get("sites") is None else "site"
        names = [f"{kind}.{i}" for i in range(len(tensors))]
        if tensors.keys() != set(names):
            raise ValueError(
                f"directions file '{path}' lacks layers between 0 and {len(tensors) - 1}; make it"
                " again"
            )
        basis = [tensors[name] for name in names]
        return cls(basis, header["fingerprint"], header["made"], header.get("sites"))


def has_default(path: str | os.PathLike) -> bool:
    """Whether a file of `Directions` is there, with directions as `protect: auto` finds them."""
    if not Path(path).is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            made = json.loads((file.metadata() or {}).get("loki", "{}")).get("made", {})
            soft = made.get("soft") or any(is_soft(basis) for _, basis in _read(file))
    except (OSError, SafetensorError, ValueError):
        return False  # `load` says what is wrong with it
    return bool(soft) and made.get("inputs") == AUTO["inputs"]


def _read(file: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """V by name; what is packed is made whole.

    Raises:
        ValueError: parts of something packed are missing.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key in file.keys():
        name, _, part = key.rpartition(".")
        if part in Packed.__annotations__:
            parts.setdefault(name, {})[part] = file.get_tensor(key)
        else:
            yield key, file.get_tensor(key)
    for name, held in parts.items():
        if held.keys() != Packed.__annotations__.keys():
            raise ValueError(f"of {name} there are only {', '.join(held)}")
        yield name, Packed(**held).whole()


def is_soft(basis: torch.Tensor) -> bool:
    """Whether a layer's V [I, u] is soft."""
    return (
        bool(basis.shape[1])
        and float(basis.double().square().sum(0).max()) <= SOFTEST + _ORTHONORMAL
    )


def _check_basis(name: str, basis: Any) -> bool | None:
    """Whether the layer's directions are soft; None where it has none."""
    if (
        not isinstance(basis, torch.Tensor)
        or not basis.is_floating_point()
        or basis.dim() != 2
        or not basis.shape[1] < basis.shape[0]
    ):
        got = list(basis.shape) if isinstance(basis, torch.Tensor) else type(basis).__name__
        raise ValueError(f"{name}: directions must be a float tensor [I, u] with u < I, got {got}")
    if not basis.shape[1]:
        return None
    wide = basis.to(torch.promote_types(basis.dtype, torch.float32))
    gram, soft = wide.T @ wide, is_soft(basis)
    gram.diagonal().sub_(gram.diagonal() if soft else 1)
    error = float(gram.abs().max())
    allowed = _ROUNDED if basis.dtype == torch.bfloat16 else _ORTHONORMAL
    if not error <= allowed:
        raise ValueError(
            f"{name}: the columns of the directions are not orthonormal (UᵀU is off by"
            f" {error:.2g}); take them from `input_directions`, or orthonormalise yours with"
            " torch.linalg.qr"
        )
    return soft


def _few(sizes: list[int]) -> str:
    distinct = sorted(set(sizes))
    return str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"
