"""From final hidden states to p: the model's own head, without ever holding all logits."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

# Float32 logits held at once: what a cache holds, but rows enough to pay for reading the head, so
# that a 152k vocabulary never materialises L·S·B x V.
_LOGIT_BYTES, _LOGIT_ROWS = 16 << 20, 256


def resolve_targets(model, anatomy, hidden, targets: list[int | None]) -> torch.Tensor:
    """The tokens y [B]: as given, or the arg-max behind the final states `hidden` [B, 1, H]."""
    with _decoder_returns(anatomy.decoder) as head, torch.no_grad():
        predicted = head(model, hidden)[:, 0].argmax(-1)
    given = torch.tensor([-1 if t is None else t for t in targets]).to(predicted.device)
    return torch.where(given < 0, predicted, given)


def head_gradient(model, anatomy, hidden, y) -> tuple[torch.Tensor, torch.Tensor]:
    """∂(Σ log p)/∂hidden and p = softmax(logits)[y] of n rows per prompt, by the model's own head.

    `hidden` [B, n, H] -> [B, n, H] and [B, n].
    """
    flat = hidden.flatten(0, 1)
    of_y = y.repeat_interleave(hidden.shape[1])[:, None]
    upstream, p = torch.empty_like(flat), []
    text_config = model.config.get_text_config()
    chunk = max(_LOGIT_ROWS, _LOGIT_BYTES // (4 * text_config.vocab_size))
    with _decoder_returns(anatomy.decoder) as head:
        for part in range(0, len(flat), chunk):
            rows = slice(part, part + chunk)
            states = flat[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(model, states[None])
            # ∂log p/∂logits = onehot(y) - softmax(logits), written over the softmax itself.
            wide = torch.promote_types(logits.dtype, torch.float32)
            by_logits = logits[0].detach().to(wide).softmax(-1)
            p.append(by_logits.gather(1, of_y[rows]))
            by_logits.neg_().scatter_(1, of_y[rows], 1 - p[-1])
            by_logits = by_logits.to(logits.dtype)[None]
            upstream[rows] = torch.autograd.grad(logits, states, by_logits)[0]
    return upstream.view_as(hidden), torch.cat(p).view(hidden.shape[:2])


class _OnlyStates(BaseModelOutput):
    """What else a family reads from its decoder (past, cross attention, router logits) is None."""

    def __getattr__(self, name):
        return None


@contextmanager
def _decoder_returns(decoder: nn.Module):
    """Run the model's head alone: its decoder is short-circuited to hand back given states."""
    saved = decoder.__dict__.get("forward")

    def head(model, hidden):
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
