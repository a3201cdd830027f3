"""A tokenizer as the installed transformers loads it, and what a run did to one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_MARKS = ("tokenizer_config.json", "tokenizer.json", "*.model")  # without any nothing was saved
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
          "mask_token")  # fmt: skip
_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class Seen:
    """A tokenizer as the installed release loads it."""

    vocabulary: dict[int, str]
    added: dict[int, dict[str, Any]]
    named: dict[str, str]  # special tokens by their names
    extra: list[str]  # special tokens without names
    template: str | dict[str, str] | None  # one, or several by their names
    pipeline: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, trust_remote_code: bool, saved_before: bool = False) -> Seen:
        """Load it, after it was saved by the installed release: saving alone changes some."""
        from transformers import AutoTokenizer

        def load(place):
            return AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code)

        found = load(folder)
        if not saved_before:
            with TemporaryDirectory() as again:
                found.save_pretrained(again)
                found = load(again)
        backend = getattr(found, "backend_tokenizer", None)
        held = json.loads(backend.to_str()) if backend is not None else {}
        named = {name: getattr(found, name, None) for name in _NAMED}
        extra = getattr(found, "extra_special_tokens", None)
        return cls(
            vocabulary={i: token for token, i in found.get_vocab().items()},
            added={
                i: {flag: getattr(token, flag) for flag in _FLAGS}
                for i, token in sorted(found.added_tokens_decoder.items())
            },
            named={name: str(token) for name, token in named.items() if token is not None},
            extra=[str(token) for token in extra] if isinstance(extra, list) else [],
            template=found.chat_template,
            pipeline={part: held.get(part) for part in _PIPELINE},
        )

    def id_of(self, name: str) -> int | None:
        """Of a special token."""
        token = self.named.get(name)
        return next((i for i, t in self.vocabulary.items() if t == token), None)


@dataclass(frozen=True)
class Change:
    """What a run did to the base's tokenizer.

    Attributes:
        added: tokens by id that are new, have another text or became special.
        named: special tokens that have a name and are others now.
        extra: special tokens without one that are new.
        template: whether the chat template is another one.
        pipeline: the other parts that differ, as they are now.
    """

    added: dict[int, dict[str, Any]]
    named: dict[str, str]
    extra: list[str]
    template: bool
    pipeline: dict[str, Any]

    @classmethod
    def between(cls, base: Seen, run: Seen) -> Change:
        """What `run` has that `base` has not."""
        named = {n: token for n, token in run.named.items() if base.named.get(n) != token}
        if "pad_token" not in base.named:
            # A stand-in that Axolotl takes for its own batches: the end of a text.
            stands_in = {run.named.get("eos_token"), base.named.get("eos_token"), "</s>"}
            if named.get("pad_token") in stands_in:
                del named["pad_token"]
        return cls(
            added={
                i: token
                for i, token in run.added.items()
                if base.vocabulary.get(i) != token["content"]
                or i not in base.added
                or token["special"] > base.added[i]["special"]
            },
            named=named,
            extra=[token for token in run.extra if token not in base.extra],
            template=run.template != base.template,
            pipeline={k: v for k, v in run.pipeline.items() if base.pipeline.get(k) != v},
        )

    def __bool__(self) -> bool:
        return bool(self.added or self.named or self.extra or self.template or self.pipeline)


def marks_of(folder: Path) -> list[str]:
    """Names of the files by which a folder holds a tokenizer; none where it holds none."""
    return sorted({file.name for mark in _MARKS for file in folder.glob(mark)})


def seen(folder: Path, trust_remote_code: bool, saved_before: bool = False) -> Seen | str:
    """The tokenizer in a folder, or why transformers cannot load it."""
    try:
        return Seen.of(folder, trust_remote_code, saved_before)
    except Exception as error:  # of whatever kind
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return text if len(text) < 120 else f"{text[:117]}..."
