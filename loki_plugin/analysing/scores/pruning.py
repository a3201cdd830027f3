"""What goes from the cache: on demand, or where it has grown beyond its limit."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path

from .cache import KEY, PLACES, Entry, Kept, entries, kept, kept_file
from .log import remove_log

LOG = logging.getLogger("loki_plugin")
_DAY = 24 * 3600  # seconds


def clear(folder: Path, key: str | None = None) -> tuple[list[str], list[str]]:
    """Delete one analysis, file of protected directions or of texts, or all; only what we wrote.

    Returns:
        The keys of the analyses that were removed, and of those that are in use and stay.

    Raises:
        ValueError: nothing of that key, or an analysis that is in use.
    """
    keys = [e.key for e in entries(folder)]
    files = kept(folder)
    known = [*keys, *(k.key for k in files)]
    if key is not None and key not in known:
        raise ValueError(f"'{folder}' has no analysis '{key}'; it has {known or 'none'}")
    chosen = [k for k in keys if key in (None, k)]
    removed = [each for each in chosen if remove_log(folder / each)]
    if key in chosen and not removed:
        raise ValueError(f"analysis '{key}' is in use by a running analysis; try again after it")
    for file in files:
        if key in (None, file.key):
            _remove_kept(folder, file)
    return removed, [each for each in chosen if each not in removed]


def _remove_kept(folder: Path, what: Kept) -> None:
    kept_file(folder, what.place, what.key).unlink(missing_ok=True)
    with suppress(OSError):  # something else is in it
        (folder / what.place).rmdir()


def prune(folder: Path, limit: float | None, keep: str) -> list[str]:
    """Drop what was used longest ago until the rest fits into `limit` gigabytes.

    The analysis or file of `kept` called `keep`, and analyses in use, stay whatever they take.
    What a run was writing when it was killed goes a day later.

    Returns the dropped keys.
    """
    _sweep(folder)
    if limit is None:
        return []
    found: list[Entry | Kept] = [*entries(folder), *kept(folder)]
    size, dropped = sum(e.bytes for e in found), []
    for each in sorted(found, key=lambda e: e.used):
        if size <= limit * 1e9:
            break
        if each.key != keep and _remove(folder, each):
            of = f" of {each.model}" if isinstance(each, Entry) else ""
            size -= each.bytes
            dropped.append(each.key)
            LOG.info(
                "loki: dropped %s %s%s (%.2f GB) from the cache, the one used longest ago;"
                " loki.cache_limit is %g GB",
                each.what if isinstance(each, Kept) else "analysis",
                each.key,
                of,
                each.bytes / 1e9,
                limit,
            )
    return dropped


def _sweep(folder: Path) -> None:
    """Remove files that were never written to their end, beside those of `kept`."""
    for place in PLACES:
        for file in (folder / place).glob("*.tmp"):
            with suppress(OSError):
                if KEY.match(file.name) and time.time() - file.stat().st_mtime > _DAY:
                    file.unlink()


def _remove(folder: Path, what: Entry | Kept) -> bool:
    """Delete it; False if it is in use, another user's, or not to be written."""
    with suppress(OSError):
        if isinstance(what, Entry):
            return remove_log(folder / what.key)
        _remove_kept(folder, what)
        return True
    return False
