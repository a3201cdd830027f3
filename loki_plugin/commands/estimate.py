"""`loki estimate`: what a run will take, before anything of it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shared import Answer, Command, read_run

# Where the tokenizer or a calibration set is not at hand: the paper's prompts.
_PROMPTS, _TOKENS = 57 * 50, 200


@click.command(
    "estimate",
    cls=Command,
    example="loki estimate run.yaml\nloki estimate run.yaml --card 12 --json",
    fails="the run does not fit the card",
)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--card", type=click.IntRange(min=1), default=24, show_default=True, help="its memory in GB"
)
def estimate_command(config: Path, card: int):
    """Predict memory, time and disk of the run in CONFIG, an Axolotl YAML.

    Reads the configuration of the model, not its weights: from a folder, the hub's cache or the
    hub. Memory is for one GPU that holds the whole model; times are predictions.
    """
    from ..host import need_axolotl

    need_axolotl("`loki estimate`")
    from axolotl.utils.dict import DictDefault

    from ..estimating.estimate import Estimator
    from ..host import settings
    from ..host.base import look_at
    from ..host.estimated import text
    from ..host.planned import not_counted, planned
    from ..model.linears import chosen_down

    given = read_run(config)
    cfg = DictDefault(given)
    settings.prepare(cfg)  # what the run itself would be refused for
    block = settings.parse(cfg)
    where = {
        "revision": given.get("revision_of_model"),
        "trust_remote_code": bool(given.get("trust_remote_code")),
    }
    model, anatomy = look_at({**given, "loki": cfg["loki"]})
    assumed = not_counted({**given, "loki": cfg["loki"]})
    counts = _counts(given, block, model, anatomy, assumed)
    down = set(chosen_down(anatomy, block.targets))
    counts = [c if n in down else 0 for n, c in zip(anatomy.names, counts, strict=True)]
    lengths = _lengths(given, block, where, assumed)
    analysed = block.needs_scores and bool(down) and not given.get("lora_model_dir")
    estimator = Estimator(model, anatomy, block, counts, lengths, analysed)
    facts = estimator.facts(planned(given), card) | {"assumed": assumed}
    fits = facts["card"]["analysis"] and facts["card"]["training"]
    return Answer(text(given["base_model"], facts), facts, ok=fits)


def _counts(given: dict[str, Any], block, model, anatomy, assumed: list[str]) -> list[int]:
    """Rows of every layer that train."""
    from ..implanting.carrier import check_rank
    from ..rows import FILE_NAME, RowSelection
    from ..selecting.select import quota_to_count

    earlier = given.get("lora_model_dir")
    file = block.rows or (Path(earlier) / FILE_NAME if earlier else None)
    if file:
        counts = RowSelection.load(file).check_shape(anatomy).counts
        if counts:  # none of routed experts only
            check_rank(block.rank, max(counts))
        return counts
    layers, hidden = anatomy.num_layers, anatomy.hidden_size
    if block.strategy.startswith("global"):
        total = quota_to_count(block.quota, layers * hidden)
        assumed.append(f"strategy {block.strategy}: its rows are taken as spread evenly")
        return [total * (i + 1) // layers - total * i // layers for i in range(layers)]
    count = quota_to_count(block.quota, hidden)
    check_rank(block.rank, count)
    return [count] * layers


def _lengths(given: dict[str, Any], block, where: dict[str, Any], assumed: list[str]) -> list[int]:
    """Tokens of every calibration prompt; what had to be assumed is said."""
    from transformers import AutoTokenizer

    from ..analysing.calibration.prompts import load_prompts
    from ..analysing.calibration.sources import load_records
    from ..choices import SOURCE

    settings = block.calibration
    if settings.source != SOURCE and not Path(settings.source).is_file():
        count = 57 * (settings.samples_per_subject or _PROMPTS // 57)
        assumed.append(f"calibration '{settings.source}': {count} prompts of {_TOKENS} tokens")
        return [_TOKENS] * count
    records = load_records(settings.source, **settings.reading)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            given.get("tokenizer_config") or given["base_model"], **where
        )
        # Of a folder without its files transformers makes one that knows no word.
        ids = tokenizer("A", add_special_tokens=False)["input_ids"]
        known = any(i != tokenizer.unk_token_id for i in ids)
    except (OSError, ValueError):
        known = False
    if not known:
        assumed.append(f"the tokenizer is not here: prompts of {_TOKENS} tokens")
        return [_TOKENS] * len(records)
    prompts = load_prompts(tokenizer, **settings.model_dump(), records=records).prompts
    return [len(p.ids) for p in prompts]
