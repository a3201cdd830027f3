"""What the trainer logs of ours: how far the rows have moved, in every place that it reports to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer

from ..model.loading import is_sharded
from ..protecting.reading import ProtectedA, outside
from .selected import RowFactor, RowScatter, RowSelector, is_ours

NORM, KL, ROWS = "loki/update_norm", "loki/kl_to_base", "loki/rows"


def record(trainer: Trainer, rows: int, divergence: Callable[[], torch.Tensor | None]) -> None:
    """Add our figures to what the trainer logs of a training step.

    They go where its other figures go: the terminal, the state of checkpoints, TensorBoard, W&B
    and whatever else `report_to` names. Nothing is computed between logging steps.

    Args:
        rows: how many rows train; logged once.
        divergence: gives the KL to the base of the step that was taken, or None.
    """
    log, said = trainer.log, False

    def log_with_ours(logs, *args, **kwargs):
        nonlocal said
        if "loss" in logs:
            norm, kl = update_norm(trainer.model), divergence()
            if norm is not None:
                logs[NORM] = float(norm)
            if kl is not None:
                logs[KL] = float(kl)
            if not said:
                logs[ROWS], said = rows, True
        return log(logs, *args, **kwargs)

    trainer.log = log_with_ours


@torch.no_grad()
def update_norm(model: nn.Module) -> torch.Tensor | None:
    """‖ΔW‖ = sqrt(Σ_l ‖B_l A_l (I - U_l U_lᵀ)‖²), Frobenius, in float32 or wider.

    ΔW is never made: dense, its rows are those of A; low-rank, ‖V A‖² = ⟨VᵀV, A Aᵀ⟩ with the
    stored rows V [k, r] of B. None where this process holds parts of the adapter only.
    """
    if is_sharded(model):
        return None
    squares: list[torch.Tensor] = []
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for name, b in module.lora_B.items():
            if is_ours(b):
                squares.append(_square(module.lora_A[name], b))
    if not squares:
        return None
    return torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()


def _square(a: nn.Linear, b: RowScatter | nn.Linear) -> torch.Tensor:
    """‖ΔW‖² of one layer."""
    weight = a.weight.to(torch.promote_types(a.weight.dtype, torch.float32))
    if isinstance(a, ProtectedA):
        weight = outside(weight, a.placed(weight.device))
    if isinstance(b, RowSelector):
        return weight.square().sum()
    values = (b.values if isinstance(b, RowFactor) else b.weight).to(weight.dtype)
    # Rounding may leave a little less than nothing.
    return ((values.T @ values) * (weight @ weight.T)).sum().clamp(min=0)
