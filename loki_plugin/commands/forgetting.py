"""`loki forgetting`."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import Answer, Command, make_room, read_run, write_json


@click.command(
    "forgetting",
    cls=Command,
    example="loki forgetting run.yaml\n"
    "loki forgetting --base B --tuned T --tasks hellaswag,winogrande --output forgotten.json",
)
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--base", help="the model before; default: CONFIG's base_model")
@click.option("--tuned", help="merged model or adapter; default: what CONFIG's run has left")
@click.option("--tasks", default="", help="lm-eval tasks, separated by commas")
@click.option("--include", help="a folder with lm-eval task files of your own")
@click.option("--limit", type=click.IntRange(min=1), help="items per task")
@click.option("--batch-size", default="auto", show_default=True)
@click.option("--prompts", default="builtin", show_default=True, help="as loki.calibration.source")
@click.option("--noise-floor", is_flag=True, help="evaluate the base a second time")
@click.option(
    "--confirm-run-unsafe-code",
    is_flag=True,
    help="tasks may run code that the model writes (HumanEval); set HF_ALLOW_CODE_EVAL=1 too",
)
@click.option("--device", help="default: the GPU where there is one")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False), help="write the figures as JSON")
@click.option("--plot", "picture", type=click.Path(dir_okay=False), help="draw them")
def forgetting_command(config, base, tuned, tasks, prompts, output, picture, **options):
    """How much did a fine-tuned model forget? KL and answers on prompts, lm-eval tasks, flips.

    CONFIG is the Axolotl YAML of the run; without it, give --base and --tuned.
    """
    from ..evaluating import forgetting

    make_room(output, picture)
    if config is not None:
        run = read_run(Path(config))
        if base is None or tuned is None:
            of_base, of_tuned = forgetting.of_a_run(run)
            base, tuned = base or of_base, tuned or of_tuned
        options["revision"] = run.get("revision_of_model")
        options["trust_remote_code"] = bool(run.get("trust_remote_code"))
    if base is None or tuned is None:
        raise ValueError("give a CONFIG, or --base and --tuned")
    if picture:
        from ..picturing.drawing.style import check_format

        check_format(picture)
    names = [t for t in tasks.split(",") if t]
    report = forgetting.measure(base, tuned, names, prompts, **options)
    lines = [f"{base} -> {tuned}", report.text()]
    if output:
        lines.append(f"figures in {write_json(output, report.to_json())}")
    if picture:
        lines.append(f"figure in {forgetting.plot(report, picture)}")
    facts = {"base": str(base), "tuned": str(tuned), **report.to_json()}
    return Answer("\n".join(lines), facts)
