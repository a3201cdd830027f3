"""The texts on which forgetting is measured while it trains, and how many a run can pay for.

Calibration prompts that protection does not see, one of `APART`, and what the model writes by
itself for this alone. Whatever protects a run, the texts are the same for one model and one
calibration, so that runs can be compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from torch import nn
from transformers.trainer_utils import IntervalStrategy

from ..analysing.calibration.prompts import Text, read_dialogues
from ..analysing.calibration.sources import Record
from ..analysing.scores.cache import HELD_BACK, cache_folder, kept_file
from ..analysing.scores.pruning import prune
from ..args import LokiConfig
from ..inputs import Inputs
from ..model.writing import write_text
from ..protecting.keeping import key_of
from ..protecting.texts import own_texts, protecting_prompts

LOG = logging.getLogger("loki_plugin")
APART = 8  # one of so many calibration prompts is held back
MOST = 16  # prompts, and texts of the model
SEED = 1  # another one than that of the texts that protect
SHARE = 0.05  # of a run's work, for all evaluations together
LEAST = 4  # texts that are read however short a run is
# In passes of one token: training goes forward and twice as long back; base and tuned go forward.
_TRAINING, _OURS = 3, 2
_SAMPLES = 64  # rows of the data whose length is looked at
_IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")  # preferences have these


def held_back(
    model: nn.Module,
    tokenizer: Any,
    config: LokiConfig,
    inputs: Inputs,
    unknown: frozenset[int] = frozenset(),
) -> tuple[list[Text], list[Text]]:
    """Calibration prompts and own texts of a model, at most `MOST` of each.

    None of the prompts where the calibration was not read or has one prompt only; no own texts
    where the model cannot write.

    Args:
        unknown: ids of tokens that the model has not learned; texts with them are left out.
    """
    prompts: list[Text] = []
    if inputs.records:
        prompts = protecting_prompts(tokenizer, config, replace(inputs, texts=[]), unknown)
    apart = min(max(APART, ceil(len(prompts) / MOST)), max(2, len(prompts)))
    own = dict.fromkeys(read_dialogues(tokenizer, _written(model, tokenizer, config, inputs.turns)))
    chosen = prompts[apart - 1 :: apart]
    return chosen, [t for t in own if unknown.isdisjoint(t.ids) and t not in chosen]


def _written(model: nn.Module, tokenizer: Any, config: LokiConfig, turns: bool) -> list[Record]:
    try:
        return own_texts(model, tokenizer, config, MOST, SEED, turns)
    except Exception as error:  # what is measured must not cost the training
        LOG.warning("loki: forgetting is measured on calibration prompts only: %s", error)
        return []


def keep(prompts: Sequence[Text], own: Sequence[Text], config: LokiConfig) -> str | None:
    """Keep the texts in the cache, not beside an adapter that may be published; returns their key.

    None where the cache cannot be written: they are then gone when the run ends.
    """
    ids = {"prompts": [list(t.ids) for t in prompts], "own": [list(t.ids) for t in own]}
    folder, key = cache_folder(config.cache_dir), key_of(ids)
    try:
        write_text(kept_file(folder, HELD_BACK, key), json.dumps(ids) + "\n")
        prune(folder, config.cache_limit, keep=key)
    except OSError as error:
        LOG.warning("loki: the texts that were held back could not be kept: %s", error)
        return None
    return key


def kept_texts(key: str, cache_dir: str | None) -> tuple[list[Text], list[Text]]:
    """What `keep` kept.

    Raises:
        ValueError: it is not there any more.
    """
    file = kept_file(cache_folder(cache_dir), HELD_BACK, key)
    try:
        ids = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--held-back: the texts that the run held back are not in the cache any more ({error})"
        ) from error
    prompts, own = ([Text(tuple(i)) for i in ids[kind]] for kind in ("prompts", "own"))
    return prompts, own


def evaluations(args: Any, state: Any) -> float:
    """How often a trainer evaluates in all.

    Args:
        args, state: of a `Trainer` whose training begins.
    """
    every = state.eval_steps or 1
    if args.eval_strategy == IntervalStrategy.EPOCH:
        every = state.max_steps / max(1, state.num_train_epochs)
    return state.max_steps / every + bool(args.eval_on_start)


def affordable(trained: float, times: float) -> float:
    """Tokens of text that `times` evaluations may each read beside `trained` tokens of training."""
    return SHARE * _TRAINING * trained / (_OURS * times)


def within(
    prompts: Sequence[Text], own: Sequence[Text], tokens: float
) -> tuple[list[Text], list[Text]]:
    """As many of both as have at most `tokens` tokens together, but `LEAST`; evenly chosen."""
    for count in range(max(len(prompts), len(own)), 0, -1):
        some = _spread(prompts, count), _spread(own, count)
        few = len(some[0]) + len(some[1]) <= LEAST
        if few or sum(len(t.ids) for t in some[0] + some[1]) <= tokens:
            return some
    return list(prompts), list(own)


def _spread(texts: Sequence[Text], count: int) -> list[Text]:
    count = min(count, len(texts))
    return [texts[i * len(texts) // count] for i in range(count)]


def row_length(data: Any) -> float | None:
    """Tokens of a row of a trainer's data, the mean of some rows; None where it cannot be told."""
    try:
        count = min(_SAMPLES, len(data))
        rows = [data[i * len(data) // count] for i in range(count)]
    except (TypeError, NotImplementedError):  # a stream
        return None
    found = [
        len(ids)
        for row in rows
        for name, ids in row.items()
        if name.endswith("input_ids") or name in _IDS
    ]
    return sum(found) / len(rows) if found else None
