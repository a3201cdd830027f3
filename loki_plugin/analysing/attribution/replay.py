"""A layer's own code run on answers that are given to it."""

from __future__ import annotations

from collections.abc import MutableMapping
from copy import copy
from typing import Any

import torch
from torch import nn

from ...model.anatomy import in_attention, linear_sizes
from ...model.hooks import answering
from .attention import AttentionState, Mode

# What a layer was called with, as its hooks see it.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def hidden_of(args: Args, kwargs: Kwargs) -> torch.Tensor:
    """The hidden states [B, n, H] among a layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def call(layer: nn.Module, args: Args, kwargs: Kwargs, hidden: torch.Tensor) -> torch.Tensor:
    """Call a layer as it was called, on other hidden states [B, n, H]; returns such."""
    if args:
        output = layer(hidden, *args[1:], **kwargs)
    else:
        output = layer(**{**kwargs, "hidden_states": hidden})
    return output[0] if isinstance(output, tuple) else output


def apart(kwargs: Kwargs) -> Kwargs:
    """What a layer may be called with once more: layers that share keys (Gemma 4) hand them on in a
    dict, which nothing but the pass itself may write to."""
    return {k: copy(v) if isinstance(v, MutableMapping) else v for k, v in kwargs.items()}


def replay(
    state: AttentionState,
    layer: nn.Module,
    args: Args,
    kwargs: Kwargs,
    hidden: torch.Tensor,
    answers: dict[nn.Module, torch.Tensor],
) -> torch.Tensor:
    """The layer's own code on `hidden` [B, n, H] where linears answer what they are given.

    `answers`: per linear [B, n, F]. Only norms and residual sums are computed: whatever the family
    does between its linears is exact, and costs next to nothing.
    """
    mode, state.mode = state.mode, Mode.REPLAY
    try:
        with answering(answers):
            return call(layer, args, apart(kwargs), hidden)
    finally:
        state.mode = mode


def linears_of(layer: nn.Module) -> dict[str, nn.Module]:
    """The linears of a layer by their names in it; a PEFT layer counts as one."""
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        if linear_sizes(module) and not any(name.startswith(n + ".") for n in found):
            found[name] = module
    return found


def known_answers(
    layer: nn.Module, down: nn.Module, memo: dict[nn.Module, torch.Tensor]
) -> dict[nn.Module, torch.Tensor]:
    """The answers in `memo`, kept in call order, that do not depend on the down-projection.

    Those are attention's and all before it; a linear that ran after it (Gemma 4 has some) runs.
    """
    order = {module: i for i, module in enumerate(memo)}
    return {
        m: memo[m]
        for name, m in linears_of(layer).items()
        if m in memo and (in_attention(name) or order[m] < order[down])
    }
