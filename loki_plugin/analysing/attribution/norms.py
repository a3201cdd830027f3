"""RMSNorm in one kernel where a family's own code takes eight.

On a GPU the norms of the stack are a third of all launches, and each of theirs is a pass over
memory. PyTorch's `rms_norm` rounds once where they round twice, never more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[None]:
    """For the duration, plain RMSNorms run as one operation."""
    norms = [m for m in model.modules() if _is_plain(m)]
    try:
        for norm in norms:
            norm.forward = _fused(norm)
        yield
    finally:
        for norm in norms:
            norm.__dict__.pop("forward", None)


def _is_plain(module: nn.Module) -> bool:
    kind: Any = type(module)
    if "forward" in module.__dict__ or not has_the_plain_code(kind):
        return False  # somebody's own forward stays
    weight = module.weight
    # In float64 the family's code passes through float32; in half precision on a CPU it is faster.
    return weight.dtype == torch.float32 or (weight.is_cuda and weight.dtype != torch.float64)


@cache
def has_the_plain_code(kind: type[nn.Module]) -> bool:
    """Whether a class computes its forward by Llama's code, which most families copy word by word.

    Gemma's (1 + w) and OLMo's other order of rounding are other code.
    """
    code = _code(kind)  # None where an installation has no sources
    return code is not None and kind.__name__.endswith("RMSNorm") and code == _code(LlamaRMSNorm)


def _code(kind: type[nn.Module]) -> str | None:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):  # a class without a source file
        return None


def _fused(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    plainly = norm.forward

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]"""
        if hidden_states.dtype != norm.weight.dtype:  # a norm kept in float32 widens its output
            return plainly(hidden_states)
        return rms_norm(hidden_states, norm.weight.shape, norm.weight, norm.variance_epsilon)

    return forward
