"""Where score logs are kept: a model is analysed once, every later run starts at once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from ..calibration.prompts import Calibration
from .log import MANIFEST, ScoreLog

DIRECTIONS = "directions"  # the folder of protected input directions, beside the analyses


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


def cache_folder(given: str | None = None) -> Path:
    """`loki.cache_dir`, else $LOKI_CACHE_DIR, else the platform's user cache folder."""
    return Path(given or os.environ.get("LOKI_CACHE_DIR") or user_cache_dir("loki_plugin"))


def open_log(
    folder: Path,
    fingerprint: dict[str, str],
    calibration: Calibration,
    settings: dict[str, Any],
    num_layers: int,
    hidden_size: int,
    model: str,
) -> ScoreLog:
    """The score log of one analysis: model, prompts, settings and package version decide which."""
    manifest = {
        "loki_plugin": version("loki_plugin"),
        "model": model,
        "fingerprint": fingerprint,
        "calibration": calibration.hash,
        "settings": settings,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "prompts": [p.key for p in calibration.prompts],
    }
    # The name that a model was loaded by does not make it another one.
    identity = {k: v for k, v in manifest.items() if k != "model"}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    path = folder / key / MANIFEST
    if path.exists():
        manifest["model"] = json.loads(path.read_text(encoding="utf-8")).get("model", model)
    return ScoreLog(folder / key, manifest)


def entries(folder: Path) -> list[Entry]:
    """Every analysis in a cache folder, the newest first."""
    found = []
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        log = ScoreLog(path.parent, manifest)
        files = [f.stat() for f in path.parent.glob("*.safetensors")]
        newest = max([path.stat().st_mtime, *(f.st_mtime for f in files)])
        found.append(
            Entry(
                key=path.parent.name,
                model=manifest["model"],
                prompts=len(manifest["prompts"]),
                shards=len(files),
                complete=len(files) == log.num_shards,
                bytes=sum(f.st_size for f in files),
                age_seconds=time.time() - newest,
            )
        )
    return sorted(found, key=lambda e: e.age_seconds)


def clear(folder: Path, key: str | None = None) -> list[str]:
    """Delete one analysis, or all with the protected directions. Returns the analyses' keys.

    Other folders than ours stay.

    Raises:
        ValueError: no analysis of that key.
    """
    keys = [e.key for e in entries(folder)]
    if key is not None and key not in keys:
        raise ValueError(f"'{folder}' has no analysis '{key}'; it has {keys or 'none'}")
    chosen = keys if key is None else [key]
    for each in chosen:
        shutil.rmtree(folder / each)
    if key is None and (folder / DIRECTIONS).is_dir():
        shutil.rmtree(folder / DIRECTIONS)
    return chosen


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
