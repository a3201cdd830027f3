"""Axolotl's `tiled_mlp` cuts an MLP's tokens into shards: who watches a linear sees the last."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

_TILED, _WHOLE = "tiled_mlp_forward", "inner_forward"


@contextmanager
def untiled(model: nn.Module) -> Iterator[None]:
    """For the duration, MLPs that Axolotl has tiled run whole.

    A tiled MLP also remembers, at its first call, which of its parameters train; one called before
    the adapter is there would never train it.
    """
    saved = []
    try:
        for module in model.modules():
            whole = _whole(module)
            if whole is not None:
                saved.append((module, module.__dict__.get("forward")))
                module.forward = MethodType(whole, module)
        yield
    finally:
        for module, forward in saved:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _whole(module: nn.Module) -> Any:
    """The forward that a tiled one runs on every shard; None where a module is not tiled."""
    forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    if getattr(forward, "__name__", None) != _TILED:
        return None
    return inspect.getclosurevars(forward).nonlocals.get(_WHOLE)
