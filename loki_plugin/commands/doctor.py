"""`loki doctor`."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import Answer, Command, read_run


@click.command(
    cls=Command,
    example="loki doctor\nloki doctor run.yaml --json",
    fails="something that LoKI needs is broken, or the run of CONFIG would be refused",
)
@click.argument(
    "config", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--dir", "folder", help="cache folder; default: that of CONFIG, or the user cache folder"
)
def doctor(config: Path | None, folder: str | None):
    """Look at what LoKI needs on this machine, and say what to do about each finding.

    With CONFIG, an Axolotl YAML: also whether its settings and its base model can be used.
    """
    from ..host.doctor import BROKEN, examine, text

    found = examine(folder, read_run(config) if config else None)
    ok = not any(f.state == BROKEN for f in found)
    return Answer(text(found), {"ok": ok, "findings": [f.to_json() for f in found]}, ok)
