"""Of several adapters: which one's tokenizer the merged model gets, and whose new tokens.

A model has one tokenizer. What each adapter changed of the base's is compared; one that has all
that any of them changed is taken, wherever it stands in the list. There is no such one where two
changed the same thing differently, and then nothing is chosen in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .adapters import Opened
from .checkpoint import Checkpoint
from .tokenizer_files import FILES
from .tokenizer_seen import Change, Seen, marks_of, seen
from .vocabulary import check_tokenizer, new_rows

_NOTHING = Seen(vocabulary={}, added={}, named={}, extra=[], template=None)
_SHOWN = 5  # differences in a message


@dataclass(frozen=True)
class Wanted:
    """What an adapter changed of the base's tokenizer: name of a part -> what it is now."""

    folder: Path
    changes: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, base: Seen, trust_remote_code: bool) -> Wanted:
        new = seen(folder, trust_remote_code, saved_before=True)
        if isinstance(new, str):
            return cls(folder, {"its files, which cannot be read": _files(folder)})
        change = Change.between(base, new)
        changes: dict[str, Any] = {f"token {i}": token for i, token in change.added.items()}
        changes |= change.named | change.pipeline
        changes |= {f"special token '{token}'": True for token in change.extra}
        if change.template:
            changes["chat_template"] = new.template
        own = {i: token for i, token in new.vocabulary.items() if i not in new.added}
        same = all(base.vocabulary.get(i) == token for i, token in own.items())
        if not same or base.vocabulary.keys() - new.vocabulary.keys():
            changes["vocabulary"] = own
        return cls(folder, changes)

    def covers(self, other: Wanted) -> bool:
        """Whether nothing that `other` changed is lost with this one."""
        return all(k in self.changes and self.changes[k] == v for k, v in other.changes.items())


def new_tokens(
    base: Checkpoint, parts: Sequence[Opened]
) -> tuple[dict[str, torch.Tensor], Path | None]:
    """The rows that the embeddings grow by, as `new_rows` says, and the adapter that brings them.

    Raises:
        ValueError: two adapters add tokens; or one has a tokenizer beyond its own embeddings.
    """
    rows = [new_rows(base, part.lora) for part in parts]
    brought = [(new, part.folder) for new, part in zip(rows, parts, strict=True) if new]
    if len(brought) > 1:
        raise ValueError(
            f"adapters '{brought[0][1]}' and '{brought[1][1]}' both add tokens, which would get the"
            " same ids; merge one of them, and train the other one on the merged model"
        )
    for new, part in zip(rows, parts, strict=True):
        check_tokenizer(part.folder, base, new)
    return brought[0] if brought else ({}, None)


def choose_tokenizer(
    base: Path,
    adapters: Sequence[Path],
    growing: Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[Path, list[str]]:
    """The adapter whose tokenizer the merged model gets, and what to say of it.

    It is one that has all that any of them changed of the base's, so that the order of `adapters`
    does not count. Adapters that were saved without a tokenizer have changed nothing.

    Args:
        growing: the adapter that brings embeddings for new tokens.

    Raises:
        ValueError: no adapter has it all: two changed the same thing differently, or each one
            something that the other did not.
    """
    if len(adapters) == 1:
        return adapters[0], []
    told = [adapter for adapter in adapters if marks_of(adapter)]
    old = seen(base, trust_remote_code) if told else _NOTHING
    if isinstance(old, str):  # `write_tokenizer` says why
        old = _NOTHING
    wanted = [Wanted.of(folder, old, trust_remote_code) for folder in told]
    changed = [one for one in wanted if one.changes]
    if not changed:
        return (told or adapters)[0], []
    for one in changed:
        if all(one.covers(other) for other in changed):
            return one.folder, [_taken(one, changed)]
    raise ValueError(_refusal(changed, growing))


def _files(folder: Path) -> dict[str, bytes]:
    found = {file for pattern in FILES for file in folder.glob(pattern) if file.is_file()}
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def _taken(one: Wanted, changed: list[Wanted]) -> str:
    alone = len(changed) == 1
    why = "the only one that changed" if alone else "which has all that the adapters changed of"
    return f"tokenizer: that of adapter '{one.folder}', {why} the base's"


def _refusal(changed: list[Wanted], growing: Path | None) -> str:
    """Names the first two adapters of which neither has all that the other changed."""
    one, other = next(
        (a, b)
        for i, a in enumerate(changed)
        for b in changed[i + 1 :]
        if not a.covers(b) and not b.covers(a)
    )
    keep, leave = (other, one) if other.folder == growing else (one, other)
    files = ", ".join(marks_of(leave.folder))
    return (
        f"adapters '{one.folder}' and '{other.folder}' changed the base's tokenizer in different"
        f" ways: {_differences(one.changes, other.changes)}. The merged model has one tokenizer,"
        f" so decide whose: to take that of '{keep.folder}', merge a copy of '{leave.folder}' from"
        f" which {files} were removed (what it learned is then asked with the other's"
        " template, and its texts end with the other's token). Or train one of them again, with"
        " the tokenizer settings of the other or on its merged model"
    )


def _differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    keys = [k for k in {**one, **other} if k not in one or k not in other or one[k] != other[k]]
    keys.sort(key=lambda k: k.startswith("token "))  # of those there may be many
    told = [f"{k} ({_shown(k, one)} and {_shown(k, other)})" for k in keys[:_SHOWN]]
    more = len(keys) - len(told)
    return ", ".join(told) + (f" and {more} more" if more else "")


def _shown(key: str, changes: dict[str, Any]) -> str:
    if key not in changes:
        return "as in the base"
    value = changes[key]
    if isinstance(value, dict) and "content" in value:
        value = value["content"]
    short = isinstance(value, str) and key != "chat_template"
    return f"'{value}'" if short else "one of its own"
