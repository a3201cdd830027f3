"""Some models look at what follows too, and so at padding, wherever it stands."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from .quantised import evaluating

_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_TOKENS = 6  # of the text that tells
# KL in nats: rounding to 16 bits stays below it, and what is below it does no harm.
_ROUNDING = 1e-3


@torch.no_grad()
def looks_ahead(model: nn.Module) -> bool:
    """Whether what `model` says of a token depends on what stands behind it (PaliGemma, BERT).

    Texts of different length then cannot share a batch without a mask. Asked once per model, with
    two short passes.
    """
    if model not in _known:
        embeddings = model.get_input_embeddings()
        ids = (
            torch.arange(1, _TOKENS + 1, device=embeddings.weight.device)
            % embeddings.num_embeddings
        )
        with evaluating(model):
            whole, half = (
                model(input_ids=part[None], use_cache=False).logits[0, : _TOKENS // 2].double()
                for part in (ids, ids[: _TOKENS // 2])
            )
        p, q = whole.log_softmax(-1), half.log_softmax(-1)
        kl = (p.exp() * (p - q)).masked_fill(p.isneginf(), 0).sum(-1)
        _known[model] = bool(kl.max() > _ROUNDING)
    return _known[model]
