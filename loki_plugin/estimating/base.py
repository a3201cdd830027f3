"""The base model by its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..model.anatomy import linear_sizes

# How bitsandbytes stores 4-bit weights: two in a byte, a scale for every block of them; with double
# quantisation the scales are bytes themselves, with a scale for every block of theirs.
_BLOCK, _NESTED_BLOCK = 64, 256
_TABLES, _NESTED_TABLES = 4 * 16, 4 * (16 + 256 + 1)


@dataclass(frozen=True)
class Stored:
    """How the base's weights are loaded.

    Attributes:
        dtype: of what is not quantised, and of the activations.
        bits: 4, 8, or 0 for weights that are not quantised.
        nested: whether 4-bit scales are quantised too.
    """

    dtype: torch.dtype
    bits: int = 0
    nested: bool = True


def weight_bytes(model: nn.Module, stored: Stored) -> int:
    """Bytes of all parameters and buffers on the device, as they are loaded."""
    seen, total = set(), 0
    quantised = {id(m.weight): m for m in quantised_linears(model)} if stored.bits else {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in seen:
            continue  # a tied head
        seen.add(id(tensor))
        if id(tensor) in quantised:
            total += _quantised_bytes(quantised[id(tensor)], stored)
        elif isinstance(tensor, nn.Parameter):
            total += tensor.numel() * stored.dtype.itemsize
        else:
            total += tensor.numel() * tensor.itemsize
    return total


def quantised_linears(model: nn.Module) -> list[nn.Module]:
    """What bitsandbytes replaces: every linear module but the head."""
    head = model.get_output_embeddings()
    return [
        m for m in model.modules() if linear_sizes(m) and hasattr(m, "weight") and m is not head
    ]


def _quantised_bytes(linear: nn.Module, stored: Stored) -> int:
    inputs, outputs = linear_sizes(linear)  # type: ignore[misc]
    count = inputs * outputs
    if stored.bits == 8:
        return count + 4 * outputs
    blocks = -(-count // _BLOCK)
    if not stored.nested:
        return -(-count // 2) + 4 * blocks + _TABLES
    return -(-count // 2) + blocks + 4 * -(-blocks // _NESTED_BLOCK) + _NESTED_TABLES
