"""`loki merge`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import click

from .shared import Answer, Command, read_run


@click.command(
    cls=Command,
    example="loki merge run.yaml\nloki merge run.yaml --adapter out/checkpoint-200 --output merged",
    fails="the merged model changes more than the rows (do not use it)",
)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="default: output_dir/merged")
@click.option(
    "--adapter",
    "adapters",
    type=click.Path(path_type=Path),
    multiple=True,
    help="default: the run's adapter; may be given several times",
)
@click.option(
    "--sum-overlaps",
    is_flag=True,
    help="allow adapters that change the same rows; those get the sum of the updates",
)
@click.option(
    "--onto",
    type=click.Choice(["original", "dequantised"]),
    default="original",
    show_default=True,
    help="of a 4-bit or 8-bit run: the base as it is, or as the run saw it",
)
def merge(config, output, adapters, sum_overlaps, onto):
    """Write the plain merged model of the run in CONFIG, an Axolotl YAML.

    Several adapters of one base are merged at once if no row is changed by two of them.

    `--onto dequantised` also writes the base that a quantised run trained on, beside the merged
    model as NAME-base; frozen weights are those of that one, and not of the original. Of a
    quantised run the answer ends with how large the rounding of its base is beside the update, and
    which of the two bases follows from that.
    """
    from ..implanting.proven import NotProven, merge_run
    from ..picturing.card import write_merged_card

    run = read_run(config)
    folder = Path(run.get("output_dir") or "./model-out")  # Axolotl's own default
    try:
        merged, proof = merge_run(
            run, adapters or (folder,), output or folder / "merged", sum_overlaps, onto
        )
    except NotProven as error:
        raise click.ClickException(str(error)) from error
    write_merged_card(run["base_model"], adapters or [folder], merged, proof, onto)
    if merged.advice and merged.advice.ratios:
        advice = _with_losses(merged.advice, run, adapters or (folder,))
        merged = replace(merged, advice=advice)
    facts = {
        **asdict(merged),
        "output": str(merged.output),
        "rounded_away": merged.rounding.lost_share,
        "proof": asdict(proof) | {"ok": proof.ok},
    }
    return Answer(f"{merged.text()}\n{proof.text()}", facts)


def _with_losses(advice, run, adapters):
    """What is measured on prompts, or why it is not; a merge that is made does not fail by it."""
    from ..evaluating.adapters import losses_onto
    from ..implanting.checkpoint import Base

    if len(adapters) > 1:
        return replace(advice, asked="several adapters were merged at once")
    try:
        losses, how = losses_onto(Base.of_run(run), Path(adapters[0]))
    except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
        losses, how = {}, str(error).strip().partition("\n")[0]
    return replace(advice, losses=losses, asked=how)
