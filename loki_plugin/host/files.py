"""The files of a training run, each read once, before the model is loaded."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..analysing.scores.cache import check_cache
from ..args import LokiConfig
from ..choices import DOWN
from ..inputs import Inputs
from ..model.linears import kind_of
from ..rows import RowSelection, common_rows
from .base import check_base
from .earlier import rows_of
from .settings import parse
from .sharding import check_starts_afresh
from .watched import check_watched


@dataclass(frozen=True)
class Files:
    """What a training run has read.

    Attributes:
        config: the `loki:` block.
        source: where the rows come from, in words.
        rows: the rows of the adapter that goes on, or of `loki.rows`; None = to be analysed.
        inputs: what analysing and protecting read.
        goes_on: whether the rows are those of an adapter that goes on.
    """

    config: LokiConfig
    source: str
    rows: RowSelection | None
    inputs: Inputs
    goes_on: bool = False

    @classmethod
    def read(cls, cfg) -> Files:
        """Read what the run needs and no more.

        Raises:
            ValueError: a file that cannot be read or contradicts another one, or the targets; a
                quantised base; a cache folder that cannot be written; a run that goes by its
                evaluations and makes none.
        """
        config = parse(cfg)
        check_starts_afresh(cfg)
        check_base(cfg)
        watched = check_watched(cfg, config)
        source, rows = "analysis" if config.needs_scores else "no analysis", None
        if cfg.lora_model_dir:
            source = f"adapter {cfg.lora_model_dir}"
            rows = rows_of(Path(cfg.lora_model_dir), config)
        elif config.rows:
            source, rows = config.rows, RowSelection.load(config.rows)
        if rows is not None and rows.linears and config.targets == DOWN:
            kinds = ", ".join(dict.fromkeys(map(kind_of, rows.linears)))
            raise ValueError(
                f"'{cfg.lora_model_dir or config.rows}' names {len(rows.linears)} further linears"
                f" ({kinds}), and `loki.targets: {DOWN}` trains none; set `targets` to what it was"
                " trained with, such as `all`, or give a file of rows only"
            )
        analysed = rows is None and config.needs_scores
        if analysed:
            check_cache(config.cache_dir)
        inputs = Inputs.read(config, analysed=analysed, watched=watched)
        if rows is not None:
            for path, excluded in zip(config.exclude, inputs.excluded, strict=True):
                _check_disjoint(rows, cfg.lora_model_dir, excluded, path)
        return cls(config, source, rows, inputs, bool(cfg.lora_model_dir))


def _check_disjoint(rows: RowSelection, folder: str, other: RowSelection, path: str) -> None:
    if other.num_layers != rows.num_layers:
        raise ValueError(
            f"loki.exclude '{path}' has {other.num_layers} layers, but the adapter"
            f" '{folder}' has {rows.num_layers}; they belong to different models"
        )
    common = common_rows(rows, other)
    if any(common):
        layer = next(i for i, shared in enumerate(common) if shared)
        raise ValueError(
            f"lora_model_dir '{folder}' trains {sum(map(len, common))} rows that loki.exclude"
            f" '{path}' keeps out (layer {layer}: {common[layer][:5]}); an adapter keeps its rows:"
            " start a new one without `lora_model_dir`, or take the file out of `exclude`"
        )


def config_file(cfg) -> str | None:
    """The YAML that the user gave, or None: Axolotl writes a configuration from memory to /tmp."""
    given = cfg.axolotl_config_path
    if not given or Path(given).parent == Path(tempfile.gettempdir()):
        return None
    return str(given)
