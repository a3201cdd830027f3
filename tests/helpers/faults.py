"""Faults put into the fast analysis, of a size that can be set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loki_plugin.analysing.attribution import engine

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def values_off(size: float, layer: int = 1, only_half: bool = False) -> Iterator[None]:
    """For the duration, what the stack sees of the prompt in one layer is off by noise of that
    share: the values that it attends to, and a recurrence's state.

    With `only_half`, where it is in half precision: a kernel that is wrong there alone.
    """
    right = engine.run_prefix

    def off(tensor: torch.Tensor) -> torch.Tensor:
        if only_half and tensor.dtype not in HALF:
            return tensor
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
        return tensor + size * tensor.square().mean().sqrt() * noise

    def wrong(anatomy, state, ids):
        right(anatomy, state, ids)
        if layer in state.values:
            state.values[layer] = off(state.values[layer])
        for key, kept in state.kept.items():
            if key[0] == layer:
                # What a scan kept stands before the dtype of its answer.
                state.kept[key] = (
                    (off(kept[0]), *kept[1:]) if isinstance(kept, tuple) else off(kept)
                )

    engine.run_prefix = wrong
    try:
        yield
    finally:
        engine.run_prefix = right


class Shifted(nn.Module):
    """A norm whose answer mixes in a little of the token before: a mixer that nobody knows."""

    def __init__(self, norm: nn.Module, share: float):
        super().__init__()
        self.norm, self.share = norm, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H] -> [B, T, H]"""
        answer = self.norm(x)
        before = torch.cat([torch.zeros_like(answer[:, :1]), answer[:, :-1]], 1)
        return answer + self.share * before
