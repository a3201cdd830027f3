"""The tokenizer beside a merged model: the base's files, but for what the run had to change.

Training saves a tokenizer as its release of transformers writes it, and older releases do not read
that. So nothing is copied for being newer: the base's tokenizer and the run's are seen as the same
release has written and read them, and what differs is written into the base's own files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .checkpoint import TEMPLATES, copy_files

_CONFIG, _FAST, _MAP = "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"
_ADDED, _JINJA = "added_tokens.json", "chat_template.jinja"
# Where processors of images look for a chat template before they look anywhere else.
_OF_PROCESSORS = ("chat_template.json", "processor_config.json")
_MARKS = (_CONFIG, _FAST, "*.model")  # without any of them nothing was saved
FILES = ("tokenizer*", _MAP, _ADDED, "vocab.*", "merges.txt", _JINJA, "*.model", TEMPLATES)
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
          "mask_token")  # fmt: skip
_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
# Of transformers 5 only, and what older releases have in their place.
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
_ONLY_NEW = ("backend", "is_local", "local_files_only")


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


def write_tokenizer(
    base: Path, run: Path, target: Path, trust_remote_code: bool = False
) -> list[str]:
    """Make the tokenizer in `target`, which holds the base's files, that of a run.

    Files of which the run changed nothing keep every byte. Where the run's is another tokenizer,
    or the base has none, the run's files are taken, in a form that older releases read.

    Returns lines that say what was done, none where nothing had to be.
    """
    if not marks_of(run):
        return []  # saved without one
    old, new = seen(base, trust_remote_code), seen(run, trust_remote_code, saved_before=True)
    if isinstance(new, str):
        return _take_whole(run, target, f"it cannot be read and compared ({new})")
    if isinstance(old, str):
        told = _take_whole(run, target, f"that of the base cannot be read ({old})")
        told += _tell_processors(target, new)
        return [*told, *_align(target, ["eos_token", "bos_token"], new)]
    change = Change.between(old, new)
    same = all(new.vocabulary.get(i) == t or i in new.added for i, t in old.vocabulary.items())
    if same and not change:
        held = seen(target, trust_remote_code)
        if isinstance(held, str) or Change.between(held, new):
            return _take_whole(run, target, "the base has parts of its own in other files")
        return ["tokenizer: every byte is the base's"]
    told = []
    if change.template and isinstance(new.template, dict):
        told = _take_whole(run, target, "it has other chat templates, several of them")
    elif same:
        told = _edit(run, target, change, old, new)
        written = seen(target, trust_remote_code)
        if isinstance(written, str) or Change.between(written, new):
            told = _take_whole(run, target, "the base's files cannot hold what the run changed")
    else:
        told = _take_whole(run, target, "it is another one than the base's")
    if change.template:
        told += _tell_processors(target, new)
    return [*told, *_align(target, change.named, new)]


def _tell_processors(target: Path, new: Seen) -> list[str]:
    """A processor's own copy of the chat template must not be the base's where the run's differs;
    of several templates it has no copy that could be read beside their files."""
    told = []
    for name in _OF_PROCESSORS:
        held = _read(target / name)
        if held.get("chat_template") in (None, new.template):
            continue
        if isinstance(new.template, str):
            held["chat_template"] = new.template
        else:
            del held["chat_template"]
        if held:
            _write(target / name, held)
        else:
            (target / name).unlink()
        told.append(f"processor: {name} has changed: chat_template")
    return told


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


def _edit(run: Path, target: Path, change: Change, old: Seen, new: Seen) -> list[str]:
    """Write a change into the base's files; returns what to say of each."""
    told: dict[str, list[str]] = {}

    def edit(name: str, *steps: tuple[str, Callable[[dict], Any]]) -> None:
        path = target / name
        before = _read(path)
        after = json.loads(json.dumps(before))
        for what, step in steps:
            seen = json.dumps(after)
            step(after)
            if json.dumps(after) != seen:
                told.setdefault(name, []).append(what)
        if after != before:
            _write(path, after)

    added = change.added
    if added:  # ids are places there, so none may be left out before a new one
        known = _ids_in(target / _FAST) or old.vocabulary.keys()
        added = {i: token for i, token in new.added.items() if i in added or i not in known}
    tokens = f"{len(added)} token{'s' * (len(added) != 1)}"
    if (target / _FAST).is_file():
        edit(
            _FAST,
            (tokens, lambda held: _add(held, added)),
            (", ".join(change.pipeline), lambda held: held.update(change.pipeline)),
        )
    elif (change.added or change.pipeline) and (run / _FAST).is_file():
        shutil.copyfile(run / _FAST, target / _FAST)
        told[_FAST] = ["the run's"]
    if (target / _ADDED).is_file():
        edit(_ADDED, (tokens, lambda held: held.update(
            {token["content"]: i for i, token in added.items()})))  # fmt: skip
    names = ", ".join([*change.named, *(["more special tokens"] if change.extra else [])])
    if (target / _MAP).is_file():
        edit(_MAP, (names, lambda held: _name(held, change)))
    in_config = change.template and not (target / _JINJA).is_file()
    in_config |= change.template and "chat_template" in _read(target / _CONFIG)
    edit(
        _CONFIG,
        (tokens, lambda held: _decode(held, added, bool(new.pipeline))),
        (names, lambda held: _name(held, change)),
        (
            "chat_template",
            lambda held: held.update(chat_template=new.template) if in_config else None,
        ),
    )
    if change.template and (target / _JINJA).is_file():
        (target / _JINJA).write_text(str(new.template or ""), encoding="utf-8")
        told[_JINJA] = ["the run's"]
    return [f"tokenizer: {name} has changed: {', '.join(what)}" for name, what in told.items()] + [
        "tokenizer: every other byte is the base's"
    ]


def _ids_in(file: Path) -> set[int]:
    """Of all tokens in a `tokenizer.json`."""
    held = _read(file)
    vocabulary = (held.get("model") or {}).get("vocab") or {}
    own = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return {*own, *(token["id"] for token in held.get("added_tokens") or [])}


def _add(held: dict, added: Mapping[int, dict[str, Any]]) -> None:
    """Into `tokenizer.json`."""
    if not added:
        return
    entries = {token["id"]: token for token in held.get("added_tokens") or []}
    entries |= {i: {"id": i} | token for i, token in added.items()}
    held["added_tokens"] = [entries[i] for i in sorted(entries)]
    # Reserved tokens that got another text may stand among the others too.
    vocabulary = (held.get("model") or {}).get("vocab") or {}
    texts = {i: token["content"] for i, token in added.items()}
    if isinstance(vocabulary, dict):
        held["model"]["vocab"] = {texts.get(i, token): i for token, i in vocabulary.items()}
    else:
        pairs = enumerate(vocabulary)
        held["model"]["vocab"] = [[texts.get(i, token), score] for i, (token, score) in pairs]


def _decode(held: dict, added: Mapping[int, dict[str, Any]], fast: bool) -> None:
    """Into `tokenizer_config.json`, where it lists tokens or nothing else could."""
    if added and ("added_tokens_decoder" in held or not fast):
        listed = held.setdefault("added_tokens_decoder", {})
        listed |= {str(i): token for i, token in added.items()}


def _name(held: dict, change: Change) -> None:
    held |= change.named
    if change.extra:
        lists = isinstance(held.get("extra_special_tokens"), list)  # as transformers 5 writes it
        key = "extra_special_tokens" if lists else "additional_special_tokens"
        held[key] = list(dict.fromkeys([*(held.get(key) or []), *change.extra]))
        if not held.get("extra_special_tokens"):  # beside it transformers 5 does not see the list
            held.pop("extra_special_tokens", None)


def _align(target: Path, names: Iterable[str], new: Seen) -> list[str]:
    """Let the model's configurations name the special tokens that the tokenizer names now.

    As transformers' trainer does it: what ended a text before goes on to end it.
    """
    told = []
    for name in (n for n in ("eos_token", "bos_token", "pad_token") if n in names):
        value, key = new.id_of(name), f"{name}_id"
        if value is None:
            continue
        for file in ("config.json", "generation_config.json"):
            held = _read(target / file)
            inner = held.get("text_config")
            owners = [held] + ([inner] if isinstance(inner, dict) and key in inner else [])
            for owner in owners if held else []:
                owner[key] = _ids(owner.get(key), value, key, file)
            if held != _read(target / file):
                _write(target / file, held)
                told.append(
                    f"{file}: {key} is {held[key]} now, for the run's tokenizer has"
                    f" {name} = '{new.named[name]}'"
                )
    return told


def _ids(given: Any, value: int, key: str, file: str) -> int | list[int]:
    if key == "eos_token_id" and given is not None and given != value:
        if isinstance(given, list):
            return given if value in given else [value, *given]
        if file != "config.json":  # older releases take one number there
            return [value, given]
    return value


def _take_whole(run: Path, target: Path, why: str) -> list[str]:
    """The run's files in place of the base's, as far as they can in a form of transformers 4."""
    for pattern in FILES:
        for file in target.glob(pattern):
            file.unlink()  # of the base; a vocabulary of both would be neither
    copy_files(run, target, FILES)
    if (target / _CONFIG).is_file():
        held = _read(target / _CONFIG)
        wanted = {k: v for k, v in held.items() if k not in _ONLY_NEW}
        name = wanted.get("tokenizer_class")
        if name in _CLASSES:
            wanted["tokenizer_class"] = _CLASSES[name]
        if isinstance(wanted.get("extra_special_tokens"), list):
            wanted["additional_special_tokens"] = wanted.pop("extra_special_tokens")
        if wanted != held:
            _write(target / _CONFIG, wanted)
    return [f"tokenizer: the files are the run's, for {why}"]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, held: dict[str, Any]) -> None:
    path.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
