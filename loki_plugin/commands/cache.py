"""`loki cache list` and `loki cache clear`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import click

from .shared import Answer, Command


@click.group()
def cache():
    """The score logs of earlier analyses, protected directions, and texts of models' own."""


_DIRECTORY = click.option("--dir", "folder", help="default: the user cache folder")


@cache.command("list", cls=Command, example="loki cache list\nloki cache list --json")
@_DIRECTORY
def list_command(folder: str | None):
    """List the analyses, directions and texts that are kept, with size and age."""
    from ..analysing.scores.cache import PLACES, cache_folder, entries, kept, strangers

    place = cache_folder(folder)
    found, foreign = entries(place), strangers(place)
    files = {each: kept(place, each) for each in PLACES}
    lines = [f"{len(found)} analyses in {place}"]
    for e in found:
        state = "complete" if e.complete else f"{e.shards} shards so far"
        lines.append(
            f"{e.key}  {e.prompts} prompts, {state}, {e.bytes / 2**20:.1f} MiB,"
            f" {e.age_seconds / 3600:.1f} h old  {e.model}"
        )
    for k in [k for some in files.values() for k in some]:
        size, age = k.bytes / 2**20, k.age_seconds / 3600
        lines.append(f"{k.key}  {k.what}, {size:.1f} MiB, {age:.1f} h old")
    for name in foreign:
        lines.append(f"{name}  is not ours (its manifest.json is another program's); left alone")
    facts = {
        "folder": str(place),
        "analyses": [asdict(e) for e in found],
        **{each: [asdict(k) for k in some] for each, some in files.items()},
        "not_ours": foreign,
    }
    return Answer("\n".join(lines), facts)


@cache.command(
    "clear",
    cls=Command,
    example="loki cache clear 9e4a4b2b1e4a6fe95856\nloki cache clear",
    fails="KEY is in use by a running analysis",
)
@click.argument("key", required=False)
@_DIRECTORY
def clear_command(key: str | None, folder: str | None):
    """Delete what is kept under KEY, or all of it; nothing that is in use, nor others' files."""
    from ..analysing.scores.cache import cache_folder, kept
    from ..analysing.scores.pruning import clear

    place = cache_folder(folder)
    before = Counter(k.what for k in kept(place))
    removed, in_use = clear(place, key)
    gone = before - Counter(k.what for k in kept(place))
    lines = [f"removed {len(removed)} analyses from {place}"]
    lines += [f"removed {count} files of {what}" for what, count in gone.items()]
    lines += [f"{each}  is in use by a running analysis; kept" for each in in_use]
    return Answer("\n".join(lines), {"folder": str(place), "removed": removed, "in_use": in_use})
