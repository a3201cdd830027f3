"""Does this process hold the model's weights? Sharded training fills one rank, or none wholly."""

from __future__ import annotations

import torch
from torch import nn


def is_loaded(model: nn.Module) -> bool:
    """Whether the checkpoint's weights are here.

    With FSDP's `cpu_ram_efficient_loading` every rank but one has parameters on the meta device
    or, from transformers 5 on, zeros on the CPU.
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
