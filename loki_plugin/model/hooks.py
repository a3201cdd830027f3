"""Hooks that go away again: on a module's call, or instead of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def removing(handle: RemovableHandle) -> Iterator[None]:
    """Keep a registered hook for the duration."""
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def answering(answers: dict[nn.Module, torch.Tensor]):
    """For the duration, each module's forward returns the given [B, S, F] tensor."""
    saved = {m: m.__dict__.get("forward") for m in answers}
    try:
        for module, answer in answers.items():
            module.forward = _answer(answer)
        yield
    finally:
        for module, forward in saved.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _answer(tensor):
    def forward(x, *_, **__):
        return tensor if x.dim() == 3 else tensor.reshape(-1, tensor.shape[-1])

    return forward
