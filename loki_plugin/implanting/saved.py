"""The adapter as it lies on disk: its rows file beside it, and the proof that it obeys it."""

from __future__ import annotations

import types
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open

from ..rows import FILE_NAME, RowSelection
from .selected import RowFactor, RowScatter, RowSelector

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's, around the base model


def save_rows_with(model: PeftModel, selection: RowSelection) -> None:
    """From now on `model.save_pretrained` writes the rows file beside the adapter.

    So an older adapter keeps its own rows until it is overwritten itself.
    """
    model._loki_selection = selection
    # A bound method, not a closure: a deep copy of the model binds it to the copy.
    model.save_pretrained = types.MethodType(_save_pretrained, model)


def _save_pretrained(self: PeftModel, save_directory, *args, **kwargs):
    saved = type(self).save_pretrained(self, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True):
        self._loki_selection.save(Path(save_directory) / FILE_NAME)
    return saved


def check_saved(folder: Path, names: list[str], selection: RowSelection, rank: int | None) -> None:
    """Read a saved adapter back and check it against the rows file beside it.

    Args:
        names: of the L down-projections, as the base model or the `PeftModel` calls them.
        selection: the rows that trained.
        rank: None for the dense form.

    Raises:
        ValueError: other rows beside it, a layer that is missing or not selected, NaN or Inf, or
            a B that is not confined to its rows.
    """
    if RowSelection.load(folder / FILE_NAME) != selection:
        raise ValueError(f"'{folder / FILE_NAME}' holds other rows than those that trained")
    with safe_open(folder / WEIGHTS, "pt") as stored:
        left = {k for k in stored.keys() if ".lora_" in k}
        for i, (name, rows) in enumerate(zip(names, selection.rows, strict=True)):
            if not len(rows):
                continue
            name = name.removeprefix(_PREFIX)
            keys = [f"{_PREFIX}{name}.lora_{x}.weight" for x in "AB"]
            missing = [k for k in keys if k not in left]
            if missing:
                raise ValueError(f"layer {i}: the saved adapter lacks {missing[0]}")
            left -= set(keys)
            a, b = (stored.get_tensor(k) for k in keys)
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise ValueError(f"layer {i}: the saved adapter holds NaN or Inf")
            kind: type[RowScatter] = RowSelector if rank is None else RowFactor
            try:
                kind(rows, torch.empty(selection.hidden_size, rank or len(rows))).compact(b)
            except ValueError as error:
                raise ValueError(f"layer {i}: the saved {error}") from error
    if left:
        raise ValueError(f"the saved adapter holds {sorted(left)[0]}, which no row selects")
