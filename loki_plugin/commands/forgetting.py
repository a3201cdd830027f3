"""`loki forgetting`."""

from __future__ import annotations

import math
from pathlib import Path

import click
from click.core import ParameterSource

from .shared import Answer, Command, make_room, read_run, write_json


def _number(low: float, high: float, expected: str):
    """A check of a threshold: finite, from `low` to `high`."""

    def check(ctx, param, value):
        if value is not None and not (math.isfinite(value) and low <= value <= high):
            raise click.BadParameter(f"got {value:g}, expected {expected}")
        return value

    return check


_ANY = "a number of at least 0"
# What has no meaning for the texts that a run held back.
_NOT_HELD_BACK = ("tasks", "include", "limit", "batch_size", "prompts", "noise_floor", "max_drop",
                  "confirm_run_unsafe_code", "picture")  # fmt: skip
_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)


@click.command(
    "forgetting",
    cls=Command,
    fails="a threshold is broken, a sentence for each",
    example="loki forgetting run.yaml\n"
    "loki forgetting --base B --tuned T --tasks hellaswag,winogrande --output forgotten.json\n"
    "loki forgetting run.yaml --max-kl 0.05 --min-kept 95 --max-drop 1",
)
@click.argument("config", required=False, type=click.Path(exists=True, dir_okay=False))
@click.option("--base", help="the model before; default: CONFIG's base_model")
@click.option("--tuned", help="merged model or adapter; default: what CONFIG's run has left")
@click.option("--revision", help="of the base on the hub; default: CONFIG's, or the adapter's")
@click.option("--tasks", default="", help="lm-eval tasks, separated by commas")
@click.option("--include", help="a folder with lm-eval task files of your own")
@click.option("--limit", type=click.IntRange(min=1), help="items per task")
@click.option("--batch-size", default="auto", show_default=True)
@click.option("--prompts", default="builtin", show_default=True, help="as loki.calibration.source")
@click.option(
    "--held-back",
    is_flag=True,
    help="what the run's evaluations measured (eval_loki_kl), on the texts that they did it on",
)
@click.option("--noise-floor", is_flag=True, help="evaluate the base a second time")
@click.option(
    "--confirm-run-unsafe-code",
    is_flag=True,
    help="tasks may run code that the model writes (HumanEval); set HF_ALLOW_CODE_EVAL=1 too",
)
@click.option(
    "--max-kl",
    type=float,
    callback=_number(0, math.inf, _ANY),
    help="threshold: nats that the KL to the base on the prompts may be",
)
@click.option(
    "--min-kept",
    type=float,
    callback=_number(1, 100, "percent from 1 to 100, such as 95"),
    help="threshold: percent of the prompts that must be answered as the base does",
)
@click.option(
    "--max-drop",
    type=float,
    callback=_number(0, math.inf, _ANY),
    help="threshold: percent that any task, and the share of prompts answered right, may lose of"
    " what it was",
)
@click.option("--device", help="default: the GPU where there is one")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False), help="write the figures as JSON")
@click.option("--plot", "picture", type=click.Path(dir_okay=False), help="draw them")
def forgetting_command(
    config, base, tuned, tasks, prompts, output, picture, max_kl, min_kept, max_drop, held_back,
    **options,
):  # fmt: skip
    """How much did a fine-tuned model forget? KL and answers on prompts, lm-eval tasks, flips.

    CONFIG is the Axolotl YAML of the run; without it, give --base and --tuned. With thresholds it
    is a gate: exit code 1 where one is broken.
    """
    from ..evaluating import forgetting
    from ..evaluating.gate import Gate

    gate = Gate(max_kl, min_kept, max_drop)

    make_room(output, picture)
    if held_back:
        return _held_back(config, base, tuned, output, gate, options)
    if config is not None:
        run = read_run(Path(config))
        base, tuned = base or run["base_model"], tuned or forgetting.of_a_run(run)
        options["revision"] = options["revision"] or run.get("revision_of_model")
        options["trust_remote_code"] = bool(run.get("trust_remote_code"))
        options["overrides"] = run.get("overrides_of_model_config")
    if base is None or tuned is None:
        raise ValueError("give a CONFIG, or --base and --tuned")
    if picture:
        from ..picturing.drawing.style import check_format

        check_format(picture)
    names = [t for t in tasks.split(",") if t]
    if max_drop is not None and not names:
        _check_answers(prompts)
    report = forgetting.measure(base, tuned, names, prompts, **options)
    lines = [f"{base} -> {tuned}", report.text()]
    judged = gate.to_json(report)
    if judged:
        lines += judged["broken"] or ["every threshold is kept"]
    if output:
        lines.append(f"figures in {write_json(output, report.to_json() | judged)}")
    if picture:
        lines.append(f"figure in {forgetting.plot(report, picture)}")
    facts = {"base": str(base), "tuned": str(tuned), **report.to_json(), **judged}
    return Answer("\n".join(lines), facts, ok=judged.get("passed", True))


def _held_back(config, base, tuned, output, gate, options):
    """The run's own figures again: of its adapter, or of the checkpoint that --tuned names."""
    from ..blocks import at_home
    from ..evaluating.again import measure_again

    context = click.get_current_context()
    others = [n for n in _NOT_HELD_BACK if context.get_parameter_source(n) in _GIVEN]
    if others or config is None:
        names = ", ".join(f"--{n.replace('_', '-')}" for n in others)
        raise ValueError(
            "--held-back needs the CONFIG of the run"
            if config is None
            else f"--held-back is about the texts of the run; leave {names} out"
        )
    run = read_run(Path(config))
    folder = Path(run.get("output_dir") or "./model-out")  # Axolotl's own default
    report, told = measure_again(
        base or run["base_model"],
        folder,
        Path(tuned or folder),
        options["device"],
        options["dtype"],
        at_home((run.get("loki") or {}).get("cache_dir")),
        revision=options["revision"] or run.get("revision_of_model"),
        trust_remote_code=bool(run.get("trust_remote_code")),
        overrides=run.get("overrides_of_model_config"),
    )
    judged = gate.to_json(report)
    lines = [told, *((judged["broken"] or ["every threshold is kept"]) if judged else ())]
    found = report.prompts
    kept = None if math.isnan(found.same_answer) else found.same_answer
    facts = {"eval_loki_kl": found.kl, "eval_loki_kept": kept, **judged}
    if output:
        lines.append(f"figures in {write_json(output, facts)}")
    return Answer("\n".join(lines), facts, ok=judged.get("passed", True))


def _check_answers(prompts: str) -> None:
    from ..analysing.calibration.sources import load_records
    from ..evaluating.forgetting import answered

    if not answered(load_records(prompts)):
        raise ValueError(
            f"--max-drop goes by right answers, and '{prompts}' has none for some of its prompts;"
            " name tasks with --tasks, or take other --prompts"
        )
