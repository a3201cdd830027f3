"""What a model writes by itself: text like what it has learned from, and no data is needed.

Dialogues: behind the beginning of a user's turn a chat model writes what a user would say (Magpie,
arXiv 2406.08464), and then answers. Without a chat template it goes on with a list of what people
ask (see `asking`), and then with each of these. Plain text: behind the token that begins a text.
Both are drawn from the model's own distribution, at temperature 1 and without a cut. SA-SFT (arXiv
2602.20162) replays such dialogues; here they are also what protection can see.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from .. import ranks
from ..analysing.attribution.devices import first_device, give_back, out_of_memory
from ..analysing.attribution.quiet import attending
from ..analysing.calibration.rendering import chat, dialogue
from ..choices import TEXT_BATCH, TEXT_COUNT, TEXT_TOKENS, TextKind
from ..model.quantised import evaluating
from .asking import A_LIST, asked_in, lists

LOG = logging.getLogger("loki_plugin")
# Two users' words that begin and end differently: what stands around them is what they share.
_WORDS = ("Apples", "zigzag 7")


@dataclass(frozen=True)
class Turn:
    """A user's turn in the chat template.

    Attributes:
        start: token ids before the user's words.
        marks: added tokens behind them; one of these ends the words.
        behind: the first line of letters behind them, where no added token stands there; it ends
            the words too.
    """

    start: list[int]
    marks: frozenset[int]
    behind: str


@dataclass(frozen=True)
class Marks:
    """Token ids: behind `beginning` a text begins, each of `ends` is no text."""

    beginning: int
    ends: frozenset[int]

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any) -> Marks:
        """Every special token ends a text, and what the model itself ends with.

        Raises:
            ValueError: no token begins a text, nor ends the one before.
        """
        settings = model.generation_config
        ends = settings.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        special = [i for i, token in _added(tokenizer).items() if token.special]
        first = (tokenizer.bos_token_id, settings.bos_token_id, *ends, tokenizer.eos_token_id)
        beginning = next((i for i in first if i is not None), None)
        if beginning is None:
            raise ValueError(
                "neither tokenizer nor model names a token that begins or ends a text, so the model"
                " cannot write one; set `bos_token` or `eos_token`"
            )
        found = {*special, *tokenizer.all_special_ids, *ends, tokenizer.eos_token_id}
        return cls(beginning, frozenset(found - {None}))


def write_texts(
    model: nn.Module,
    tokenizer: Any,
    count: int = TEXT_COUNT,
    tokens: int = TEXT_TOKENS,
    kind: TextKind = "both",
    seed: int = 0,
    batch_size: int = TEXT_BATCH,
    finished: bool = False,
    turns: bool = True,
) -> list[dict[str, Any]]:
    """Let `model` write: `{"messages": [...]}`, what a user says and its answer, `{"text": ...}`.

    The state of the random generators is put back. Empty texts, repeated ones, and dialogues that
    the chat template does not tell as they stand are left out, so that fewer than `count` may come.

    Args:
        count: dialogues and texts together, half of each; texts only, where the chat template has
            tokens that are new to the model.
        tokens: at most so many in a text, in a user's words, and in an answer.
        kind: dialogues, text, or both.
        batch_size: how many are written at once; halved where memory runs out.
        finished: leave out dialogues that `tokens` cut off: who learns from them learns to stop.
        turns: whether the model knows the chat template. Behind the beginning of a turn that it
            does not know it writes anything; a list of what people ask is then begun for it too.

    Raises:
        ValueError: no token begins a text, or nothing usable was written.
    """
    marks = Marks.of(model, tokenizer)
    turn = None if kind == "text" else user_turn(model, tokenizer)
    if turn is None and kind == "dialogues":
        raise ValueError(
            "the tokenizer has no chat template that begins a user's turn, so dialogues alone would"
            " have no form to be learned in; leave `--kind` out, or give the tokenizer a template"
        )
    turn = turn if turns else None
    talks = kind != "text" and (turn is not None or not has_new_tokens(model, tokenizer))
    dialogues = count // (1 + (kind == "both")) if talks else 0
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    asking = dialogues if turn else -(-dialogues // A_LIST)
    passes = asking + dialogues + (count - dialogues)
    hidden = not ranks.is_first()
    found: list[dict[str, Any]] = []
    with (
        torch.random.fork_rng(sorted(devices)),
        evaluating(model),
        attending(model, "sdpa" if model._supports_sdpa else "eager"),
        _own_settings(model),
        tqdm(total=passes, desc="loki: the model writes", unit=" pieces", disable=hidden) as bar,
    ):
        torch.manual_seed(seed)

        def go_on(starts: Sequence[list[int]], stop: frozenset[int]) -> list[list[int]]:
            return _continued(model, starts, tokens, stop, batch_size, bar.update)

        if dialogues:
            asked = _asked(tokenizer, dialogues, marks, turn, go_on, finished, seed)
            bar.update(dialogues - len(asked))
            begun = [chat(tokenizer, [("user", words)], "a text of the model") for words in asked]
            for words, ids in zip(asked, go_on(begun, marks.ends), strict=True):
                answer = _words(tokenizer, ids)
                if answer and (not finished or ids[-1] in marks.ends):
                    roles = [("user", words), ("assistant", answer)]
                    messages = [{"role": r, "content": c} for r, c in roles]
                    if is_told(tokenizer, messages):
                        found.append({"messages": messages})
        if count > dialogues:
            texts = go_on([[marks.beginning]] * (count - dialogues), marks.ends)
            plain = dict.fromkeys(filter(None, (_words(tokenizer, ids) for ids in texts)))
            found += [{"text": text} for text in plain]
    give_back()
    if not found:
        raise ValueError(
            "the model wrote nothing usable: every text is empty"
            + (f" or not finished after {tokens} tokens" if finished else "")
            + "; is its tokenizer the right one?"
        )
    if len(found) < count:
        why = "empty, repeated or not told by the chat template"
        why += ", or not finished" if finished else ""
        LOG.info("loki: of %d texts %d are %s", count, count - len(found), why)
    return found


def is_told(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> bool:
    """Whether the chat template tells a dialogue as it stands: some leave out what a model thought,
    which is all there is of an answer that was cut off."""
    try:
        dialogue(tokenizer, messages, "a text of the model", answer=False)
    except ValueError:
        return False
    return True


def _asked(
    tokenizer: Any,
    count: int,
    marks: Marks,
    turn: Turn | None,
    go_on: Callable[[Sequence[list[int]], frozenset[int]], list[list[int]]],
    finished: bool,
    seed: int,
) -> list[str]:
    """What users say, distinct, at most `count`."""
    if turn is None:
        written = go_on(lists(tokenizer, -(-count // A_LIST), seed), marks.ends)
        return asked_in((_words(tokenizer, ids) for ids in written), count)
    stop = marks.ends | turn.marks
    said = go_on([turn.start] * count, stop)
    if finished:
        said = [ids for ids in said if ids[-1] in stop or _passed(tokenizer, ids, turn)]
    return list(dict.fromkeys(filter(None, (_words(tokenizer, i, turn) for i in said))))


def lines(written: Sequence[dict[str, Any]]) -> str:
    """The same as the lines of a .jsonl file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)


def user_turn(model: nn.Module, tokenizer: Any) -> Turn | None:
    """What the chat template puts around a user's words.

    None where there is no template, or one that puts nothing before them, or that does so with
    tokens for which the model has no embeddings yet.

    Raises:
        ValueError: the template refuses a user who speaks first.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    one, other = (chat(tokenizer, [("user", words)], "a user's turn") for words in _WORDS)
    start, behind = _common(one, other), _common(one[::-1], other[::-1])[::-1]
    if has_new_tokens(model, tokenizer):
        LOG.warning("loki: the chat template has tokens that are new to the model: it writes plain")
        return None
    if not start or len(start) + len(behind) >= len(one):
        return None
    added = _added(tokenizer).keys() | set(tokenizer.all_special_ids)
    first = next((n for n, i in enumerate(behind) if i in added), len(behind))
    letters = tokenizer.decode(behind[:first]).strip()
    return Turn(start, frozenset(added & set(behind)), letters.splitlines()[0] if letters else "")


def has_new_tokens(model: nn.Module, tokenizer: Any) -> bool:
    """Whether a user's turn has tokens for which the model has no embeddings."""
    ids = chat(tokenizer, [("user", _WORDS[0])], "a user's turn")
    return max(ids) >= model.get_input_embeddings().num_embeddings


def _common(one: list[int], other: list[int]) -> list[int]:
    pairs = zip(one, other, strict=False)
    return one[: next((n for n, (a, b) in enumerate(pairs) if a != b), len(one))]


def _added(tokenizer: Any) -> Mapping[int, Any]:
    """Tokens that are no part of the text; tokenizers of mistral-common do not list them."""
    found = getattr(tokenizer, "added_tokens_decoder", None)
    return found if isinstance(found, Mapping) else {}


def _words(tokenizer: Any, ids: Sequence[int], turn: Turn | None = None) -> str:
    """What was written; of a user, up to the letters that end a user's turn."""
    marks = turn.marks if turn else frozenset()
    words = tokenizer.decode([i for i in ids if i not in marks], skip_special_tokens=True)
    if turn and turn.behind:
        words = words.partition(turn.behind)[0]
    return words.strip()


def _passed(tokenizer: Any, ids: Sequence[int], turn: Turn) -> bool:
    """Whether the user's words end at letters of the template."""
    return bool(turn.behind) and turn.behind in tokenizer.decode(ids)


@contextmanager
def _own_settings(model: nn.Module) -> Iterator[None]:
    """Without the model's own settings: they cut its distribution, and fill in what ours leave."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


@torch.no_grad()
def _continued(
    model: nn.Module,
    starts: Sequence[list[int]],
    tokens: int,
    stop: frozenset[int],
    batch_size: int,
    done: Callable[[int], Any],
) -> list[list[int]]:
    """What the model writes behind each start, with the token that ends it where one came."""
    order = sorted(range(len(starts)), key=lambda i: len(starts[i]))  # little is padded so
    written: list[list[int]] = []
    while len(written) < len(starts):
        batch = [starts[i] for i in order[len(written) : len(written) + batch_size]]
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
    return [new for _, new in sorted(zip(order, written, strict=True))]


def _generate(
    model: nn.Module, starts: Sequence[list[int]], tokens: int, stop: frozenset[int]
) -> list[list[int]]:
    device, width = first_device(model), max(map(len, starts))
    pad = min(stop, default=0)
    ids = torch.tensor([[pad] * (width - len(s)) + s for s in starts], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in starts], device=device)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        eos_token_id=sorted(stop) or None,
        pad_token_id=pad,
        use_cache=True,
    )
    said = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    new = said[:, width:].tolist()
    return [row[: next((n + 1 for n, i in enumerate(row) if i in stop), len(row))] for row in new]
