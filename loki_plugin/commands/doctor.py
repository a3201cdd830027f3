"""`loki doctor`."""

from __future__ import annotations

import click

from .shared import Answer, Command


@click.command(
    cls=Command,
    example="loki doctor\nloki doctor --json",
    fails="something that LoKI needs is broken",
)
@click.option("--dir", "folder", help="cache folder; default: the user cache folder")
def doctor(folder: str | None):
    """Look at what LoKI needs on this machine, and say what to do about each finding."""
    from ..host.doctor import BROKEN, examine, text

    found = examine(folder)
    ok = not any(f.state == BROKEN for f in found)
    return Answer(text(found), {"ok": ok, "findings": [f.to_json() for f in found]}, ok)
