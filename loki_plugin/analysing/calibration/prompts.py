"""Calibration prompts: whose next-token prediction stands for general knowledge."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...choices import FEW_SHOT, SEED, SELF, SOURCE, TARGET
from .dialogues import CALLS
from .files import KINDS
from .questions import LETTERS
from .records import Record
from .rendering import dialogue, plain, untold_keys
from .sources import load_records

LOG = logging.getLogger("loki_plugin")
WINDOW = 512


@dataclass(frozen=True)
class Prompt:
    """One calibration prompt.

    Attributes:
        ids: its token ids, without padding.
        target: the token y, or None for the model's own arg-max.
        subject: for drawing per subject; "" where the source has none.
        key: sha256 over ids and target.
    """

    ids: tuple[int, ...]
    target: int | None = None
    subject: str = ""
    key: str = field(init=False)

    def __post_init__(self):
        content = json.dumps([self.ids, self.target])
        object.__setattr__(self, "key", hashlib.sha256(content.encode()).hexdigest())


@dataclass(frozen=True)
class Calibration:
    """The prompts of one analysis, in canonical order: by length; few-shot ones by their ids.

    Attributes:
        prompts: N prompts.
        dropped: how many were longer than `max_tokens`; they are never truncated.
        source: where they came from, for the record.
    """

    prompts: list[Prompt]
    dropped: int
    source: str

    @property
    def hash(self) -> str:
        """sha256 over all prompts; independent of the order in the source."""
        return hashlib.sha256("".join(p.key for p in self.prompts).encode()).hexdigest()


def load_prompts(
    tokenizer,
    source: str = SOURCE,
    samples_per_subject: int | None = None,
    target: str = TARGET,
    max_tokens: int | None = None,
    few_shot: int = FEW_SHOT,
    seed: int = SEED,
    records: list[Record] | None = None,
    **reading: Any,
) -> Calibration:
    """Read a calibration source, unless its `records` are given, and turn it into token ids.

    Multiple-choice questions become the paper's prompt, through the tokenizer's chat template
    where it has one, else as plain text. See `CalibrationArgs` for the settings; `reading` are
    those of `load_records`.

    Raises:
        ValueError: a source that cannot be read, a faulty record (file and line named), no prompt
            left, or `target="gold"` where a record has none.
    """
    records = records or load_records(source, **reading)
    _tell_untold(tokenizer, records)
    drawn = _draw(records, samples_per_subject or (50 if source == "mmlu" else None), seed)
    shots = _few_shots(records, few_shot, seed) if few_shot else {}
    prompts: dict[str, Prompt] = {}
    dropped = 0
    for record in drawn:
        ids, gold = _encode(tokenizer, record, shots.get(id(record), []), seed)
        if not ids:
            raise ValueError(
                f"{record.where}: the tokenizer makes no token of it; is the tokenizer the model's?"
            )
        if target == "gold" and gold is None:
            raise ValueError(
                f"{record.where}: calibration.target is 'gold', but the record has no `target`;"
                " add it or use target: predicted"
            )
        if max_tokens is not None and len(ids) > max_tokens:
            dropped += 1
            continue
        prompt = Prompt(tuple(ids), gold if target == "gold" else None, record.subject)
        prompts[prompt.key] = prompt
    if not prompts:
        raise ValueError(
            f"calibration source '{source}' gives no prompt"
            + (f": all {dropped} are longer than max_tokens = {max_tokens}" if dropped else "")
        )
    if dropped:
        LOG.info("loki: %d calibration prompts longer than %d tokens dropped", dropped, max_tokens)
    # Neighbours share a batch. Few-shot prompts gain more from what they begin with in common than
    # from equal lengths.
    ordered = sorted(prompts.values(), key=lambda p: p.ids if few_shot else (len(p.ids), p.key))
    return Calibration(ordered, dropped, source)


@dataclass(frozen=True)
class Text:
    """Text that protection reads.

    Attributes:
        ids: its token ids.
        starts: places of the tokens behind which an answer begins.
    """

    ids: tuple[int, ...]
    starts: tuple[int, ...] = ()


def read_dialogues(tokenizer, records: list[Record]) -> list[Text]:
    """All tokens of texts and of whole dialogues, in windows of at most `WINDOW` tokens.

    Records with a prompt or a question become what `load_prompts` makes of them.

    Raises:
        ValueError: a dialogue that the tokenizer's chat template refuses.
    """
    windows = []
    _tell_untold(tokenizer, records)
    for record in records:
        starts: list[int] = []
        if record.text is not None:
            ids = tokenizer(record.text)["input_ids"]
        elif record.messages is not None:
            ids = dialogue(tokenizer, record.messages, record.where, record.tools, answer=False)
            starts = _starts(tokenizer, record, ids)
        else:
            ids, _ = _encode(tokenizer, record, [], 0)
            starts = [len(ids) - 1]
        for i in range(0, len(ids), WINDOW):
            inside = [at - i for at in starts if i <= at < i + WINDOW]
            windows.append(Text(tuple(ids[i : i + WINDOW]), tuple(inside)))
    return windows


def load_texts(tokenizer, records: list[Record]) -> list[tuple[int, ...]]:
    """The token ids of `read_dialogues`."""
    return [text.ids for text in read_dialogues(tokenizer, records)]


def _starts(tokenizer, record: Record, ids: list[int]) -> list[int]:
    """For each answer the last token that the whole dialogue shares with what asks for the answer.

    None for an answer before which the template tells the turns in another way than in the whole,
    or that it does not ask for.
    """
    messages, found = record.messages or [], []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        with suppress(ValueError):
            before, asked = (
                dialogue(tokenizer, messages[:i], record.where, record.tools, answer, whole=False)
                for answer in (False, True)
            )
            pairs = enumerate(zip(asked, ids, strict=False))
            shared = next((n for n, (a, b) in pairs if a != b), len(asked))
            if ids[: len(before)] == before and len(before) <= shared < len(ids):
                found.append(shared - 1)
    return found


def read_texts(path: str) -> list[Record]:
    """Read the file of `protect.text`.

    Raises:
        ValueError: another kind of file, an unreadable one, or a faulty record.
    """
    if Path(path).suffix.lower() not in KINDS:
        raise ValueError(f"protect.text '{path}' must be `{SELF}`, or a {'/'.join(KINDS)} file")
    try:
        return load_records(path)
    except ValueError as error:
        raise ValueError(f"protect.text: {error}") from error


def question_text(subject: str, question: str, choices: list[str]) -> str:
    """The user message of the paper's analysis for one multiple-choice question."""
    letters = LETTERS[: len(choices)]
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    about = f" about {subject.replace('_', ' ').title()}" if subject else ""
    return (
        f"There is a single choice question{about}."
        f" Answer the question by replying {', '.join(letters[:-1])} or {letters[-1]}.\n"
        f"Question: {question}\nChoices:\n" + "\n".join(lines) + "\nAnswer: \n"
    )


def _draw(records: list[Record], count: int | None, seed: int) -> list[Record]:
    if count is None:
        return records
    groups = defaultdict(list)
    for record in records:
        groups[record.subject].append(record)
    drawn, short = [], {}
    for subject, members in groups.items():
        if len(members) < count:
            short[subject] = len(members)
            drawn += members
        else:
            drawn += random.Random(f"{seed}/{subject}").sample(members, count)
    if short:
        LOG.info(
            "loki: %d of %d subjects have fewer than samples_per_subject = %d records; all of"
            " theirs are used (smallest: %d)",
            len(short),
            len(groups),
            count,
            min(short.values()),
        )
    return drawn


def _few_shots(records: list[Record], count: int, seed: int) -> dict[int, list[Record]]:
    """For each question, solved examples of its own subject, never the question itself."""
    groups = defaultdict(list)
    for record in records:
        if record.question is not None:
            groups[record.subject].append(record)
    shots = {}
    for subject, members in groups.items():
        different = list({m.question: m for m in reversed(members)}.values())[::-1]
        if len(different) <= count:
            raise ValueError(
                f"calibration.few_shot = {count} needs more than {count} questions per subject;"
                f" subject '{subject}' has {len(different)}"
            )
        # One draw per subject, so that its prompts share the examples as a prefix.
        pool = random.Random(f"{seed}/shots/{subject}").sample(different, count + 1)
        for record in members:
            shots[id(record)] = [p for p in pool if p.question != record.question][:count]
    return shots


def _encode(tokenizer, record: Record, shots: list[Record], seed: int):
    """Token ids of the prompt and the gold target, or None."""
    if record.text is not None:
        ids = tokenizer(record.text)["input_ids"]
        if len(ids) < 2:
            raise ValueError(f"{record.where}: a text of fewer than two tokens cannot be cut")
        cut = random.Random(f"{seed}/{record.text}").randrange(1, len(ids))
        return ids[:cut], ids[cut]
    if record.messages is not None:
        return _asked_dialogue(tokenizer, record)
    if record.question is None:
        asked = [_turn("user", record.prompt or "")]
        return _with_answer(tokenizer, asked, record.target or "", record)
    messages = []
    for shot in shots:
        messages += [_turn("user", _asked(shot)), _turn("assistant", _letter(shot))]
    asked = [*messages, _turn("user", _asked(record))]
    return _with_answer(tokenizer, asked, _letter(record), record)


def _asked_dialogue(tokenizer, record: Record):
    """A dialogue up to what the assistant says last, which is what would be predicted."""
    messages = record.messages or []
    *before, last = messages
    if last["role"] != "assistant":
        return dialogue(tokenizer, messages, record.where, record.tools), None
    if not any(key in last for key in CALLS):
        return _with_answer(tokenizer, before, last["content"], record)
    ids = dialogue(tokenizer, before, record.where, record.tools)
    whole = dialogue(tokenizer, messages, record.where, record.tools, answer=False)
    follows = whole[: len(ids)] == ids and len(whole) > len(ids)
    return ids, whole[len(ids)] if follows else None


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _asked(record: Record) -> str:
    assert record.question is not None and record.choices is not None  # `load_records` checks
    return question_text(record.subject, record.question, record.choices)


def _letter(record: Record) -> str:
    assert record.answer is not None  # `load_records` checks
    return LETTERS[record.answer]


def _with_answer(tokenizer, messages: list[dict[str, Any]], answer: str, record: Record):
    """The gold token is the first one that the answer adds behind the prompt."""
    ids = dialogue(tokenizer, messages, record.where, record.tools)
    if not answer:
        return ids, None
    if not getattr(tokenizer, "chat_template", None):
        # Alone the answer may begin with another token than behind the prompt (Llama 2's "▁A").
        joined = list(tokenizer(plain(messages) + answer)["input_ids"])
        if joined[: len(ids)] == ids and len(joined) > len(ids):
            return ids, joined[len(ids)]
    added = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not added:
        raise ValueError(f"{record.where}: the target {answer!r} has no token")
    return ids, added[0]


def _tell_untold(tokenizer, records: list[Record]) -> None:
    messages = (m for record in records for m in record.messages or [])
    keys = sorted(untold_keys(tokenizer, messages))
    if keys:
        LOG.info("loki: of messages the chat template does not tell: %s", ", ".join(keys))
