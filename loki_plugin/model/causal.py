"""Some models look at what follows too, and so at padding, wherever it stands."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from .quantised import evaluating

_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_TOKENS = 3  # that two texts begin with alike, and so many others behind them in each
# KL in nats: two rows of one batch differ by less where the rounding is to 16 bits.
_ROUNDING = 1e-3


@torch.no_grad()
def looks_ahead(model: nn.Module) -> bool:
    """Whether what `model` says of a token depends on what stands behind it (PaliGemma, BERT).

    By its logits; by its last hidden states where it has no head. Texts of different length then
    cannot share a batch without a mask. Asked once per model, with one short pass.
    """
    if model not in _known:
        embeddings = model.get_input_embeddings()
        first = torch.arange(1, 1 + 2 * _TOKENS)
        second = torch.cat([first[:_TOKENS], first[_TOKENS:] + _TOKENS])
        ids = torch.stack([first, second]).to(embeddings.weight.device) % embeddings.num_embeddings
        with evaluating(model):
            said = model(input_ids=ids, use_cache=False)
        said = said.logits if "logits" in said else said.last_hidden_state
        p, q = said[:, :_TOKENS].double().log_softmax(-1)
        kl = (p.exp() * (p - q)).masked_fill(p.isneginf(), 0).sum(-1)
        _known[model] = bool(kl.max() > _ROUNDING)
    return _known[model]
