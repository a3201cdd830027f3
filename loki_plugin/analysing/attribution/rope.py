"""Rotary position embedding in three kernels where the families' own code takes five.

Their backward takes eight, ours three again; the replay of a layer, whose attention nobody reads,
takes none. What they round twice is rounded once, never more often.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.models.llama import modeling_llama

from ...model.anatomy import Anatomy
from .attention import is_replaying

_ROTATE, _HALF = "apply_rotary_pos_emb", "rotate_half"
Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def fused_rope(anatomy: Anatomy) -> Iterator[None]:
    """For the duration, families that rotate by Llama's code rotate by ours."""
    files = {sys.modules[type(m).__module__] for layer in anatomy.layers for m in layer.modules()}
    saved = [(file, getattr(file, _ROTATE)) for file in files if _rotates_as_llama(file)]
    try:
        for file, plainly in saved:
            setattr(file, _ROTATE, _rotating(plainly))
        yield
    finally:
        for file, plainly in saved:
            setattr(file, _ROTATE, plainly)


def _rotates_as_llama(file: ModuleType) -> bool:
    """Whether a family's file has Llama's functions, which most families copy word by word."""
    return all(_code(getattr(file, n, None)) == _llamas_code(n) for n in (_ROTATE, _HALF))


@cache
def _llamas_code(name: str) -> str:
    """As it stands in Llama's file, whatever a plugin has put in its place since."""
    statements = ast.parse(inspect.getsource(modeling_llama)).body
    (function,) = (s for s in statements if isinstance(s, ast.FunctionDef) and s.name == name)
    return _without_words(function)


@cache
def _code(function: Any) -> str | None:
    """A function's parameters and statements; None where there is no source of it."""
    try:
        source = inspect.getsource(_behind(function))
    except (OSError, TypeError):
        return None
    (found,) = ast.parse(textwrap.dedent(source)).body
    return _without_words(found) if isinstance(found, ast.FunctionDef) else None


def _without_words(function: ast.FunctionDef) -> str:
    """Without decorators, name and docstring."""
    statements = function.body[bool(ast.get_docstring(function)) :]
    return "\n".join(map(ast.unparse, [function.args, *statements]))


def _behind(function: Any) -> Any:
    """The function that the decorator of the `kernels` package made a module of, if it did."""
    if not isinstance(function, nn.Module) or "forward" in function.__dict__:
        return function  # or a kernel stands in for it: then it is somebody's own
    cells = type(function).forward.__closure__ or ()
    inside = [c.cell_contents for c in cells if inspect.isfunction(c.cell_contents)]
    return inside[0] if len(inside) == 1 else None


def _rotating(plainly: Rotate) -> Rotate:
    def rotate(
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        unsqueeze_dim: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, heads, n, d], k [B, K, n, d], cos and sin [B or 1, n or 1, d] -> q and k turned."""
        if is_replaying():
            return q, k
        if not q.dtype == k.dtype == cos.dtype == sin.dtype:  # theirs would widen
            return plainly(q, k, cos, sin, unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Rotated.apply(q, cos, sin), _Rotated.apply(k, cos, sin)

    return rotate


class _Rotated(torch.autograd.Function):
    """x·cos + (-x₂, x₁)·sin, x = (x₁, x₂) halves; laid out head by head, as it is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.strides = x.stride()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.mul(x, cos, out=out)
        (x1, x2), (sin1, sin2), (out1, out2) = (t.chunk(2, -1) for t in (x, sin, out))
        out1.addcmul_(x2, sin1, value=-1)
        out2.addcmul_(x1, sin2)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # In the order that the linear before it answered in, so that its backward need not copy.
        out = torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype, device=grad.device)
        torch.mul(grad, cos, out=out)
        (grad1, grad2), (sin1, sin2), (out1, out2) = (t.chunk(2, -1) for t in (grad, sin, out))
        out1.addcmul_(grad2, sin2)
        out2.addcmul_(grad1, sin1, value=-1)
        return out, None, None
