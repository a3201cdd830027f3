"""Where an implanted model gets its protected inputs, and what is done to all of them at once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from .. import ranks
from ..model.anatomy import find_anatomy
from ..model.linears import PREFIX
from .directions import FILE_NAME, Directions
from .reading import ProtectedA


def protect_inputs(
    model: PeftModel,
    directions: Directions | Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    fresh: bool = True,
    checked: bool = False,
) -> None:
    """Make the adapter of an implanted model read less, or nothing, of the directions.

    Args:
        model: a LoRA model whose targeted linears carry the adapter.
        directions: what `input_directions` returns, or a `Directions`.
        fresh: False for an adapter that was saved with these directions.
        checked: they were found on this model, or checked on it, before what hosts do to a base
            ahead of training: casting what is not quantised, growing embeddings.

    Raises:
        ValueError: directions that do not fit the model, or DeepSpeed ZeRO-3, which saves weights
            past their modules.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "protected inputs do not work with DeepSpeed ZeRO-3: it saves the adapter's weights"
            " without folding them. Use ZeRO-2 or DDP, or leave `loki.protect` out"
        )
    found = Directions.of(directions)
    if checked:
        found.check_sizes(model)
    else:
        found.check(model)
    adapter = model.active_adapter
    known = found.by_module([n.removeprefix(PREFIX) for n in find_anatomy(model).names])
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        basis = known.get(name.removeprefix(PREFIX))
        if basis is None:
            raise ValueError(
                f"there are no directions for {name.removeprefix(PREFIX)}, which trains; find them"
                " for the same `targets`"
            )
        if basis.shape[1]:
            weight = module.lora_A[adapter].weight
            module.lora_A[adapter] = ProtectedA(weight, basis)
            if not fresh:
                module.lora_A[adapter].take_folded()
            module.get_delta_weight = functools.partial(folded_delta, module)
    model._loki_directions = found  # saved beside the adapter and its rows


def folded_delta(module: LoraLayer, adapter: str) -> torch.Tensor:
    """PEFT's ΔW, which it merges; it reads lora_A's weight past its forward."""
    a = module.lora_A[adapter]
    if not isinstance(a, ProtectedA):  # another adapter of the same layer
        return type(module).get_delta_weight(module, adapter)
    folded, own = a.fold(), a.weight.data
    if a.soft:
        a.weight.data = folded
    try:
        return type(module).get_delta_weight(module, adapter)
    finally:
        a.weight.data = own


def protected_modules(model: nn.Module) -> Iterable[tuple[str, ProtectedA]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, ProtectedA))


def fold(model: nn.Module) -> None:
    """Fold every protected A of `model`."""
    for _, module in protected_modules(model):
        module.fold()


class DirectionsBesideCheckpoints(TrainerCallback):
    """A checkpoint without its directions could be resumed with others."""

    def __init__(self, directions: Directions):
        self.directions = directions

    def on_save(self, args, state, control, model=None, **kwargs):
        # Only the rank that saves has folded; the others must hold the same bytes.
        fold(model)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if ranks.is_first() and folder.is_dir() and not (folder / FILE_NAME).exists():
            self.directions.save(folder / FILE_NAME)
