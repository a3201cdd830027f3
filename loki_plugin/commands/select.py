"""`loki select` and `loki stability`."""

from __future__ import annotations

from pathlib import Path

import click

from ..choices import plain_number
from .shared import Answer, Command, Source, check_adapter_beside, load_rows, scores_options


@click.command(
    cls=Command,
    example="loki stability --quota 10\nloki stability scores.h5 --quota 20 --plot stability.png\n"
    "loki stability --directions outputs/loki/loki_directions.safetensors",
)
@scores_options
@click.option("--rounds", default=10, show_default=True, help="resamples")
@click.option("--plot", type=click.Path(dir_okay=False), help="draw the figure into this file")
@click.option(
    "--directions",
    type=click.Path(exists=True, dir_okay=False),
    help="a loki_directions.safetensors: also say what it covers of prompts that were kept back",
)
def stability(scores, folder, quota, strategy, magnitude, exclude, rounds, plot, directions):
    """Say whether the calibration was enough: would other prompts choose the same rows?

    SCORES is an analysis of `loki cache list` (default: the newest) or the authors' HDF5 file.
    """
    from ..selecting.stability import bootstrap_overlap, plot_stability

    source = Source(scores, folder)
    rules = {"magnitude": magnitude, "exclude": load_rows(exclude)}
    found = bootstrap_overlap(
        source.chunks, quota, strategy, **rules, prompts=source.prompts, rounds=rounds
    )
    told = f"{source.title}, quota {quota} %, {strategy}\n{found.text()}"
    if plot:
        told += f"\nfigure in {plot_stability(found, plot)}"
    facts = {
        "scores": source.title,
        "quota": plain_number(quota),
        "strategy": strategy,
        "prompts": found.prompts,
        "overlap": found.score,
        "enough": found.enough,
        "overlap_by_prompts": dict(zip(found.sizes, found.overlap.mean((0, 2)), strict=True)),
        "overlap_per_layer": found.per_layer.tolist(),
        "overlap_of_halves": float(found.halves.mean()),
        "overlap_by_chance": found.chance,
    }
    if directions:
        from ..protecting.directions import Directions
        from ..protecting.preparing import describe, report

        protected = Directions.load(directions).held()
        told += f"\n{describe(protected)}" if protected.basis else "\nno directions are held"
        facts["protection"] = report(protected)
    return Answer(told, facts)


@click.command(
    "select",
    cls=Command,
    example="loki select --quota 10\n"
    "loki select 9e4a4b2b1e4a6fe95856 --quota 20 --exclude first/loki_rows.json --output rows.json",
)
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
    check_adapter_beside(Path(output), selection)
    written = selection.save_positions(output) if positions else selection.save(output)
    facts = {"rows_file": str(written), "rows_per_layer": selection.counts, **made}
    told = f"{sum(selection.counts)} rows of {selection.num_layers} layers in {written}"
    return Answer(told, facts)
