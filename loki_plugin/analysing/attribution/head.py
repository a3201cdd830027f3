"""From final hidden states to p: the model's own head, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from ...model.anatomy import Anatomy
from ..calibration.prompts import Prompt
from .devices import send

# Float32 logits held at once: what a cache holds, but tokens enough to pay for reading the head, so
# that a 152k vocabulary never materialises L·S·B x V.
_LOGIT_BYTES, _LOGIT_TOKENS = 16 << 20, 256


def resolve_targets(
    model: nn.Module, anatomy: Anatomy, states: torch.Tensor, prompts: Sequence[Prompt]
) -> torch.Tensor:
    """The tokens y [B]: as given, or the arg-max behind the final states [B, H]."""
    given = torch.tensor([-1 if p.target is None else p.target for p in prompts])
    with torch.no_grad():
        # One sequence of B tokens, so that the head is one product.
        predicted = logits_of(model, anatomy, states[None].contiguous())[0].argmax(-1)
    given = send(given, predicted.device)
    return torch.where(given < 0, predicted, given)


def logits_of(model: nn.Module, anatomy: Anatomy, states: torch.Tensor) -> torch.Tensor:
    """The model's head on final states [B, n, H] -> [B, n, V]."""
    with _decoder_returns(anatomy.decoder) as head:
        return head(model, states)


def head_gradient(
    model: nn.Module, anatomy: Anatomy, hidden: torch.Tensor, y: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """∂(Σ log p)/∂hidden and p = softmax(logits)[y] of n tokens per prompt, by the model's head.

    `hidden` [B, n, H], `y` [B] -> [B, n, H] and [B, n], both where `hidden` is. A model over
    several devices may hand out its logits on another one.
    """
    flat = hidden.flatten(0, 1)  # [B·n, H]
    of_y = y.repeat_interleave(hidden.shape[1])[:, None]  # [B·n, 1]
    upstream, p = torch.empty_like(flat), []
    chunk = chunk_tokens(model.config.get_text_config().vocab_size)
    with _decoder_returns(anatomy.decoder) as head:
        for start in range(0, len(flat), chunk):
            part = slice(start, start + chunk)
            states = flat[part].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(model, states[None])  # [1, c, V]
            # ∂log p/∂logits = onehot(y) - softmax(logits), written over the softmax itself.
            wide = torch.promote_types(logits.dtype, torch.float32)
            by_logits = logits[0].detach().to(wide).softmax(-1)  # [c, V]
            chosen = of_y[part].to(logits.device, non_blocking=True)
            p.append(by_logits.gather(1, chosen))
            by_logits.neg_().scatter_(1, chosen, 1 - p[-1])
            by_logits = by_logits.to(logits.dtype)[None]
            upstream[part] = torch.autograd.grad(logits, states, by_logits)[0]
    by_token = torch.cat(p).to(hidden.device, non_blocking=True)  # [B·n, 1]
    return upstream.view_as(hidden), by_token.view(hidden.shape[:2])


def chunk_tokens(vocabulary: int) -> int:
    """How many tokens' logits are held at once."""
    return max(_LOGIT_TOKENS, _LOGIT_BYTES // (4 * vocabulary))


class _OnlyStates(BaseModelOutput):
    """What else a family reads from its decoder (past, cross attention, router logits) is None."""

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _decoder_returns(
    decoder: nn.Module,
) -> Iterator[Callable[[nn.Module, torch.Tensor], torch.Tensor]]:
    """Run the model's head alone: its decoder is short-circuited to hand back given states.

    Yields head(model, states [B, n, H]) -> logits [B, n, V].
    """
    saved = decoder.__dict__.get("forward")

    def head(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        states = _OnlyStates(last_hidden_state=hidden)
        decoder.forward = lambda *_, **__: states
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return model(input_ids=ids, use_cache=False).logits

    try:
        yield head
    finally:
        if saved is None:
            decoder.__dict__.pop("forward", None)
        else:
            decoder.forward = saved
