"""Merging: the base checkpoint, with the bytes of the selected rows replaced and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..rows import FILE_NAME, Made, RowSelection, union
from .adapters import Adapter, Opened, check_disjoint, opened
from .checkpoint import Base, Stored, open_checkpoint, tensors
from .identity import check_base
from .output import check_output, writing_to
from .overriding import write_overrides
from .rounded import Advice
from .tokenizer_choice import choose_tokenizer, new_tokens
from .tokenizer_files import write_tokenizer
from .vocabulary import copy_model

_MUCH = 0.1  # of the update


@dataclass(frozen=True)
class Rounding:
    """What the checkpoint's dtype could not hold of an update.

    Attributes:
        update: squared norm of the update.
        lost: squared norm of what is missing of it in the written rows.
        elements: numbers that the update changes.
        unchanged: how many of them have the base's bytes still.
    """

    update: float = 0.0
    lost: float = 0.0
    elements: int = 0
    unchanged: int = 0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.update + other.update,
            self.lost + other.lost,
            self.elements + other.elements,
            self.unchanged + other.unchanged,
        )

    @property
    def lost_share(self) -> float:
        """Norm of what was lost over the norm of the update."""
        return (self.lost / self.update) ** 0.5 if self.update else 0.0

    @property
    def unchanged_share(self) -> float:
        return self.unchanged / self.elements if self.elements else 0.0


@dataclass(frozen=True)
class MergeReport:
    """What was written, and what became of the update.

    Attributes:
        output: where the merged model is.
        adapters: how many were merged.
        layers: how many layers have rows.
        rows: how many rows were written.
        base: what of the base was compared with the fingerprint in the rows file.
        new_tokens: by how many tokens the embeddings grew.
        rounding: what the checkpoint's dtype could not hold.
        dtype: of the checkpoint's down-projections.
        companions: what became of the files beside the weights, in words.
        linears: how many further linears were written whole.
        advice: of a quantised run, which base to merge onto.
    """

    output: Path
    adapters: int
    layers: int
    rows: int
    base: str
    new_tokens: int
    rounding: Rounding
    dtype: str
    companions: list[str]
    linears: int = 0
    advice: Advice | None = None

    def text(self) -> str:
        lines = [
            f"base compared with the rows file: {self.base}",
            f"merged {self.rows} rows of {self.layers} layers{self._more()}"
            f"{self._of_adapters()} into {self.output}",
            f"{100 * self.rounding.lost_share:.1f} % of the update was rounded away"
            f" ({self.dtype}); {100 * self.rounding.unchanged_share:.1f} % of the numbers that it"
            " changes kept their bytes",
        ]
        if self.new_tokens:
            lines.append(f"the embeddings grew by {self.new_tokens} tokens")
        lines += self.companions
        if self.rounding.lost_share > _MUCH:
            lines.append(
                "much of what was learned is too small for this dtype: train longer or with a"
                " higher learning rate, merge into the base saved in float32, or serve the adapter"
            )
        if self.advice:
            lines.append(self.advice.text())
        return "\n".join(lines)

    def _more(self) -> str:
        return f" and {self.linears} whole linears" if self.linears else ""

    def _of_adapters(self) -> str:
        return f" of {self.adapters} adapters" if self.adapters > 1 else ""


def merge_adapter(
    base: str | Path | Base,
    adapter: str | Path,
    output: str | Path,
    selection: RowSelection,
    progress: bool = True,
) -> MergeReport:
    """`merge_adapters` of one adapter."""
    return merge_adapters(base, [Adapter(Path(adapter), selection)], output, progress=progress)


def merge_adapters(
    base: str | Path | Base,
    adapters: Sequence[Adapter],
    output: str | Path,
    sum_overlaps: bool = False,
    progress: bool = True,
) -> MergeReport:
    """Write `base` + adapters to `output`: W_l[j] + Σ (alpha/r · B_l A_l)[j] for selected rows j,
    and W + Σ alpha/r · B A for the further linears that an adapter trained.

    Every shard is copied, then the bytes of its selected rows are replaced where they lie, so
    that all other bytes are the base's by construction; at most one layer's rows are in memory.
    The sum is made in float32 (float64 for a float64 checkpoint) and rounded once to the
    checkpoint's dtype. Embeddings to which training added tokens get their rows behind the base's
    own. A half-written model never stands at `output`. Files beside the weights keep their bytes
    but for what the tokenizer of the adapter that changed it needs; see `choose_tokenizer` and
    `write_tokenizer`.

    Args:
        adapters: each trained on `base`, on rows of its own. The result does not depend on their
            order, and its weights are the same as of merging them one after another.
        sum_overlaps: allow rows in common; they get the sum of the updates.

    Raises:
        ValueError: no adapter; one that is no plain LoRA on the down-projections, that failed its
            check, that holds NaN or Inf, or that has non-zero rows of B outside its selection;
            rows in common; two that add tokens, or want different tokenizers; an update beyond the
            range of the checkpoint's dtype; rows for another model; a quantised or non-safetensors
            base; or an output folder that is not empty.
    """
    base, output = Base.of(base), Path(output)
    check_output(output, base)
    found = open_checkpoint(base, adapters[0].selection.fingerprint if adapters else None)
    adapters = [Adapter(a.folder, a.selection.check_shape(found.anatomy)) for a in adapters]
    if not sum_overlaps:
        check_disjoint(adapters)
    selection = union([a.selection for a in adapters])
    marks = [a.selection.fingerprint for a in adapters]
    different = [m for i, m in enumerate(marks) if m not in marks[:i]]
    compared = "; ".join(check_base(found, mark, progress) for mark in different)
    rounding = Rounding()
    with opened(adapters, found.anatomy.names) as parts, writing_to(output) as partial:
        grown, growing = new_tokens(found, parts)
        folders, trusted = [part.folder for part in parts], base.trust_remote_code
        source, companions = choose_tokenizer(found.folder, folders, growing, trusted)
        copy_model(found, partial, grown, progress)
        companions += write_tokenizer(found.folder, source, partial, trusted)
        companions += write_overrides(partial, base)
        stored = tensors(partial)
        layers = [i for i, rows in enumerate(selection.rows) if len(rows)]
        for i in tqdm(layers, desc="loki: merging layers", disable=not progress):
            place = stored[found.down[i]]
            change = _change(parts, i, selection.rows[i], place)
            try:
                rounding += _write_rows(place, selection.rows[i], change, found.anatomy.row_dims[i])
            except OverflowError as error:
                raise ValueError(f"layer {i}: {error}") from error
        for name in tqdm(selection.linears, desc="loki: merging linears", disable=not progress):
            key, dim = found.linear(name)
            place = stored[key]
            wide = torch.promote_types(place.torch_dtype, torch.float32)
            change = sum(p.whole(name, wide) for p in parts if name in p.selection.linears)
            try:
                rounding += _write_rows(place, torch.arange(place.shape[dim]), change, dim)
            except OverflowError as error:
                raise ValueError(f"{name}: {error}") from error
        report = MergeReport(
            output,
            len(adapters),
            len(layers),
            sum(selection.counts),
            compared,
            max(map(len, grown.values()), default=0),
            rounding,
            found.first(selection.linears).dtype,
            companions,
            len(selection.linears),
        )
        _with_merge(selection, report, base).save(partial / FILE_NAME)
    return report


def _change(parts: list[Opened], layer: int, rows: torch.Tensor, place: Stored) -> torch.Tensor:
    """The sum of all updates of `rows`, [k, I]."""
    wide = torch.promote_types(place.torch_dtype, torch.float32)
    updates = [(p.selection.rows[layer], p.update(layer, wide)) for p in parts if layer in p.layers]
    if len(updates) == 1:
        return updates[0][1]
    change = torch.zeros(len(rows), updates[0][1].shape[1], dtype=wide)
    for some, update in updates:
        change.index_add_(0, torch.searchsorted(rows, some), update)
    return change


def _with_merge(selection: RowSelection, report: MergeReport, base: Base) -> RowSelection:
    merge = {
        "base": report.base,
        "overrides": base.overrides,
        "new_tokens": report.new_tokens,
        "dtype": report.dtype,
        "rounded_away": report.rounding.lost_share,
        "unchanged": report.rounding.unchanged_share,
    }
    return replace(selection, made=Made(**{**selection.made, "merge": merge}))


def _write_rows(
    place: Stored,
    rows: torch.Tensor,
    change: torch.Tensor,
    row_dim: int,
) -> Rounding:
    """W[rows] += change, through bytes: a file need not be aligned.

    Args:
        place: W, [H, I], or [I, H] with `row_dim` 1.
        change: [k, I], in a dtype that holds all values of W.

    Raises:
        OverflowError: a finite weight would become infinite in the dtype of W.
    """
    dtype, wide = place.torch_dtype, change.dtype
    first, second = place.shape
    size = place.size // (first * second)
    raw = np.memmap(place.file, np.uint8, "r+", place.start, (first, second, size))
    chosen = (rows.numpy(),) if row_dim == 0 else (slice(None), rows.numpy())
    if row_dim == 1:
        change = change.T
    old = torch.from_numpy(np.ascontiguousarray(raw[chosen])).view(dtype).squeeze(-1)
    new = (old.to(wide) + change).to(dtype)
    if (torch.isfinite(old) & ~torch.isfinite(new)).any():
        raise OverflowError(
            f"the update reaches {float(change.abs().max()):.3g}, beyond the range of"
            f" {place.dtype}; merge into the base saved in float32"
        )
    raw[chosen] = new.contiguous().unsqueeze(-1).view(torch.uint8).numpy()
    raw.flush()
    lost, touched = (old.to(wide) + change - new.to(wide)), change != 0
    return Rounding(
        float(change.double().square().sum()),
        float(lost.double().square().sum()),
        int(touched.sum()),
        int((touched & (new == old)).sum()),
    )
