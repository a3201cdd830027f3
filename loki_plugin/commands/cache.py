"""`loki cache list` and `loki cache clear`."""

from __future__ import annotations

from dataclasses import asdict

import click

from .shared import Answer, Command


@click.group()
def cache():
    """The score logs of earlier analyses, and protected directions."""


_DIRECTORY = click.option("--dir", "folder", help="default: the user cache folder")


@cache.command("list", cls=Command, example="loki cache list\nloki cache list --json")
@_DIRECTORY
def list_command(folder: str | None):
    """List the analyses and directions that are kept, with size and age."""
    from ..analysing.scores.cache import cache_folder, directions, entries, strangers

    place = cache_folder(folder)
    found, protected, foreign = entries(place), directions(place), strangers(place)
    lines = [f"{len(found)} analyses in {place}"]
    for e in found:
        state = "complete" if e.complete else f"{e.shards} shards so far"
        lines.append(
            f"{e.key}  {e.prompts} prompts, {state}, {e.bytes / 2**20:.1f} MiB,"
            f" {e.age_seconds / 3600:.1f} h old  {e.model}"
        )
    for d in protected:
        lines.append(
            f"{d.key}  protected directions, {d.bytes / 2**20:.1f} MiB,"
            f" {d.age_seconds / 3600:.1f} h old"
        )
    for name in foreign:
        lines.append(f"{name}  is not ours (its manifest.json is another program's); left alone")
    facts = {
        "folder": str(place),
        "analyses": [asdict(e) for e in found],
        "directions": [asdict(d) for d in protected],
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
    from ..analysing.scores.cache import cache_folder, clear, directions

    place = cache_folder(folder)
    before = directions(place)
    removed, in_use = clear(place, key)
    gone = len(before) - len(directions(place))
    lines = [f"removed {len(removed)} analyses from {place}"]
    lines += [f"removed {gone} files of protected directions"] * bool(gone)
    lines += [f"{each}  is in use by a running analysis; kept" for each in in_use]
    return Answer("\n".join(lines), {"folder": str(place), "removed": removed, "in_use": in_use})
