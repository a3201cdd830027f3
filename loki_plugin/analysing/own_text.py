"""What a model writes by itself: text like what it has learned from, and no data is needed.

Dialogues: behind the beginning of a user's turn a chat model writes what a user would say (Magpie,
arXiv 2406.08464), and then answers. Plain text: behind the token that begins a text. Both are drawn
from the model's own distribution, at temperature 1 and without a cut. SA-SFT (arXiv 2602.20162)
replays such dialogues; here they are also what protection can see.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from .. import ranks
from ..choices import TEXT_BATCH, TEXT_COUNT, TEXT_TOKENS, TextKind
from ..model.quantised import evaluating
from .attribution.devices import first_device, give_back, out_of_memory
from .calibration.prompts import chat

LOG = logging.getLogger("loki_plugin")
_WORDS = "WHAT-A-USER-SAYS"  # stands in for them in the chat template


def write_texts(
    model: nn.Module,
    tokenizer: Any,
    count: int = TEXT_COUNT,
    tokens: int = TEXT_TOKENS,
    kind: TextKind = "both",
    seed: int = 0,
    batch_size: int = TEXT_BATCH,
) -> list[dict[str, Any]]:
    """Let `model` write: `{"messages": [...]}`, what a user says and its answer, `{"text": ...}`.

    The state of the random generators is put back. Empty texts and repeated ones are left out, so
    that fewer than `count` may come.

    Args:
        count: dialogues and texts together, half of each; texts only, where the tokenizer has no
            chat template or the template begins no user's turn.
        tokens: at most so many in a text, in a user's words, and in an answer.
        kind: dialogues, text, or both.
        batch_size: how many are written at once; halved where memory runs out.

    Raises:
        ValueError: no token begins a text, or nothing usable was written.
    """
    turn = None if kind == "text" else user_turn(tokenizer)
    if turn is None and kind == "dialogues":
        raise ValueError(
            "the tokenizer has no chat template that begins a user's turn, so the model cannot"
            " write dialogues; ask for plain text"
        )
    dialogues = 0 if turn is None else count // (1 + (kind == "both"))
    stop = _ends(model, tokenizer)
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    passes = 2 * dialogues + (count - dialogues)
    hidden = not ranks.is_first()
    with (
        torch.random.fork_rng(sorted(devices)),
        evaluating(model),
        tqdm(total=passes, desc="loki: the model writes", unit=" texts", disable=hidden) as bar,
    ):
        torch.manual_seed(seed)

        def go_on(starts: Sequence[list[int]]) -> list[list[int]]:
            return _continued(model, starts, tokens, stop, batch_size, bar.update)

        found: list[dict[str, Any]] = []
        if turn is not None:
            before, behind = turn
            start = tokenizer(before, add_special_tokens=False)["input_ids"]
            said = [_words(tokenizer, ids, behind) for ids in go_on([start] * dialogues)]
            asked = list(dict.fromkeys(filter(None, said)))
            bar.update(dialogues - len(asked))
            begun = [chat(tokenizer, [("user", words)], "a text of the model") for words in asked]
            for words, ids in zip(asked, go_on(begun), strict=True):
                if answer := _words(tokenizer, ids):
                    messages = [("user", words), ("assistant", answer)]
                    found.append({"messages": [{"role": r, "content": c} for r, c in messages]})
        if count > dialogues:
            start = [_beginning(model, tokenizer)]
            texts = [_words(tokenizer, ids) for ids in go_on([start] * (count - dialogues))]
            found += [{"text": text} for text in dict.fromkeys(filter(None, texts))]
    give_back()
    if not found:
        raise ValueError("the model wrote nothing but empty texts; is its tokenizer the right one?")
    if len(found) < count:
        LOG.info("loki: of %d texts %d are empty or repeated", count, count - len(found))
    return found


def lines(written: Sequence[dict[str, Any]]) -> str:
    """The same as the lines of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)


def user_turn(tokenizer: Any) -> tuple[str, str] | None:
    """What the chat template puts before and behind a user's words; None where it does not tell."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": _WORDS}], add_generation_prompt=True, tokenize=False
    )
    before, found, behind = told.partition(_WORDS)
    # A blank belongs to the word that follows it.
    return (before.rstrip(" "), behind.strip()) if found and before.strip() else None


def _words(tokenizer: Any, ids: Sequence[int], behind: str = "") -> str:
    """What was written, up to what ends a user's turn where that is written out."""
    words = tokenizer.decode(ids, skip_special_tokens=True)
    return (words.partition(behind.split()[0])[0] if behind else words).strip()


def _beginning(model: nn.Module, tokenizer: Any) -> int:
    """The token behind which a text begins: also the one that ended the text before."""
    settings = model.generation_config
    ends = settings.eos_token_id
    last = ends[0] if isinstance(ends, list) else ends
    for token in (tokenizer.bos_token_id, settings.bos_token_id, last, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "neither tokenizer nor model names a token that begins or ends a text, so the model cannot"
        " write one; set `bos_token` or `eos_token`"
    )


def _ends(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every token that is no text, and what the model itself ends with."""
    marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ends = model.generation_config.eos_token_id
    marks |= set(ends if isinstance(ends, list) else [ends, tokenizer.eos_token_id])
    return sorted(marks - {None})


@torch.no_grad()
def _continued(
    model: nn.Module,
    starts: Sequence[list[int]],
    tokens: int,
    stop: list[int],
    batch_size: int,
    done: Callable[[int], Any],
) -> list[list[int]]:
    """What the model writes behind each start, without the token that ends it."""
    written: list[list[int]] = []
    while len(written) < len(starts):
        batch = starts[len(written) : len(written) + batch_size]
        try:
            new = _generate(model, batch, tokens, stop)
        except RuntimeError as error:
            if not out_of_memory(error) or batch_size == 1:
                raise
            new = None
        if new is None:  # outside the handler, whose traceback keeps the batch's tensors alive
            batch_size = max(1, min(batch_size, len(batch)) // 2)
            give_back()
            LOG.info("loki: out of memory, going on with %d texts at once", batch_size)
            continue
        written += new
        done(len(batch))
    return written


def _generate(
    model: nn.Module, starts: Sequence[list[int]], tokens: int, stop: list[int]
) -> list[list[int]]:
    device, width = first_device(model), max(map(len, starts))
    pad = stop[0] if stop else 0
    ids = torch.tensor([[pad] * (width - len(s)) + s for s in starts], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in starts], device=device)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=tokens,
        eos_token_id=stop or None,
        pad_token_id=pad,
        use_cache=True,
    )
    said = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    ends = set(stop)
    new = said[:, width:].tolist()
    return [row[: next((i for i, t in enumerate(row) if t in ends), len(row))] for row in new]
