"""bitsandbytes weights: what must be known to differentiate and to checksum them."""

from __future__ import annotations

from torch import nn


def quantised_modules(model: nn.Module) -> list[nn.Module]:
    """The bitsandbytes 4-bit and 8-bit linear modules."""
    return [
        m
        for m in model.modules()
        if getattr(getattr(m, "weight", None), "quant_state", None) is not None
        or getattr(getattr(m, "weight", None), "SCB", None) is not None
    ]


def unpack(model: nn.Module) -> None:
    """Undo the memory layout that bitsandbytes gives 4-bit weights for evaluation on some CPUs.

    A packed weight answers through a kernel without a gradient, and its bytes depend on whether
    the model has been evaluated. Saving restores the plain layout in place, so we ask for that.
    """
    for module in quantised_modules(model):
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()
