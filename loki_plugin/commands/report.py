"""`loki report`."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import Answer, Command


@click.command("report", cls=Command, example="loki report out\nloki report out --pictures figures")
@click.argument("folder", metavar="OUTPUT_DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--pictures", type=click.Path(file_okay=False), help="write them as PNGs there too")
@click.option("--dir", "cache", help="cache folder; default: the run's, else the user's")
def report_command(folder, pictures, cache):
    """Write loki_report.html of the run in OUTPUT_DIR again; older versions' runs work too.

    What a run has not kept is taken from its analysis, if the cache still has it; what cannot be
    had is left out and named.
    """
    from ..picturing.page import rebuild
    from ..picturing.pictures import save_pictures

    page, drawn, left_out = rebuild(Path(folder), Path(cache) if cache else None)
    paths = save_pictures(drawn, Path(pictures)) if pictures else []
    told = [f"not shown: {name} ({why})" for name, why in left_out.items()]
    told += [f"picture in {path}" for path in paths]
    facts = {"page": str(page), "pictures": [str(p) for p in paths], "not_shown": left_out}
    return Answer("\n".join([*told, f"report in {page}"]), facts)
