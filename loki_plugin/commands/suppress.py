"""`loki suppress`."""

from __future__ import annotations

import click

from .shared import Answer, Command, make_room, write_json


@click.command(
    "suppress",
    cls=Command,
    example="loki suppress Qwen/Qwen2.5-0.5B\nloki suppress ./base --quotas 5,10 --json",
)
@click.argument("model")
@click.option("--scores", help="an analysis of `loki cache list`; default: the newest")
@click.option("--dir", "folder", help="cache folder; default: the user cache folder")
@click.option("--quotas", default="1,2,5,10,20", show_default=True, help="percent of the rows")
@click.option("--prompts", default="builtin", show_default=True, help="as loki.calibration.source")
@click.option("--device", help="default: the GPU where there is one")
@click.option("--dtype", default="auto", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False), help="write the figures as JSON")
def suppress_command(model, scores, folder, quotas, prompts, device, dtype, output):
    """Do the scores tell what rows MODEL needs? Silences its lowest, random and highest rows.

    MODEL is the model that was analysed: a folder or a hub id.
    """
    from transformers import AutoTokenizer

    from ..analysing.scores.cache import cache_folder, find_log, fingerprint_of
    from ..blocks import CalibrationArgs
    from ..evaluating.curve import curve, text
    from ..evaluating.forgetting import load_model, load_questions
    from ..model.fingerprint import fingerprint, same_model

    make_room(output)
    log = find_log(cache_folder(folder), scores)
    loaded = load_model(model, None, device, dtype)
    difference = same_model(fingerprint_of(log), fingerprint(loaded))
    if difference:
        raise ValueError(
            f"analysis {log.folder.name} was made of {log.manifest['model']}, not of '{model}':"
            f" {difference}; choose another one of `loki cache list`"
        )
    asked = load_questions(AutoTokenizer.from_pretrained(model), CalibrationArgs(source=prompts))
    found = curve(
        loaded,
        [p.ids for p in asked],
        list(log.read()),
        [float(q) for q in quotas.split(",")],
        [p.target for p in asked],
    )
    curves = [s.to_json() for s in found]
    told = f"analysis {log.folder.name}, {len(asked)} prompts\n{text(found)}"
    if output:
        told += f"\nfigures in {write_json(output, curves)}"
    facts = {"analysis": log.folder.name, "prompts": len(asked), "suppressed": curves}
    return Answer(told, facts)
