"""The base model by its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.anatomy import Anatomy, find_anatomy, linear_sizes
from ..model.building import build_empty

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


def empty_model(
    name: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    kind: str | None = None,
) -> Any:
    """The model without memory for its weights (meta device), from a folder or the hub's cache.

    Args:
        kind: the class of transformers that the YAML names (`model_type`), or None.

    Raises:
        ValueError: no configuration there, or not that of a language model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise ValueError(
            f"the configuration of base_model '{name}' cannot be read: {error}. Give a folder with"
            " a config.json, or download the model's config.json once"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the shapes are those of the whole weights
    model = build_empty(config, kind, trust_remote_code)
    return model.eval().requires_grad_(False)


def base_of(name: str, **where: Any) -> tuple[nn.Module, Anatomy]:
    """`empty_model` and its parts."""
    model = empty_model(name, **where)
    return model, find_anatomy(model)


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
