"""The base as a 4-bit or 8-bit run saw it, as a plain checkpoint.

A quantised run learns its rows beside rounded weights W'. Merged onto the original, ΔW stands
beside W, which it has never seen; merged onto this checkpoint, it stands beside W' again, and the
merged model answers as the adapter did. The price: W' is the worse model of the two, in every
linear layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..model.building import load
from ..model.fingerprint import fingerprint
from ..model.quantised import dequantise, quantised_modules, row_scales
from ..rows import RowSelection
from .checkpoint import Base, Checkpoint, Stored, matching_keys, open_checkpoint, tensors
from .output import check_output, writing_to
from .rounded import is_quantised, storage_of
from .vocabulary import copy_model

# How Axolotl packs 4-bit weights, and how transformers does where nothing else is said.
_PACKED_AS = (torch.bfloat16, torch.uint8, torch.float32, torch.float16)
# What Axolotl leaves whole, by model type.
_UNQUANTISED = {"falcon_h1": ("out_proj",), "jamba": ("mamba",)}


def write_dequantised(
    base: Base, selection: RowSelection, output: Path, progress: bool = True
) -> str:
    """Write `base` with every linear weight W replaced by dequantise(quantise(W)).

    The base is quantised as the rows file says, on the GPU where there is one, and must then be
    the model that the rows were made on, in every stored byte. The values are rounded to the
    checkpoint's dtype.

    Returns:
        What was written, in words.

    Raises:
        ValueError: rows that were not made on a quantised base, or a base that, quantised here,
            is not the one that they were made on; an output folder that is not empty.
    """
    check_output(output, base)
    found = open_checkpoint(base, selection.fingerprint)
    model = _quantised_as_before(base, found, selection)
    names = {id(m): n for n, m in model.named_modules()}
    modules = quantised_modules(model)
    with writing_to(output) as partial:
        copy_model(found, partial, {}, progress)
        stored = tensors(partial)
        for module in tqdm(modules, desc="loki: dequantising", disable=not progress):
            place = _place(f"{names[id(module)]}.weight", stored, found.renamed)
            _overwrite(place, _values(module))
    return f"{len(modules)} linear weights of {found.folder} as {storage_of(selection)} holds them"


def _quantised_as_before(base: Base, found: Checkpoint, selection: RowSelection) -> nn.Module:
    """The model that the rows were made on; their file does not say in which dtype it was."""
    storage = storage_of(selection)
    if not is_quantised(selection):
        raise ValueError(
            "onto the dequantised base: the rows file was not made on a quantised base"
            f" ({storage or 'it holds no fingerprint'}), so it cannot be told which weights the"
            " rows were learned beside; merge onto the original base"
        )
    stored = found.first(selection.linears).torch_dtype
    for dtype in dict.fromkeys([stored, torch.bfloat16, torch.float16, torch.float32]):
        for whole in unquantised(base, found):
            model = load_quantised(base, found, storage, dtype, selection.fingerprint, whole)
            if any(_is_the_one(model, packed, selection) for packed in _PACKED_AS):
                return model
    raise ValueError(
        f"'{base.name}', quantised here as {storage}, is not the model that the rows were made on:"
        " give that base and revision, on the kind of device (GPU, CPU) that trained"
    )


def unquantised(base: Base, found: Checkpoint) -> list[tuple[str, ...] | None]:
    """What a quantised run may have left whole, likeliest first; None: transformers' own choice."""
    family = getattr(found.model.config, "model_type", "")
    return list(dict.fromkeys([base.unquantised or _UNQUANTISED.get(family), None]))


def load_quantised(
    base: Base,
    found: Checkpoint,
    storage: str,
    dtype: torch.dtype,
    made_for: dict[str, str] | None,
    whole: tuple[str, ...] | None,
) -> nn.Module:
    """The base quantised by transformers as a fingerprint says, on the GPU where there is one.

    Args:
        whole: modules that are not quantised; None: transformers' own choice.
    """
    from transformers import BitsAndBytesConfig

    kind, *more = storage.removeprefix("bnb-").split("-")
    skipped: Any = {"llm_int8_skip_modules": list(whole)} if whole else {}
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, **skipped)
    else:
        config = BitsAndBytesConfig(
            **skipped,
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant="double" in more,
            bnb_4bit_compute_dtype=dtype,
        )
    return load(
        str(found.folder),
        made_for,
        quantization_config=config,
        dtype=dtype,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        trust_remote_code=base.trust_remote_code,
        overrides=base.overrides,
    )


def _is_the_one(model: nn.Module, packed: torch.dtype, selection: RowSelection) -> bool:
    for module in quantised_modules(model):
        if row_scales(module) is None:
            module.weight.data = module.weight.data.flatten().view(packed)[:, None]
    mark = fingerprint(model)
    made_for = selection.fingerprint or {}
    return all(mark[k] == made_for.get(k) for k in ("quantisation", "weights"))


def _values(module: nn.Module) -> torch.Tensor:
    if row_scales(module) is not None:
        return dequantise(module, torch.float32)
    from bitsandbytes import functional

    weight = module.weight
    return functional.dequantize_4bit(weight.data.view(torch.uint8), weight.quant_state)


def _place(name: str, stored: dict[str, Stored], renamed: dict[str, str]) -> Stored:
    keys = matching_keys(name, stored, renamed)
    if len(keys) != 1:
        raise ValueError(
            f"the model's {name} matches {len(keys)} tensors of the checkpoint {keys[:3]}; its"
            " quantised weights cannot be written in their place"
        )
    return stored[keys[0]]


def _overwrite(place: Stored, values: torch.Tensor) -> None:
    if tuple(values.shape) != place.shape:
        raise ValueError(
            f"a quantised weight is {list(values.shape)}, the checkpoint's {list(place.shape)}"
        )
    data = values.to("cpu", place.torch_dtype).contiguous()
    raw = np.memmap(place.file, np.uint8, "r+", place.start, (place.size,))
    raw[:] = data.view(-1).view(torch.uint8).numpy()
    raw.flush()
