"""Does a layer let the stack's tokens meet? Asked by gradients, which no precision blurs.

The tokens of the stack all stand at the prompt's last position, so none may see another: what they
need of the prompt comes from what was kept of it. A layer with a mixer that the engine does not
know (a recurrence beside or instead of attention) takes them for a sequence. Then the derivative of
one token's answer by another token is not zero; where nothing mixes it is zero, exactly, whatever
the weights are rounded to.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ...model.anatomy import Anatomy
from ...model.hooks import removing
from ..calibration.prompts import Prompt
from .devices import first_device
from .engine import batch_state, padded, run_last, run_prefix, watched
from .replay import apart, call, hidden_of
from .stack import plain_token
from .widening import in_float32

# Tokens that are asked of each other; a mixer reaches half as far at least.
_TOKENS = 8


def mixing_layers(model: nn.Module, anatomy: Anatomy, ids: tuple[int, ...]) -> list[int]:
    """The layers whose code lets one token of the stack see another, on one prompt.

    `model` must be inside `quiet(model)`, and inside `widened`: a gradient that overflows is none.

    Raises:
        ValueError: a layer whose keys and values cannot be kept.
    """
    prompt = [Prompt(ids)]
    state = batch_state(anatomy, prompt)
    token_ids = padded(prompt, first_device(model))
    found: list[int] = []
    asking = False

    def ask(index: int) -> Callable[[nn.Module, tuple, dict, Any], None]:
        def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            nonlocal asking
            if asking:
                return
            asking = True
            try:
                if _mixes(layer, args, kwargs):
                    found.append(index)
            finally:
                asking = False

        return hook

    with state, watched(model, anatomy, state):
        run_prefix(anatomy, state, token_ids)
        with ExitStack() as hooks:
            for i, layer in enumerate(anatomy.layers):
                handle = layer.register_forward_hook(ask(i), with_kwargs=True)
                hooks.enter_context(removing(handle))
            with torch.no_grad():
                run_last(anatomy, state, token_ids)
    return found


def _mixes(layer: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether the middle one of some tokens near a layer's own input depends on any other."""
    hidden = plain_token(hidden_of(args, kwargs), layer)  # [1, 1, H]
    noise = torch.Generator().manual_seed(0)

    # As large as the token, so that no two are alike.
    size = hidden.square().mean().sqrt()
    drawn = torch.randn(1, _TOKENS, hidden.shape[-1], generator=noise)
    tokens = hidden + size * drawn.to(hidden)  # [1, n, H]
    middle = _TOKENS // 2
    # The backward reads the weights again.
    with in_float32(layer), torch.enable_grad():
        tokens.requires_grad_()
        answer = call(layer, args, apart(kwargs), tokens)
        # A random direction: what a norm answers sums to nothing.
        answer = answer.reshape(_TOKENS, -1)[middle]
        upstream = torch.randn(len(answer), generator=noise).to(answer)
        (gradient,) = torch.autograd.grad(answer, tokens, upstream)
    gradient[:, middle] = 0
    return not bool((gradient == 0).all())
