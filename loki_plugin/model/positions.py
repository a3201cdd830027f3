"""Models that have a table of positions read no longer texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

_POSITIONS = re.compile(r"wpe|pos(ition)?s?(_|$)")
# Their tables are not modules beside the tokens' embeddings, and end too.
_OF_OTHERS = ("gptj", "codegen", "ctrl", "roformer")


def positions_of(model: nn.Module) -> int | None:
    """The tokens that a model with a table of positions can read (GPT-2, OPT); None: any number."""
    config = model.config.get_text_config()
    if config.model_type in _OF_OTHERS:
        return config.max_position_embeddings
    tokens = model.get_input_embeddings()
    beside = (m for m in model.modules() if any(child is tokens for child in m.children()))
    for name, table in next(beside, model).named_children():
        if isinstance(table, nn.Embedding) and table is not tokens and _POSITIONS.search(name):
            behind = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa's places
            return table.num_embeddings - getattr(table, "offset", behind)
    return None


def check_lengths(model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    """Check that the model has positions for every prompt.

    Args:
        prompts: token ids.

    Raises:
        ValueError: one is longer; how many are, and what to do.
    """
    most = positions_of(model)
    longer = [len(ids) for ids in prompts if most is not None and len(ids) > most]
    if longer:
        raise ValueError(
            f"{len(longer)} of {len(prompts)} calibration prompts are too long for this model,"
            f" which has {most} positions; the longest has {max(longer)} tokens. Set"
            f" `calibration: {{max_tokens: {most}}}`, which drops longer ones"
        )
