"""`loki select` and `loki stability`."""

from __future__ import annotations

import click

from ..choices import plain_number
from .shared import Command, Source, load_rows, scores_options


@click.command(cls=Command)
@scores_options
@click.option("--rounds", default=10, show_default=True, help="resamples")
@click.option("--plot", type=click.Path(dir_okay=False), help="draw the figure into this file")
def stability(scores, folder, quota, strategy, magnitude, exclude, rounds, plot):
    """Say whether the calibration was enough: would other prompts choose the same rows?

    SCORES is an analysis of `loki cache list` (default: the newest) or the authors' HDF5 file.
    """
    from ..selecting.stability import bootstrap_overlap, plot_stability

    source = Source(scores, folder)
    rules = {"magnitude": magnitude, "exclude": load_rows(exclude)}
    found = bootstrap_overlap(
        source.chunks, quota, strategy, **rules, prompts=source.prompts, rounds=rounds
    )
    click.echo(f"{source.title}, quota {quota} %, {strategy}\n{found.text()}")
    if plot:
        click.echo(f"figure in {plot_stability(found, plot)}")


@click.command("select", cls=Command)
@scores_options
@click.option("--seed", default=0, show_default=True, help="of the strategy `random`")
@click.option("--output", default="loki_rows.json", show_default=True)
@click.option("--positions", is_flag=True, help="write the authors' bare list of lists")
def select_command(scores, folder, quota, strategy, magnitude, exclude, seed, output, positions):
    """Choose rows from an analysis that is there already, without loading the model.

    SCORES is an analysis of `loki cache list` (default: the newest) or the authors' HDF5 file.
    """
    from ..rows import Made, RowSelection
    from ..selecting.select import select_rows

    source = Source(scores, folder)
    rules = {"magnitude": magnitude, "exclude": load_rows(exclude), "seed": seed}
    rows = select_rows(source.chunks, quota, strategy, **rules)
    made = Made(
        quota=plain_number(quota),
        strategy=strategy,
        magnitude=magnitude,
        scores=source.title,
        exclude=list(exclude),
        seed=seed,
    )
    selection = RowSelection(rows, source.hidden_size, source.fingerprint, made)
    written = selection.save_positions(output) if positions else selection.save(output)
    click.echo(f"{sum(selection.counts)} rows of {selection.num_layers} layers in {written}")
