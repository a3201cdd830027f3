"""Merging: the base checkpoint, with the bytes of the selected rows replaced and no others."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from tqdm import tqdm

from ..rows import FILE_NAME, Made, RowSelection
from .checkpoint import (
    COMPANIONS,
    INDEX,
    Base,
    Checkpoint,
    Stored,
    open_checkpoint,
    shards,
    tensors,
)
from .identity import check_base
from .saved import FAILED_NAME, WEIGHTS
from .selected import rows_outside
from .vocabulary import PREFIX, grow_companions, new_rows, write_grown

CONFIG = "adapter_config.json"
# Training may have saved newer ones than the base's.
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
              "merges.txt", "chat_template.jinja", "*.model")  # fmt: skip
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
        layers: how many layers have rows.
        rows: how many rows were written.
        base: what of the base was compared with the fingerprint in the rows file.
        new_tokens: by how many tokens the embeddings grew.
        rounding: what the checkpoint's dtype could not hold.
        dtype: of the checkpoint's down-projections.
    """

    output: Path
    layers: int
    rows: int
    base: str
    new_tokens: int
    rounding: Rounding
    dtype: str

    def text(self) -> str:
        lines = [
            f"base compared with the rows file: {self.base}",
            f"merged {self.rows} rows of {self.layers} layers into {self.output}",
            f"{100 * self.rounding.lost_share:.1f} % of the update was rounded away"
            f" ({self.dtype}); {100 * self.rounding.unchanged_share:.1f} % of the numbers that it"
            " changes kept their bytes",
        ]
        if self.new_tokens:
            lines.append(f"the embeddings grew by {self.new_tokens} tokens")
        if self.rounding.lost_share > _MUCH:
            lines.append(
                "much of what was learned is too small for this dtype: train longer or with a"
                " higher learning rate, merge into the base saved in float32, or serve the adapter"
            )
        return "\n".join(lines)


def merge_adapter(
    base: str | Path | Base,
    adapter: str | Path,
    output: str | Path,
    selection: RowSelection,
    progress: bool = True,
) -> MergeReport:
    """Write `base` + adapter to `output`: W_l[j] + (alpha/r · B_l A_l)[j] for the selected rows j.

    Every shard is copied, then the bytes of its selected rows are replaced where they lie, so
    that all other bytes are the base's by construction; at most one layer's rows are in memory.
    The sum is made in float32 (float64 for a float64 checkpoint) and rounded once to the
    checkpoint's dtype. Embeddings to which training added tokens get their rows behind the base's
    own. A half-written model never stands at `output`.

    Raises:
        ValueError: an adapter that is no plain LoRA on the down-projections, that failed its
            check, that holds NaN or Inf, or that has non-zero rows of B outside the selection; an
            update beyond the range of the checkpoint's dtype; rows for another model; a quantised
            or non-safetensors base; or an output folder that is not empty.
    """
    base, adapter, output = Base.of(base), Path(adapter), Path(output)
    if output.resolve() == Path(base.name).resolve():
        raise ValueError(f"output '{output}' is the base model itself; give another folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output '{output}' exists and is not empty; remove it or give another")
    _check_mark(adapter)
    config = _lora_config(adapter)
    found = open_checkpoint(base)
    selection = selection.check_shape(found.anatomy)
    compared = check_base(found, selection.fingerprint, progress)
    partial = output.parent / f".{output.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # ours, of an interrupted merge
    rounding = Rounding()
    with safe_open(adapter / WEIGHTS, "pt") as lora:
        layers = adapted_layers(lora.keys(), found.anatomy.names, selection)
        check_rows(lora, layers, selection)
        grown = new_rows(found, lora)
        partial.mkdir(parents=True)
        _copy_model(found, adapter, partial, grown, progress)
        stored = tensors(partial)
        for i in tqdm(sorted(layers), desc="loki: merging layers", disable=not progress):
            a, b = (lora.get_tensor(f"{layers[i]}.lora_{x}.weight") for x in "AB")
            update = _scaling(config, found.anatomy.names[i], a.shape[0]), a, b
            place, row_dim = stored[found.down[i]], found.anatomy.row_dims[i]
            try:
                rounding += _write_rows(place, selection.rows[i], update, row_dim)
            except OverflowError as error:
                raise ValueError(f"layer {i}: {error}") from error
    report = MergeReport(
        output,
        len(layers),
        sum(selection.counts),
        compared,
        max(map(len, grown.values()), default=0),
        rounding,
        found.stored[found.down[0]].dtype,
    )
    _with_merge(selection, report, base).save(partial / FILE_NAME)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return report


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


def _check_mark(adapter: Path) -> None:
    mark = adapter / FAILED_NAME
    if mark.is_file():
        raise ValueError(
            f"'{mark}' says: {' '.join(mark.read_text(encoding='utf-8').split())}. Train again;"
            " or, if you have looked into it and the adapter is sound, delete that file"
        )


def _lora_config(adapter: Path) -> dict:
    missing = [n for n in (CONFIG, WEIGHTS) if not (adapter / n).is_file()]
    if missing:
        raise ValueError(
            f"'{adapter}' is no saved LoRA adapter: it has no {' and no '.join(missing)}"
        )
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    wrong = [k for k in ("use_dora", "use_rslora", "modules_to_save", "lora_bias") if config.get(k)]
    if config.get("peft_type") != "LORA" or wrong:
        raise ValueError(
            f"'{adapter}' is not a plain LoRA adapter (peft_type {config.get('peft_type')},"
            f" {wrong or 'no special options'}); LoKI adapters are"
        )
    return config


def _scaling(config: dict, name: str, r: int) -> float:
    pattern = config.get("alpha_pattern") or {}
    return pattern.get(get_pattern_key(pattern.keys(), name), config["lora_alpha"]) / r


def adapted_layers(keys, down: list[str], selection: RowSelection) -> dict[int, str]:
    names = {f"{PREFIX}{name}": i for i, name in enumerate(down)}
    modules = {key.rpartition(".lora_")[0] for key in keys if ".lora_" in key}
    foreign = sorted(m for m in modules if m not in names)
    if foreign:
        raise ValueError(
            f"the adapter changes {len(foreign)} modules that are no down-projection, such as"
            f" {foreign[0]}; it is not a LoKI adapter of this model"
        )
    layers = {names[m]: m for m in modules}
    bare = [i for i, rows in enumerate(selection.rows) if len(rows) and i not in layers]
    if bare:
        raise ValueError(f"the rows file selects rows in layers {bare} that the adapter lacks")
    return layers


def check_rows(lora, layers: dict[int, str], selection: RowSelection) -> None:
    for i, module in sorted(layers.items()):
        a, b = (lora.get_tensor(f"{module}.lora_{x}.weight") for x in "AB")
        for name, matrix in (("lora_A", a), ("lora_B", b)):
            if not torch.isfinite(matrix).all():
                raise ValueError(
                    f"layer {i}: the adapter's {name} holds NaN or Inf; its training went wrong"
                )
        outside = rows_outside(b, selection.rows[i])
        if outside:
            raise ValueError(
                f"layer {i}: the adapter changes row {outside[0]}, which the rows file does not"
                " select; use the loki_rows.json that stands beside the adapter"
            )


def _copy_model(
    base: Checkpoint, adapter: Path, target: Path, grown: dict[str, torch.Tensor], progress: bool
) -> None:
    folder = base.folder
    for file in tqdm(shards(folder), desc="loki: copying shards", disable=not progress):
        inside = {k: rows for k, rows in grown.items() if base.stored[k].file == file}
        if inside:
            write_grown(file, target / file.name, inside)
        else:
            shutil.copyfile(file, target / file.name)
    skip = {INDEX} if not (folder / INDEX).is_file() else set()
    for pattern in COMPANIONS:
        for file in folder.glob(pattern):
            if file.is_file() and file.name not in skip:
                shutil.copyfile(file, target / file.name)
    if grown:
        key, rows = next(iter(grown.items()))
        more = sum(new.numel() for new in grown.values())
        grow_companions(target, base.stored[key].shape[0] + len(rows), more)
    for pattern in _TOKENIZER:
        for file in adapter.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _write_rows(
    place: Stored,
    rows: torch.Tensor,
    update: tuple[float, torch.Tensor, torch.Tensor],
    row_dim: int,
) -> Rounding:
    """W[rows] += scaling · B[rows] A, through bytes: a file need not be aligned.

    Args:
        place: W, [H, I], or [I, H] with `row_dim` 1.
        update: scaling, A [r, I], B [H, r].

    Raises:
        OverflowError: a finite weight would become infinite in the dtype of W.
    """
    scaling, a, b = update
    dtype = place.torch_dtype
    wide = torch.promote_types(dtype, torch.float32)
    change = scaling * (b[rows].to(wide) @ a.to(wide))  # [k, I]
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
