"""Some models look at what follows too, and so at padding, wherever it stands."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn

from .quantised import evaluating

_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_TOKENS = 3  # that two texts begin with alike, and so many others behind them in each
# Of what is said, relative: two rows of one batch differ by less where rounding is to 16 bits.
_ROUNDING = 2e-2


@torch.no_grad()
def looks_ahead(model: nn.Module, decoder: nn.Module | None = None) -> bool:
    """Whether what `model` says of a token depends on what stands behind it (PaliGemma, BERT).

    Texts of different length then cannot share a batch without a mask. Asked once per module, with
    one short pass.

    Args:
        decoder: what of the model runs, by its last hidden states; None: all, by its logits.
    """
    asked = model if decoder is None else decoder
    if asked not in _known:
        embeddings = model.get_input_embeddings()
        first = torch.arange(1, 1 + 2 * _TOKENS)
        second = torch.cat([first[:_TOKENS], first[_TOKENS:] + _TOKENS])
        ids = torch.stack([first, second]).to(embeddings.weight.device) % embeddings.num_embeddings
        with evaluating(model):
            said = asked(input_ids=ids, use_cache=False)
        said = said.logits if decoder is None else said.last_hidden_state
        one, other = said[:, :_TOKENS].double()
        apart = (one - other).nan_to_num(0, 0, 0)  # logits that a model rules out are infinite
        _known[asked] = bool(apart.norm() > _ROUNDING * one.nan_to_num(0, 0, 0).norm())
    return _known[asked]
