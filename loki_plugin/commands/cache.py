"""`loki cache list` and `loki cache clear`."""

from __future__ import annotations

import click

from .shared import Command


@click.group()
def cache():
    """The score logs of earlier analyses."""


_DIRECTORY = click.option("--dir", "folder", help="default: the user cache folder")


@cache.command("list", cls=Command)
@_DIRECTORY
def list_command(folder: str | None):
    """List the analyses that are kept, with size and age."""
    from ..analysing.scores.cache import cache_folder, entries, strangers

    place = cache_folder(folder)
    found = entries(place)
    click.echo(f"{len(found)} analyses in {place}")
    for e in found:
        state = "complete" if e.complete else f"{e.shards} shards so far"
        click.echo(
            f"{e.key}  {e.prompts} prompts, {state}, {e.bytes / 2**20:.1f} MiB,"
            f" {e.age_seconds / 3600:.1f} h old  {e.model}"
        )
    for name in strangers(place):
        click.echo(f"{name}  is not ours (its manifest.json is another program's); left alone")


@cache.command("clear", cls=Command)
@click.argument("key", required=False)
@_DIRECTORY
def clear_command(key: str | None, folder: str | None):
    """Delete the analysis KEY, or all of them; never one that is in use, nor others' files."""
    from ..analysing.scores.cache import cache_folder, clear

    place = cache_folder(folder)
    removed, in_use = clear(place, key)
    click.echo(f"removed {len(removed)} analyses from {place}")
    for each in in_use:
        click.echo(f"{each}  is in use by a running analysis; kept")
