"""Where score logs are kept: a model is analysed once, every later run starts at once."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from ...model.fingerprint import FIELDS
from ..calibration.prompts import Calibration
from .log import MANIFEST, ScoreLog, shards_of

LOG = logging.getLogger("loki_plugin")

# Folders beside the analyses: what a file in them is, and how its name ends.
DIRECTIONS, READS, TEXTS, HELD_BACK = "directions", "reads", "texts", "held_back"
PLACES = {
    DIRECTIONS: ("protected directions", ".safetensors"),
    READS: ("what low-rank updates read", ".safetensors"),
    TEXTS: ("texts of the model's own", ".jsonl"),
    HELD_BACK: ("texts that runs held back", ".json"),
}
# Raised when the same model, prompts and settings get other scores, not with every release.
_SCORES, _SCORES_8_BIT = "0.1.1", "0.2.0"
# What a manifest notes, and what tells no analysis from another: the name that a model was loaded
# by, and what versions after 0.1.1 have added to its fingerprint.
_ADDED = ("half", "packed")
_BESIDE = ("model", *_ADDED)
KEY = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class Entry:
    """One analysis in the cache."""

    key: str
    model: str
    prompts: int
    shards: int
    complete: bool
    bytes: int
    age_seconds: float
    used: float  # when an analysis last asked for it, in seconds since the epoch


@dataclass(frozen=True)
class Kept:
    """One file of protected directions, or of texts, in the cache; attributes as `Entry` has them.

    Attributes:
        place: the folder that it is in, a key of `PLACES`.
    """

    place: str
    key: str
    bytes: int
    age_seconds: float
    used: float

    @property
    def what(self) -> str:
        return PLACES[self.place][0]


def cache_folder(given: str | None = None) -> Path:
    """`loki.cache_dir`, else $LOKI_CACHE_DIR, else the platform's user cache folder.

    Raises:
        ValueError: it begins with the home of a user whom this machine does not know.
    """
    chosen = given or os.environ.get("LOKI_CACHE_DIR") or user_cache_dir("loki_plugin")
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise ValueError(f"the cache folder '{chosen}' names the home of nobody here") from error


def why_not_writable(folder: Path) -> str | None:
    """None where a file can be made in `folder`, which is made itself; else the reason."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def check_cache(given: str | None) -> None:
    """Check, before a model is loaded, that its scores can be kept.

    A cache of another user that can only be read is let through where something is in it, for
    what is looked for may be there.

    Raises:
        ValueError: nothing can be written to it.
    """
    folder = cache_folder(given)
    why = why_not_writable(folder)
    if why is None:
        return
    with suppress(OSError):
        if entries(folder):
            return
    raise ValueError(cannot_keep(folder, why))


def cannot_keep(folder: Path, why: str) -> str:
    """What to say of a folder that analyses cannot be kept in."""
    return (
        f"the cache folder '{folder}' cannot be written ({why}), and the scores of the analysis"
        " are kept there; set `loki.cache_dir` in the YAML, or LOKI_CACHE_DIR, to a folder of"
        " your own"
    )


def open_log(
    folder: Path,
    fingerprint: dict[str, str],
    calibration: Calibration,
    settings: dict[str, Any],
    num_layers: int,
    hidden_size: int,
    model: str,
) -> ScoreLog:
    """The score log of one analysis: model, prompts, settings and scores version decide which."""
    eight_bit = fingerprint["quantisation"] == "bnb-int8"
    manifest = {
        "loki_plugin": _SCORES_8_BIT if eight_bit else _SCORES,
        "model": model,
        "fingerprint": {field: fingerprint[field] for field in FIELDS},
        **{field: fingerprint.get(field) for field in _ADDED},
        "calibration": calibration.hash,
        "settings": settings,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "prompts": [p.key for p in calibration.prompts],
    }
    key = _key(manifest)
    path = folder / key / MANIFEST
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        manifest |= {k: kept[k] for k in _BESIDE if k in kept}
        for field in _ADDED:
            if field not in kept:  # of an earlier version
                del manifest[field]
        with suppress(OSError):  # another user's, or not to be written
            os.utime(path)  # when it was last used
    try:
        return ScoreLog(folder / key, manifest)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # says what to do
        raise ValueError(cannot_keep(folder, error.strerror or str(error))) from error


def _key(manifest: dict[str, Any]) -> str:
    identity = {k: v for k, v in manifest.items() if k not in _BESIDE}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def fingerprint_of(log: ScoreLog) -> dict[str, str]:
    """The fingerprint of the model that was analysed, as far as its version noted it."""
    added = {field: log.manifest.get(field) for field in _ADDED}
    return {**log.manifest["fingerprint"], **{k: v for k, v in added.items() if v}}


def _read(path: Path) -> dict[str, Any] | None:
    """A manifest of ours, or None: the folder of ours is called what its manifest says."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(manifest, dict) and "model" in manifest
    return manifest if ours and _key(manifest) == path.parent.name else None


def entries(folder: Path) -> list[Entry]:
    """Every analysis in a cache folder, the newest first; folders of others are passed over."""
    found = []
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        manifest = _read(path)
        if manifest is None:
            continue
        files = _stats(path.parent.glob("*.safetensors"))
        if not (own := _stats([path])):  # another run has just removed it
            continue
        used = own[0].st_mtime
        newest = max((f.st_mtime for f in files), default=used)
        found.append(
            Entry(
                key=path.parent.name,
                model=manifest["model"],
                prompts=len(manifest["prompts"]),
                shards=len(files),
                complete=len(files) == shards_of(len(manifest["prompts"])),
                bytes=sum(f.st_size for f in files),
                age_seconds=time.time() - newest,
                used=max(used, newest),
            )
        )
    return sorted(found, key=lambda e: e.age_seconds)


def _stats(files: Iterable[Path]) -> list[os.stat_result]:
    """Of those that are there still."""
    found = []
    for file in files:
        with suppress(FileNotFoundError):
            found.append(file.stat())
    return found


def kept_file(folder: Path, place: str, key: str) -> Path:
    """Where a file of protected directions or of texts is kept."""
    return folder / place / f"{key}{PLACES[place][1]}"


def kept(folder: Path, place: str | None = None) -> list[Kept]:
    """Every file of protected directions and of texts in a cache folder, the newest first."""
    found = [
        Kept(each, p.stem, s.st_size, time.time() - s.st_mtime, max(s.st_mtime, s.st_atime))
        for each, (_, suffix) in PLACES.items()
        if place in (None, each)
        for p in (folder / each).glob(f"*{suffix}")
        if KEY.fullmatch(p.stem)
        for s in _stats([p])
    ]
    return sorted(found, key=lambda k: k.age_seconds)


def use(file: Path) -> None:
    """Note that a file of `kept` was used; its age stays."""
    with suppress(OSError):  # another user's, or not to be written
        os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))


def strangers(folder: Path) -> list[str]:
    """Names of the folders that hold a manifest which is not ours; they are never touched."""
    return [p.parent.name for p in sorted(folder.glob(f"*/{MANIFEST}")) if _read(p) is None]


def find_log(folder: Path, key: str | None = None) -> ScoreLog:
    """The complete analysis of that key, or the newest one.

    Raises:
        ValueError: no analysis of that key, or none complete.
    """
    for entry in entries(folder):
        if entry.key == key or (key is None and entry.complete):
            path = folder / entry.key
            log = ScoreLog(path, json.loads((path / MANIFEST).read_text(encoding="utf-8")))
            missing = log.missing()
            if missing:
                raise ValueError(
                    f"analysis '{entry.key}' lacks {len(missing)} of {log.num_shards} shards;"
                    " run the training or analysis that began it again, it resumes"
                )
            return log
    raise ValueError(
        f"'{folder}' has no analysis '{key}'; see `loki cache list`"
        if key
        else f"'{folder}' has no complete analysis; a training run with `plugins: [loki]` makes one"
    )
