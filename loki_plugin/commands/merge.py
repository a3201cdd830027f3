"""`loki merge`."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import Command, read_run


@click.command(cls=Command)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="default: output_dir/merged")
@click.option("--adapter", type=click.Path(path_type=Path), help="default: the run's adapter")
def merge(config: Path, output: Path | None, adapter: Path | None):
    """Write the plain merged model of the run in CONFIG, an Axolotl YAML."""
    from ..implanting.proven import NotProven, merge_run

    run = read_run(config)
    folder = Path(run.get("output_dir") or "./model-out")  # Axolotl's own default
    adapter = adapter or folder
    try:
        merged, proof = merge_run(run, adapter, output or folder / "merged")
    except NotProven as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{merged.text()}\n{proof.text()}")
