"""`loki verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .shared import Answer, Command


@click.command(
    "verify",
    cls=Command,
    example="loki verify ./base out/merged --rows out/loki_rows.json\n"
    "loki verify Qwen/Qwen2.5-0.5B out --rows out/loki_rows.json --json",
    fails="TUNED differs in more than its rows",
)
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
    """Prove that TUNED differs from BASE in selected rows only.

    TUNED is a merged model, or an adapter's folder.
    """
    from ..implanting.checkpoint import Base
    from ..implanting.verify import verify
    from ..protecting.directions import Directions
    from ..protecting.leaking import check_adapter, is_adapter, measure_leakage
    from ..rows import RowSelection, union

    base = Base(base, revision, trust_remote_code)
    selection = union([RowSelection.load(path) for path in rows])
    lines: list[str] = []
    facts: dict[str, Any] = {}
    if directions:
        found = measure_leakage(base, tuned, selection, Directions.load(directions))
        lines.append(found.text())
        facts["leakage_per_layer"] = found.shares
    if is_adapter(tuned):
        said = check_adapter(base, Path(tuned), selection)
        return Answer("\n".join([*lines, said]), facts | {"ok": True, "adapter": said})
    report = verify(base, tuned, selection)
    told = "\n".join([*lines, report.text()])
    return Answer(told, facts | {"ok": report.ok, **asdict(report)}, report.ok)
