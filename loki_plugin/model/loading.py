"""Does this process hold the model's weights? Sharded training fills one rank, or none wholly."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def is_loaded(model: nn.Module) -> bool:
    """Whether the checkpoint's weights are here.

    With FSDP's `cpu_ram_efficient_loading` every rank but one has parameters on the meta device
    or, from transformers 5 on, zeros on the CPU (in 5.24 each has the weights again).
    """
    embedding = model.get_input_embeddings().weight
    if any(p.is_meta for p in model.parameters()):
        return False
    return bool(torch.count_nonzero(embedding.detach()))


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds parts of the weights only (FSDP2's DTensor, ZeRO-3, meta)."""
    return any(
        p.is_meta or hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in model.parameters()
    )


def can_be_gathered(model: nn.Module) -> bool:
    """Whether `whole` finds every weight: none is on the meta device or in ZeRO-3's hands."""
    return not any(p.is_meta or hasattr(p, "ds_id") for p in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, which FSDP2 may have spread over the ranks.

    Every rank must ask for the same tensors in the same order: the parts are sent around.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.is_meta:  # being sharded: there are no values yet
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return tensor.full_tensor()
