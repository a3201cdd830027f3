"""What low-rank updates read, set from what a trainer trains on, whatever trainer it is."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from .. import ranks
from ..analysing.calibration.rendering import dialogue
from ..args import LokiConfig
from ..choices import TASK_TOKENS
from ..model.positions import positions_of
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
    """The linears of which only lora_B will train, as `protect.freeze_a` has it: those of which it
    trains whole."""
    from ..model.anatomy import find_anatomy

    if not config.protect.freeze_a:
        return []
    anatomy = find_anatomy(model)
    rows = zip(anatomy.names, selection.counts, strict=True)
    every = config.rank is not None
    whole = [name for name, count in rows if every and count == anatomy.hidden_size]
    return [*whole, *selection.linears]


def let_stand_still(
    trainer: Any,
    selection: RowSelection,
    still: Sequence[str],
    general: Sequence[Sequence[int]],
    config: LokiConfig,
    goes_on: bool,
) -> tuple[list[Line], dict[str, Any]]:
    """Set what low-rank updates read, before the optimizer is made; says what was done, and for the
    report of how many texts and tokens of the task it is, and beside what of general text.

    Args:
        still: the linears of which only lora_B trains.
        general: token ids of the texts that protection reads.
        goes_on: an adapter trains on, and keeps what it reads.
    """
    from ..picturing.telling import beside
    from ..protecting.fixing import fix_reads
    from ..protecting.preparing import all_wanted
    from ..protecting.sharing import shared_reads

    model, told = trainer.model, f"of {len(still)} low-rank updates only lora_B trains"
    if not still:
        kept = "lora_A trains, as it did before: `freeze_a` is for fresh adapters"
        asked = goes_on and bool(standing_still(model, selection, config))
        return [("reads", kept)] * asked, {"set_from": None}
    if goes_on:
        fix_reads(model)
        return [("reads", f"{told}, as before")], {"set_from": None}
    with ranks.together():
        texts = task_texts(trainer) if ranks.is_first() else []
    texts = ranks.broadcast(texts)
    wanted, cache = all_wanted(config), (config.cache_dir, config.cache_limit)
    reads = shared_reads(model, texts, general, wanted, *cache)
    fix_reads(model, reads.a)
    there = reads.report() | {"tokens": sum(map(len, general))}
    found: dict[str, Any] = {
        "set_from": {"texts": len(texts), "tokens": sum(map(len, texts))},
        "set_beside": there,
    }
    behind = f", {beside(there)}" if reads.behind else ""
    if there["capped"]:
        LOG.warning(
            "loki: at %d of %d inputs low-rank updates are set beside fewer directions than hold"
            " %g %% of what general text reads there, the leading ones: there are %d tokens of it."
            " More calibration prompts, or texts in `protect.text`, give more",
            there["capped"],
            len(reads.behind),
            100 * (wanted.energy or 0),
            there["tokens"],
        )
    if texts:
        told += f"; lora_A is set from {len(texts)} texts of yours,"
        told += f" {found['set_from']['tokens']:,} tokens{behind}"
        return [("reads", told)], found
    LOG.warning(
        "loki: the training set holds no token ids that can be read yet, so what low-rank updates"
        " read is drawn, and they will learn more slowly; `protect: {auto: true, freeze_a: false}`"
        " lets it train"
    )
    told += f"; lora_A stays as drawn, behind what general text reads{behind}"
    return [("reads", told)], found


def task_texts(trainer: Any) -> list[list[int]]:
    """Texts of the training set, evenly spaced, or the first ones of a stream.

    Tokens are taken as the trainer has them: `input_ids`, or a prompt with its chosen answer. What
    is still words, prompts alone (GRPO) or messages beside images, the tokenizer tells. Empty:
    there are none that could be read.
    """
    tokenizer = getattr(trainer, "processing_class", None)
    longest = min(LONGEST, positions_of(trainer.model) or LONGEST)
    found, tokens, failed = [], 0, []
    # A packed stream draws as it is read; neither it nor what the run draws may depend on that.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for row in _some(getattr(trainer, "train_dataset", None)):
            try:
                ids = _ids(row, tokenizer)[-longest:]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                failed.append(error)  # the trainer has its own way with such a row
                continue
            if len(ids) > 1 and tokens + len(ids) <= TASK_TOKENS:
                found.append(ids)
                tokens += len(ids)
    if failed:
        LOG.warning(
            "loki: %d rows of the training set could not be told as text, and say nothing of what"
            " updates shall read; the last one: %r",
            len(failed),
            failed[-1],
        )
    return found


def _some(dataset: Any) -> Iterable[Any]:
    """Rows from all over a set; the first half of them are too, and so on, for long texts fill the
    limit before all have been read."""
    if dataset is None:
        return ()
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return islice(dataset, TEXTS)
    count, bits = len(dataset), TEXTS.bit_length() - 1
    turns = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(TEXTS))
    places = dict.fromkeys(turn * count // TEXTS for turn in turns) if count else ()
    return (dataset[i] for i in places)


def _ids(row: Any, tokenizer: Any) -> list[int]:
    """Token ids of a row, without padding; none where it has another form."""
    if not isinstance(row, Mapping):
        return []
    for parts in _COLUMNS:
        found = [_listed(row.get(part)) for part in parts]
        if all(_is_ids(ids) for ids in found):
            ids, mask = [i for some in found for i in some], _listed(row.get("attention_mask"))
            if len(parts) == 1 and _is_ids(mask) and len(mask) == len(ids):
                return [i for i, real in zip(ids, mask, strict=True) if real]
            while ids and ids[-1] == getattr(tokenizer, "pad_token_id", None):
                ids.pop()
            return ids
    told = row["prompt"] if row.get("prompt") is not None else row.get("messages")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has one
    if isinstance(told, str) and callable(tokenizer):
        return list(tokenizer(told)["input_ids"])
    if isinstance(told, list) and getattr(tokenizer, "chat_template", None):

        def rendered(more: str = "") -> list[int]:
            turns = [{**t, "role": t["role"], "content": _text(t.get("content")) + more}
                     for t in told]  # fmt: skip
            return dialogue(tokenizer, turns, "a row", answer="prompt" in row, whole=False)

        ids = rendered()
        if ids == rendered(more=" Apples"):
            raise ValueError("the chat template leaves out what is said")
        return ids
    return []


def _text(content: Any) -> str:
    """What a turn says; of one in parts, as of an image and a question, the words."""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text") or "" for part in content or ()).strip()


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(token, int) for token in value)
