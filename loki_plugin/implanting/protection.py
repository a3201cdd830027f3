"""Protected inputs: an update that does not read the directions in which general text lies.

    ΔW_l = B_l · A_l · (I - U_l U_lᵀ)

In training the adapter sees x - U(Uᵀx); that is the same function as A - (A U)Uᵀ on x itself, and
is computed in whichever order is cheaper. Unlike projecting gradients or updates (Adam-NSCL, GPM)
it holds exactly under Adam, whose moments mix coordinates. What is saved or merged is folded,
A <- A - (A U)Uᵀ: an ordinary LoRA adapter. AlphaEdit (arXiv 2410.02355) and LoRA-Null (2503.02659)
use the null space of the same matrices, for edits and for the start of A.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from .. import ranks
from ..directions import FILE_NAME, Directions
from ..model.anatomy import find_anatomy

# Folding again takes away what rounding left; it converges at once.
_FOLDS = 4
# ‖ΔW U‖/‖ΔW‖ of an adapter in half precision stays below this.
LEAKAGE = 1e-2


class ProtectedA(nn.Linear):
    """A lora_A that reads only what is left of its input: x -> A (x - U Uᵀ x).

    `weight` [r, I] is the parameter; its part inside span(U) has no effect and is taken out
    whenever the weight is saved or merged.

    Attributes:
        directions: U [I, u], float32 or wider. No buffer: it is neither saved with the adapter nor
            cast, sharded or sent to other ranks with the model.
    """

    def __init__(self, weight: nn.Parameter, directions: torch.Tensor):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)
        wide = torch.promote_types(weight.dtype, torch.float32)
        # The layout is part of what a product rounds to: computed and loaded ones must agree.
        self.directions = directions.detach().to(wide).contiguous()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, protected={self.directions.shape[1]}"

    def placed(self, device: torch.device) -> torch.Tensor:
        """U on `device`, moved there once."""
        if self.directions.device != device:
            self.directions = self.directions.to(device)
        return self.directions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, tokens = self.weight, x.numel() // x.shape[-1]
        u = self.placed(x.device)
        # In half precision U would not be orthonormal, and much of what it takes out would stay.
        with torch.autocast(x.device.type, enabled=False):
            if tokens < self.out_features:
                x = outside(x.to(u.dtype), u).to(x.dtype)
            else:
                weight = outside(weight.to(u.dtype), u).to(weight.dtype)
        return nn.functional.linear(x, weight)

    def fold(self) -> None:
        """Take what has no effect out of the weight, in place; a folded weight keeps its bytes.

        The running model then holds what is saved, so that a resumed run goes on bit by bit.
        """
        with torch.no_grad():
            weight = self.weight.to_local() if hasattr(self.weight, "to_local") else self.weight
            if weight.is_meta:
                return
            u = self.placed(weight.device).double()
            done = torch.finfo(weight.dtype).eps * float(weight.double().norm())
            for _ in range(_FOLDS):
                inside = weight.double() @ u
                if float(inside.norm()) <= done:
                    return
                weight.copy_(weight.double() - inside @ u.T)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self.fold()
        super()._save_to_state_dict(destination, prefix, keep_vars)


def outside(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """What of the vectors x [..., I] lies outside span(U): x - U(Uᵀx)."""
    return x - (x @ u) @ u.T


def protect_inputs(model: PeftModel, directions: Directions | Sequence[torch.Tensor]) -> None:
    """Make the adapter of an implanted model blind to the directions.

    Args:
        model: a LoRA model whose down-projections carry the adapter.
        directions: L tensors [I, u_l] (see `input_directions`) or a `Directions`.

    Raises:
        ValueError: directions that do not fit the model, or DeepSpeed ZeRO-3, which saves weights
            past their modules.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "protected inputs do not work with DeepSpeed ZeRO-3: it saves the adapter's weights"
            " without folding them. Use ZeRO-2 or DDP, or leave `loki.protect` out"
        )
    if not isinstance(directions, Directions):
        directions = Directions(list(directions))
    directions.check(model)
    adapter = model.active_adapter
    for module, basis in zip(find_anatomy(model).down, directions.basis, strict=True):
        if isinstance(module, LoraLayer) and adapter in module.lora_A and basis.shape[1]:
            module.lora_A[adapter] = ProtectedA(module.lora_A[adapter].weight, basis)
            module.get_delta_weight = functools.partial(_folded_delta, module)
    model._loki_directions = directions  # saved beside the adapter and its rows


def _folded_delta(module: LoraLayer, adapter: str) -> torch.Tensor:
    """PEFT's ΔW, which it merges; it reads lora_A's weight past its forward."""
    fold(module)
    return type(module).get_delta_weight(module, adapter)


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


def leakage(update: torch.Tensor, u: torch.Tensor) -> float:
    """‖ΔW U‖ / ‖ΔW‖ of an update's rows [k, I]: the share that reads protected directions.

    0 for a zero update; √(u/I) for one that knows nothing of U.
    """
    update, u = update.detach().double(), u.to(update.device).double()
    whole = float(update.norm())
    return float((update @ u).norm()) / whole if whole else 0.0
