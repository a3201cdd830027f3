"""bitsandbytes weights: what must be known to differentiate and to checksum them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .whole import whole_sequences

_PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' 4-bit linear modules


def quantised_modules(model: nn.Module) -> list[nn.Module]:
    """The bitsandbytes 4-bit and 8-bit linear modules.

    Their own parameters alone are asked: an adapter's layer answers `weight` too, with its base
    layer's, or with a matrix that it makes for whoever asks.
    """
    return [m for m in model.modules() if _in_4_bits(m) or row_scales(m) is not None]


def _in_4_bits(module: nn.Module) -> bool:
    return getattr(module._parameters.get("weight"), "quant_state", None) is not None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without dropout, sequences whole; each module's own mode is put back."""
    training = {m for m in model.modules() if m.training}
    try:
        set_evaluating(model)
        with whole_sequences(model):
            yield
    finally:
        for module in model.modules():
            module.training = module in training


def set_evaluating(model: nn.Module) -> None:
    """Evaluation mode, module by module, for passes that may be differentiated.

    `model.eval()` would put kernels for inference into a model with `use_kernels`. Some of these
    have no backward, and where modes are put back one by one nothing would take them out.

    Quantised modules stay as in training: they have no dropout, and in evaluation, on a CPU, 4-bit
    weights would repack themselves and lose their gradient, 8-bit ones round their input.
    """
    quantised = set(quantised_modules(model))
    for module in model.modules():
        module.training = module in quantised


@contextmanager
def training_kernels(model: nn.Module) -> Iterator[None]:
    """Kernels that can be differentiated in the place of those for inference, which a model with
    `use_kernels` has in evaluation."""
    swapped = [m for m in model.modules() if getattr(m, "use_kernels", False) and not m.training]
    for module in swapped:
        module.train()
    try:
        yield
    finally:
        for module in swapped:
            module.training = True  # else it sees no change of its mode, and swaps nothing
            module.eval()


def row_scales(module: nn.Module) -> torch.Tensor | None:
    """The scales [F] of an 8-bit linear module's outputs, or None where it is none.

    bitsandbytes moves them from the weight to the module's state in the first forward.
    """
    # An adapter's layer answers `weight` too, but the parameter is its base layer's.
    for holder in (module._parameters.get("weight"), module.__dict__.get("state")):
        scales = getattr(holder, "SCB", None)
        if isinstance(scales, torch.Tensor):
            return scales
    return None


def unpack(model: nn.Module) -> None:
    """Undo the memory layout that bitsandbytes gives 4-bit weights for evaluation on some CPUs.

    A packed weight answers through a kernel without a gradient, and its bytes depend on whether
    the model has been evaluated. Saving restores the plain layout in place, so we ask for that.
    """
    for module in quantised_modules(model):
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()


def never_pack(model: nn.Module) -> None:
    """From now on no evaluation on a CPU packs 4-bit weights.

    Packed ones stay so: every training step behind the evaluation would get wrong gradients, and
    what is unpacked again has other scales than before.
    """
    unpack(model)
    for module in quantised_modules(model):
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, False)


@contextmanager
def dequantising(model: nn.Module) -> Iterator[None]:
    """For the duration, 8-bit linear modules multiply by the weights that they stand for.

    bitsandbytes' own 8-bit product rounds its inputs, and takes some columns out of that by what
    stands in any token of the batch, so that a prompt's result depends on its neighbours; it also
    waits for the device. Here each weight is dequantised for one product and dropped again.
    """
    with _replaced_forwards([m for m in model.modules() if row_scales(m) is not None]):
        yield


@contextmanager
def _replaced_forwards(modules: list[nn.Module]) -> Iterator[None]:
    saved = []
    try:
        for module in modules:
            # accelerate moves the inputs to the module's device and calls `_old_forward`.
            name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
            saved.append((module, name, module.__dict__.get(name)))
            setattr(module, name, _dequantised_forward(module))
        yield
    finally:
        for module, name, forward in saved:
            if forward is None:
                delattr(module, name)
            else:
                setattr(module, name, forward)


def _dequantised_forward(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = _DequantisedProduct.apply(x, module)
        return y if module.bias is None else y + module.bias.to(y.dtype)

    return forward


@contextmanager
def dequantising_4_bit(model: nn.Module) -> Iterator[None]:
    """For the duration, 4-bit linear modules multiply in the dtype of their input, whatever
    `bnb_4bit_compute_dtype` says."""
    with _replaced_forwards([m for m in model.modules() if _in_4_bits(m)]):
        yield


def dequantise(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """W [F, I] that a quantised linear module stands for; of 8 bits, int8 · scale / 127."""
    scales = row_scales(module)
    if scales is None:
        from bitsandbytes.functional import dequantize_4bit

        weight: Any = module.weight
        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    return module.weight.data.to(dtype).mul_(scales[:, None] * (1 / 127))


class _DequantisedProduct(torch.autograd.Function):
    """x @ Wᵀ; W is made again for the backward, so that no layer's waits for it in memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        ctx.module = module
        return nn.functional.linear(x, dequantise(module, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient @ dequantise(ctx.module, gradient.dtype), None
