"""What low-rank updates read, set from what a trainer trains on, whatever trainer it is."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from .. import ranks
from ..args import LokiConfig
from ..choices import TASK_TOKENS
from ..rows import RowSelection
from .telling import Line

LOG = logging.getLogger("loki_plugin")

# As many texts, of so many tokens, as tell what a task uses: a rank needs no more than some
# thousand tokens. Of a longer text the end counts, where its answers are.
TEXTS, LONGEST = 64, 2048
# Columns whose ids make a text, of SFT, DPO, KTO, and ORPO and SimPO.
_COLUMNS = (
    ("input_ids",),
    ("prompt_ids", "chosen_ids"),
    ("prompt_ids", "completion_ids"),
    ("chosen_input_ids",),
)


def standing_still(model, selection: RowSelection, config: LokiConfig) -> list[str]:
    """The linears of which only lora_B will train, as `protect.freeze_a` has it."""
    from ..model.anatomy import find_anatomy

    if not config.protect.freeze_a:
        return []
    rows = zip(find_anatomy(model).names, selection.counts, strict=True)
    low = [name for name, count in rows if count and config.rank is not None]
    return [*low, *selection.linears]


def let_stand_still(
    trainer: Any,
    selection: RowSelection,
    still: Sequence[str],
    general: Sequence[Sequence[int]],
    config: LokiConfig,
    goes_on: bool,
) -> list[Line]:
    """Set what low-rank updates read, before the optimizer is made; says what was done.

    Args:
        still: the linears of which only lora_B trains.
        general: token ids of the texts that protection reads.
        goes_on: an adapter trains on, and keeps what it reads.
    """
    from ..protecting.fixing import fix_reads, shared_reads
    from ..protecting.preparing import all_wanted

    model, told = trainer.model, f"of {len(still)} low-rank updates only lora_B trains"
    if not still:
        if goes_on and config.protect.freeze_a and (selection.linears or config.rank):
            return [("reads", "lora_A trains, as it did before: `freeze_a` is for fresh adapters")]
        return []
    if goes_on:
        fix_reads(model)
        return [("reads", f"{told}, as before")]
    with ranks.together():
        texts = task_texts(trainer)
    texts = ranks.broadcast(texts)
    wanted, cache = all_wanted(config), (config.cache_dir, config.cache_limit)
    fix_reads(model, shared_reads(model, texts, general, wanted, *cache))
    if not texts:
        LOG.warning(
            "loki: the training set holds no token ids that can be read yet, so what low-rank"
            " updates read is drawn, and they will learn more slowly; `protect: {auto: true,"
            " freeze_a: false}` lets it train"
        )
        return [("reads", f"{told}; lora_A stays as drawn, behind what general text reads")]
    tokens = sum(map(len, texts))
    return [("reads", f"{told}; lora_A is set from {len(texts)} texts of yours, {tokens:,} tokens")]


def task_texts(trainer: Any) -> list[list[int]]:
    """Texts of the training set, evenly spaced, or the first ones of a stream.

    Tokens are taken as the trainer has them: `input_ids`, or a prompt with its chosen answer. What
    is still words, prompts alone (GRPO) or messages beside images, the tokenizer tells. Empty:
    there are none that could be read.
    """
    found, tokens = [], 0
    for row in _some(getattr(trainer, "train_dataset", None)):
        ids = _ids(row, getattr(trainer, "processing_class", None))[-LONGEST:]
        if len(ids) > 1 and tokens + len(ids) <= TASK_TOKENS:
            found.append(ids)
            tokens += len(ids)
    return found


def _some(dataset: Any) -> Iterable[Mapping[str, Any]]:
    if dataset is None:
        return ()
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return islice(dataset, TEXTS)
    count = len(dataset)
    places = dict.fromkeys(i * count // TEXTS for i in range(TEXTS)) if count else ()
    return (dataset[i] for i in places)


def _ids(row: Any, tokenizer: Any) -> list[int]:
    if not isinstance(row, Mapping):
        return []
    for parts in _COLUMNS:
        if all(_is_ids(row.get(part)) for part in parts):
            return [int(token) for part in parts for token in row[part]]
    told = row.get("prompt") or row.get("messages")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    if isinstance(told, str) and callable(tokenizer):
        return list(tokenizer(told)["input_ids"])
    if isinstance(told, list) and getattr(tokenizer, "chat_template", None):
        turns = [{"role": turn["role"], "content": _text(turn["content"])} for turn in told]
        asks = {"add_generation_prompt": "prompt" in row, "return_dict": False}
        return list(tokenizer.apply_chat_template(turns, tokenize=True, **asks))
    return []


def _text(content: Any) -> str:
    """What a turn says; of one in parts, as of an image and a question, the words."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or "" for part in content or ()).strip()


def _is_ids(value: Any) -> bool:
    if hasattr(value, "tolist"):
        value = value.tolist()
    return isinstance(value, Sequence) and all(isinstance(token, int) for token in value)
