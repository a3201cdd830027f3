"""The tokenizer beside a merged model: the base's files, but for what the run had to change.

Training saves a tokenizer as its release of transformers writes it, and older releases do not read
that. So nothing is copied for being newer: the base's tokenizer and the run's are seen as the same
release has written and read them, and what differs is written into the base's own files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .checkpoint import TEMPLATES, copy_files
from .tokenizer_seen import Change, Seen, marks_of, seen

_CONFIG, _FAST, _MAP = "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"
_ADDED, _JINJA = "added_tokens.json", "chat_template.jinja"
# Where processors of images look for a chat template before they look anywhere else.
_OF_PROCESSORS = ("chat_template.json", "processor_config.json")
FILES = ("tokenizer*", _MAP, _ADDED, "vocab.*", "merges.txt", _JINJA, "*.model", TEMPLATES)
# Of transformers 5 only, and what older releases have in their place.
_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
_ONLY_NEW = ("backend", "is_local", "local_files_only")


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
    """Put the run's chat template where a processor keeps a copy of its own, or remove the copy
    where the run has several templates: transformers does not read both."""
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
