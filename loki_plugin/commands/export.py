"""`loki export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ..choices import CLASSES
from .shared import Answer, Command

if TYPE_CHECKING:
    from ..implanting.checkpoint import Base


@click.command(
    "export",
    cls=Command,
    example="loki export outputs outputs-r64 --rank 64\n"
    "loki export outputs outputs-r8 --rank 8 --no-kl --json\n"
    "loki export outputs outputs-text --names text",
)
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rank", type=int, help="of every module of the new adapter")
@click.option(
    "--names",
    type=click.Choice(CLASSES),
    help="of modules as in the base's text model alone, or as in the whole model for images",
)
@click.option("--base", help="a folder or a hub id; default: the base that ADAPTER names")
@click.option("--revision", help="of the base on the hub; default: the one that ADAPTER names")
@click.option("--prompts", default="builtin", show_default=True, help="as loki.calibration.source")
@click.option("--no-kl", is_flag=True, help="do not load the base to measure what is lost")
@click.option("--trust-remote-code", is_flag=True, help="where the base brings code of its own")
@click.option("--device", help="default: the GPU where there is one")
@click.option("--dtype", default="auto", show_default=True)
def export_command(
    adapter, out, rank, names, base, revision, prompts, no_kl, trust_remote_code, device, dtype
):
    """Write ADAPTER as a LoRA of a smaller rank, or under the names of another class.

    Of each update ΔW the largest singular values are kept. How much of ‖ΔW‖² is lost is said, and
    KL(ADAPTER || OUT) on calibration prompts where the base can be loaded (in 16 bits). `loki
    merge` loses nothing of that: where you can serve a whole model, serve the merged one.

    A base for images and text is loaded whole by some and as its text model by others. The report
    says whose names the adapter has (`adapter_fits`); `--names` writes those of the other.
    """
    if (rank is None) == (names is None):
        raise ValueError("give --rank or --names, one of them; for both, export twice, rank first")
    if names:
        _nothing_is_measured()
        return _under_names(adapter, out, names, _base(adapter, base, revision, trust_remote_code))
    from ..analysing.calibration.sources import load_records
    from ..evaluating.adapters import between
    from ..evaluating.forgetting import check_place
    from ..implanting.exporting import export

    check_place(device, dtype)
    records = load_records(prompts)

    def measure(new: Path) -> dict:
        if no_kl:
            return {"not_measured": "--no-kl"}
        options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        try:
            known = _base(adapter, base, revision, trust_remote_code)
            options["revision"] = known.revision
            found = between(str(known.name), adapter, new, prompts, records, **options)
        except (OSError, RuntimeError, ValueError, TypeError, ImportError) as error:
            return {"not_measured": str(error).strip().partition("\n")[0]}
        same = found.same_answer
        asked = {"prompts": found.prompts, "calibration": prompts}
        return {"kl": found.kl, "same_answer": same, **asked}

    report = export(adapter, out, rank, measure=measure)
    found = report.measured
    if "not_measured" in found:
        told = f"KL(ADAPTER || OUT) was not measured: {found['not_measured']}"
    else:
        told = (
            f"KL(ADAPTER || OUT) {found['kl']:.4f} nats, {100 * found['same_answer']:.1f} % the"
            f" same answer, on {found['prompts']} prompts of {prompts}"
        )
    return Answer(f"{report.text()}\n{told}", asdict(report) | {"output": str(out)})


def _nothing_is_measured() -> None:
    """Names are exchanged and nothing else, so that there is nothing to measure."""
    context = click.get_current_context()
    for name in ("prompts", "no_kl", "device", "dtype"):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is about what a smaller rank loses; leave it out")


def _base(adapter: Path, name: str | None, revision: str | None, trust: bool) -> Base:
    """The base that is given, or the one that the adapter names.

    Raises:
        ValueError: none is.
    """
    from ..implanting.checkpoint import Base
    from ..implanting.fitting import base_named_by

    if name is None:
        name, own = base_named_by(adapter)
        revision = revision or own
    if not name:
        raise ValueError(f"the configuration of '{adapter}' names no base; give it with --base")
    return Base(name, revision, trust)


def _under_names(adapter: Path, out: Path, names: str, base: Base) -> Answer:
    from ..implanting.renaming import rename

    report = rename(adapter, out, names, base)
    return Answer(report.text(), asdict(report) | {"output": str(out)})
