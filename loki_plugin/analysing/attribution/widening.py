"""A model in float32 a layer at a time: what rounding to half precision hides, shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ...model.anatomy import Anatomy
from ...model.hooks import removing
from ...model.quantised import dequantising_4_bit
from ..precision import exact_products

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def widened(model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
    """For the duration the decoder computes in float32, on the weights as they are stored.

    A layer's parameters are cast when it is called and put back when it has answered, so that one
    layer is held twice; quantised linears are dequantised to float32. What is in float32 or float64
    stays. The head is not part of the decoder.
    """
    layers = set(anatomy.layers)
    inside = {id(m) for layer in layers for m in layer.modules()}
    with ExitStack() as stack:
        stack.enter_context(exact_products())
        stack.enter_context(dequantising_4_bit(model))
        for module in anatomy.decoder.modules():
            if isinstance(module, nn.Embedding):  # as large as the head, and one lookup
                stack.enter_context(removing(module.register_forward_hook(_widen_answer)))
            elif module in layers or (id(module) not in inside and module is not anatomy.decoder):
                if next(_halves(module, module in layers), None) is not None:
                    stack.enter_context(_wide_while_called(module, module in layers))
        yield


def _halves(module: nn.Module, recurse: bool) -> Iterator[torch.Tensor]:
    for tensors in (module.parameters(recurse), module.buffers(recurse)):
        # A packed 4-bit weight may be stored as bfloat16.
        yield from (t for t in tensors if t.dtype in HALF and not hasattr(t, "quant_state"))


@contextmanager
def in_float32(module: nn.Module, recurse: bool = True) -> Iterator[None]:
    """For the duration its parameters and buffers in half precision are in float32."""
    stored = [(tensor, tensor.data) for tensor in _halves(module, recurse)]
    try:
        for tensor, data in stored:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in stored:
            tensor.data = data


@contextmanager
def _wide_while_called(module: nn.Module, recurse: bool) -> Iterator[None]:
    calls: list[Any] = []  # a layer may be called from its own hook

    def widen(module: nn.Module, args: tuple) -> None:
        calls.append(in_float32(module, recurse))
        calls[-1].__enter__()

    def put_back(module: nn.Module, args: tuple, output: Any) -> None:
        calls.pop().__exit__(None, None, None)

    with (
        removing(module.register_forward_pre_hook(widen)),
        removing(module.register_forward_hook(put_back, always_call=True)),
    ):
        yield


def _widen_answer(module: nn.Module, args: tuple, output: Any) -> Any:
    if isinstance(output, torch.Tensor) and output.dtype in HALF:
        return output.float()
    return output
