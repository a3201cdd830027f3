"""What Axolotl puts into a model for long and packed sequences, taken out for passes of our own.

`tiled_mlp` cuts an MLP's tokens into shards: who watches a linear sees the last. `sample_packing`
makes recurrences look for the beginnings of sequences in the position ids, which are then taken for
a packed batch of one row. Our passes have whole prompts, one in each row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn

_TILED, _UNTILED = "tiled_mlp_forward", "inner_forward"
# Axolotl's functions from position ids to where sequences begin; None: nowhere.
_BEGINNINGS = ("get_cu_seqlens", "get_seq_idx")


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """For the duration, MLPs that Axolotl has tiled run whole, and no batch counts as packed.

    A tiled MLP also remembers, at its first call, which of its parameters train; one called before
    the adapter is there would never train it.
    """
    forwards: list[tuple[Any, Any]] = []
    names: list[tuple[dict, str, Any]] = []
    try:
        for module in model.modules():
            whole = _untiled(module)
            if whole is not None:
                forwards.append((module, module.__dict__.get("forward")))
                module.forward = MethodType(whole, module)
        for space in namespaces(model):
            for name in _BEGINNINGS:
                own = space.get(name)
                if getattr(own, "__module__", "").startswith("axolotl."):
                    names.append((space, name, own))
                    space[name] = _nowhere
        yield
    finally:
        for module, forward in forwards:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        for space, name, own in names:
            space[name] = own


def namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """Where the code of a model's modules looks its functions up."""
    found: dict[int, dict[str, Any]] = {}
    for kind in {type(module) for module in model.modules()}:
        space = getattr(inspect.unwrap(kind.forward), "__globals__", None)
        if space is not None:
            found[id(space)] = space
    return list(found.values())


def _nowhere(position_ids: Any) -> None:
    return None


def _untiled(module: nn.Module) -> Any:
    """The forward that a tiled one runs on every shard; None where a module is not tiled."""
    forward = inspect.unwrap(getattr(module.forward, "__func__", module.forward))
    if getattr(forward, "__name__", None) != _TILED:
        return None
    return inspect.getclosurevars(forward).nonlocals.get(_UNTILED)
