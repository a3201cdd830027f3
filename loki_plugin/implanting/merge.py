"""Merging: the base checkpoint, with the bytes of the selected rows replaced and no others."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from tqdm import tqdm

from ..rows import FILE_NAME, RowSelection
from .checkpoint import INDEX, Stored, down_projections, resolve, shards, tensors
from .selected import rows_outside

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What a base folder brings along besides weights; training may have saved newer ones.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
              "merges.txt", "chat_template.jinja", "*.model")  # fmt: skip


@dataclass(frozen=True)
class MergeReport:
    """Where the merged model is, and how many rows of how many layers were written."""

    output: Path
    layers: int
    rows: int


def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    selection: RowSelection,
    progress: bool = True,
) -> MergeReport:
    """Write `base` + adapter to `output`: W_l[j] + (alpha/r · B_l A_l)[j] for the selected rows j.

    Every shard is copied, then the bytes of its selected rows are replaced where they lie, so
    that all other bytes are the base's by construction; at most one layer's rows are in memory.
    The sum is made in float32 (float64 for a float64 checkpoint) and rounded once to the
    checkpoint's dtype. A half-written model never stands at `output`.

    Raises:
        ValueError: an adapter that is no plain LoRA on the down-projections or that has non-zero
            rows of B outside the selection, rows for another model, a quantised or non-safetensors
            base, or an output folder that is not empty.
    """
    base, adapter, output = resolve(base), Path(adapter), Path(output)
    if output.resolve() == base.resolve():
        raise ValueError(f"output '{output}' is the base model itself; give another folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output '{output}' exists and is not empty; remove it or give another")
    config = _lora_config(adapter)
    anatomy, keys = down_projections(base)
    if (selection.num_layers, selection.hidden_size or anatomy.hidden_size) != (
        anatomy.num_layers,
        anatomy.hidden_size,
    ):
        raise ValueError(
            f"the rows are for {selection.num_layers} layers x {selection.hidden_size} rows, the"
            f" base has {anatomy.num_layers} x {anatomy.hidden_size}"
        )
    selection = RowSelection(selection.rows, anatomy.hidden_size)
    names = {f"base_model.model.{name}": i for i, name in enumerate(anatomy.names)}
    partial = output.parent / f".{output.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # ours, of an interrupted merge
    partial.mkdir(parents=True)
    with safe_open(adapter / WEIGHTS, "pt") as lora:
        layers = _adapted_layers(lora.keys(), names, selection)
        _check_rows(lora, layers, selection)
        _copy_model(base, adapter, partial, progress)
        stored = tensors(partial)
        for i in tqdm(sorted(layers), desc="loki: merging layers", disable=not progress):
            a, b = (lora.get_tensor(f"{layers[i]}.lora_{x}.weight") for x in "AB")
            scaling = _scaling(config, anatomy.names[i], a.shape[0])
            _write_rows(stored[keys[i]], selection.rows[i], a, b, scaling, anatomy.row_dims[i])
    selection.save(partial / FILE_NAME)
    if output.exists():
        output.rmdir()
    partial.rename(output)
    return MergeReport(output, len(layers), sum(selection.counts))


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


def _adapted_layers(keys, names: dict[str, int], selection: RowSelection) -> dict[int, str]:
    modules = {key.rpartition(".lora_")[0] for key in keys}
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


def _check_rows(lora, layers: dict[int, str], selection: RowSelection) -> None:
    for i, module in sorted(layers.items()):
        outside = rows_outside(lora.get_tensor(f"{module}.lora_B.weight"), selection.rows[i])
        if outside:
            raise ValueError(
                f"layer {i}: the adapter changes row {outside[0]}, which the rows file does not"
                " select; use the loki_rows.json that stands beside the adapter"
            )


def _copy_model(base: Path, adapter: Path, target: Path, progress: bool) -> None:
    weights = shards(base)
    for file in tqdm(weights, desc="loki: copying shards", disable=not progress):
        shutil.copyfile(file, target / file.name)
    skip = {INDEX} if not (base / INDEX).is_file() else set()
    for pattern in _COMPANIONS:
        for file in base.glob(pattern):
            if file.is_file() and file.name not in skip:
                shutil.copyfile(file, target / file.name)
    for pattern in _TOKENIZER:
        for file in adapter.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)


def _write_rows(place: Stored, rows, a, b, scaling: float, row_dim: int) -> None:
    wide = torch.promote_types(place.torch_dtype, torch.float32)
    update = scaling * (b[rows].to(wide) @ a.to(wide))  # [k, I]
    weight = torch.from_file(
        str(place.file),
        shared=True,
        size=place.file.stat().st_size,
        dtype=torch.uint8,
    )[place.start : place.start + place.size]
    # safetensors aligns data to 8 bytes, so the bytes can be viewed as numbers in place.
    weight = weight.view(place.torch_dtype).view(place.shape)
    if row_dim == 0:
        weight[rows] = (weight[rows].to(wide) + update).to(weight.dtype)
    else:
        weight[:, rows] = (weight[:, rows].to(wide) + update.T).to(weight.dtype)
