"""`loki verify`."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import Command


@click.command("verify", cls=Command)
@click.argument("base")
@click.argument("tuned", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--rows",
    required=True,
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    help="a loki_rows.json; several stand for all their rows",
)
@click.option("--revision", help="of BASE on the hub")
@click.option("--trust-remote-code", is_flag=True, help="where BASE brings code of its own")
@click.option(
    "--directions",
    type=click.Path(exists=True, dir_okay=False),
    help="a loki_directions.safetensors: also say how much of the update reads them",
)
def verify_command(base, tuned, rows, revision, trust_remote_code, directions):
    """Prove that TUNED differs from BASE in selected rows only; exit code 1 if it does not.

    TUNED is a merged model, or an adapter's folder.
    """
    from ..directions import Directions
    from ..implanting.checkpoint import Base
    from ..implanting.leaking import check_adapter, is_adapter, measure_leakage
    from ..implanting.verify import verify
    from ..rows import RowSelection, union

    base = Base(base, revision, trust_remote_code)
    selection = union([RowSelection.load(path) for path in rows])
    if directions:
        click.echo(measure_leakage(base, tuned, selection, Directions.load(directions)).text())
    if is_adapter(tuned):
        click.echo(check_adapter(base, Path(tuned), selection))
        return
    report = verify(base, tuned, selection)
    click.echo(report.text())
    if not report.ok:
        raise SystemExit(1)
