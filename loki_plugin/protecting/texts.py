"""The texts that protection reads: calibration prompts, files, and what the model writes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence

from torch import nn

from .. import ranks
from ..analysing.calibration.prompts import Text, load_prompts, read_dialogues
from ..analysing.calibration.sources import Record, load_records, record_of
from ..analysing.scores.cache import TEXTS, cache_folder, kept_file
from ..analysing.scores.pruning import prune
from ..args import LokiConfig
from ..choices import TEXT_TOKENS
from ..inputs import Inputs
from ..model.fingerprint import fingerprint
from ..model.writing import write_text
from . import own_text
from .keeping import by_one, key_of, read_kept

LOG = logging.getLogger("loki_plugin")
_WRITING = 3  # raised when the same model would write other texts


def protecting_prompts(
    tokenizer, config: LokiConfig, inputs: Inputs, unknown: frozenset[int] = frozenset()
) -> list[Text]:
    """The calibration prompts and `protect.text`, distinct ones once, in order.

    Args:
        unknown: ids of tokens that the model has not learned; prompts with them are left out, for
            letters that the model has written may be one token that the YAML adds.
    """
    settings = config.calibration.model_dump()
    found = load_prompts(tokenizer, **settings, records=inputs.records).prompts
    texts = [Text(p.ids, (len(p.ids) - 1,)) for p in found]
    distinct = list(dict.fromkeys(texts + read_dialogues(tokenizer, inputs.texts)))
    kept = [text for text in distinct if unknown.isdisjoint(text.ids)]
    if len(kept) < len(distinct):
        LOG.info("loki: %d texts with new tokens left out", len(distinct) - len(kept))
    return kept


def anchored(tokenizer, inputs: Inputs, among: Sequence[Text]) -> list[Text]:
    """What an anchor holds of the texts that protection reads: `protect.text`, where it has
    dialogues; else all of them, for in calibration prompts an answer begins too.

    Beside dialogues, calibration prompts keep less than they cost: few people ask the questions of
    a test, and one token of each begins an answer.

    Args:
        among: the texts that protection reads.
    """
    given = set(read_dialogues(tokenizer, inputs.texts))
    found = [text for text in among if text in given]
    return found if any(text.starts for text in found) else list(among)


def own_texts(
    model: nn.Module,
    tokenizer,
    config: LokiConfig,
    count: int | None = None,
    seed: int = 0,
    turns: bool = True,
) -> list[Record]:
    """What `protect.text: self` stands for: the model writes it once, and the cache keeps it.

    Under `torch.distributed` one rank works and all return its texts.

    Args:
        count: how many; None: `protect.count`.
        seed: of what is drawn.
        turns: whether the model knows the chat template.

    Raises:
        ValueError: as `write_texts`.
    """
    asked = count or config.protect.count, seed, turns
    found = ranks.broadcast(*by_one(model, lambda: _write(model, tokenizer, config, *asked)))
    # Earlier versions kept dialogues that the template does not tell.
    return [r for r in found if r.messages is None or own_text.is_told(tokenizer, r.messages)]


def told_of(texts: Sequence[Record]) -> str:
    """What the model wrote, in one line; without dialogues where its template begins no turn."""
    dialogues = sum(t.messages is not None for t in texts)
    told = f"the model wrote {dialogues} dialogues and {len(texts) - dialogues} plain texts"
    if dialogues:
        return told
    return f"{told}; to hold dialogues too set `chat_template`, or give some as `protect.text`"


def _write(
    model: nn.Module, tokenizer, config: LokiConfig, count: int, seed: int, turns: bool
) -> list[Record]:
    marks = own_text.Marks.of(model, tokenizer)
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    identity = {
        "written": [_WRITING, count, TEXT_TOKENS] + [seed] * (seed > 0),
        "fingerprint": fingerprint(model, unchanged=True),
        "template": getattr(tokenizer, "chat_template", None),
        "turns": turns,
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "marks": [marks.beginning, sorted(marks.ends)],
    }
    folder = cache_folder(config.cache_dir)
    path = kept_file(folder, TEXTS, key_of(identity))
    kept = read_kept(path, lambda: load_records(str(path)), "the model writes its texts again")
    if kept is not None:
        LOG.info("loki: texts that the model wrote found in the cache (%s)", path)
        return kept
    rows = own_text.write_texts(model, tokenizer, count, TEXT_TOKENS, seed=seed, turns=turns)
    try:
        write_text(path, own_text.lines(rows))
        LOG.info("loki: the model wrote %d texts (%s)", len(rows), path)
        prune(folder, config.cache_limit, keep=path.stem)
    except OSError as error:
        LOG.warning("loki: what the model wrote could not be kept in the cache: %s", error)
    return [record_of(row, f"text {i} of the model") for i, row in enumerate(rows, 1)]
