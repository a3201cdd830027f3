"""`loki analyse`: the analysis of a run, ahead of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shared import Answer, Command, check_adapter_beside, read_run


@click.command(
    "analyse",
    cls=Command,
    example="loki analyse run.yaml\nCUDA_VISIBLE_DEVICES=0 loki analyse run.yaml --json",
)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="the rows file; default: output_dir/loki_rows.json",
)
def analyse_command(config: Path, output: Path | None):
    """Choose the rows of the run in CONFIG, an Axolotl YAML, ahead of training.

    The model is loaded as the run loads it, in this process alone (no FSDP, no DeepSpeed). The
    scores, and the directions that `protect` asks for, go into the cache, where `axolotl train
    CONFIG` finds them; the rows also into a file, for machines that do not share the cache.
    """
    from ..host import need_axolotl

    need_axolotl("`loki analyse`")
    from axolotl.train import setup_model_and_tokenizer

    from ..host.telling import block
    from ..rows import FILE_NAME

    cfg, plugin = _load(config)
    plugin.load_datasets(cfg)  # our first hook of a training run; no data set is read
    files = plugin.files
    if files.rows is not None and not (files.config.protect.reads and not cfg.lora_model_dir):
        return Answer(
            f"nothing to analyse: the run takes its rows from {files.source}\n"
            f"next: axolotl train {config}",
            {"rows_from": files.source},
        )
    setup_model_and_tokenizer(cfg)
    run = plugin.run
    file = output or Path(cfg.output_dir) / FILE_NAME
    check_adapter_beside(file, run.selection)
    written = run.selection.save(file)
    facts = {
        "rows_file": str(written),
        "rows_per_layer": run.selection.counts,
        "hidden_size": run.selection.hidden_size,
        **run.facts,
        "selection": run.selection.made,
    }
    told = [*run.told, ("file", str(written)), ("next", f"axolotl train {config}")]
    return Answer(block("found ahead of the run", told), facts)


def _load(config: Path) -> tuple[Any, Any]:
    """The run's configuration for one process, and the plugin that acts for it."""
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    from ..host import settings
    from ..host.sharding import SPREADING
    from ..plugin import LokiPlugin

    given = read_run(config)
    settings.prepare(DictDefault(given))  # what the run itself would be refused for
    changes: dict[str, Any] = {key: None for key in SPREADING if given.get(key) is not None}
    if changes:
        # Axolotl stores some families' 4-bit weights as float32, but not where they are spread.
        stored = {"bnb_4bit_quant_storage": "bfloat16"}
        changes["bnb_config_kwargs"] = stored | (given.get("bnb_config_kwargs") or {})
    cfg = load_cfg(str(config), **changes)
    plugin = LokiPlugin.of(cfg)
    if plugin is None:
        raise ValueError(f"'{config}' does not list loki; add `plugins: [loki]` to it")
    return cfg, plugin
