"""From a loaded model to its rows: calibration, attribution, selection."""

from __future__ import annotations

import logging
import time

import torch
from torch import nn
from tqdm import tqdm

from .analysing.attribute import KERNELS
from .analysing.batches import attribute_many
from .analysing.calibration import load_prompts
from .analysing.engine import quiet
from .analysing.quadrature import quadrature
from .anatomy import find_anatomy
from .args import LokiConfig
from .fingerprint import fingerprint
from .rows import RowSelection
from .selecting import quota_to_count, select_rows

LOG = logging.getLogger("loki_plugin")


def choose_rows(model: nn.Module, tokenizer, config: LokiConfig) -> RowSelection:
    """Analyse `model` on the calibration prompts and select its rows.

    Raises:
        ValueError: an unsupported model, a quota without rows, a faulty calibration source; all
            before the first prompt runs.
    """
    anatomy = find_anatomy(model)
    quota_to_count(config.quota, anatomy.hidden_size)
    excluded = [RowSelection.load(path).check_shape(anatomy) for path in config.exclude]
    calibration = load_prompts(tokenizer, **config.calibration.model_dump())
    attribution = config.attribution
    nodes, weights = quadrature(attribution.rule, attribution.steps)
    prompts = calibration.prompts
    tokens = sum(len(p.ids) for p in prompts)
    LOG.info(
        "loki: analysing %d prompts (%d tokens, source %s) on %d layers x %d rows",
        len(prompts),
        tokens,
        calibration.source,
        anatomy.num_layers,
        anatomy.hidden_size,
    )
    started = time.perf_counter()
    parts = []
    with quiet(model), tqdm(total=len(prompts), desc="loki: analysing", unit="prompt") as bar:
        for scores in attribute_many(
            model,
            anatomy,
            [torch.tensor(p.ids) for p in prompts],
            [p.target for p in prompts],
            nodes,
            weights,
            attribution.batch_size,
            KERNELS[attribution.path],
        ):
            parts.append(scores)
            bar.update(len(scores))
    seconds = time.perf_counter() - started
    LOG.info(
        "loki: analysed in %.1f s (%.1f ms per prompt)", seconds, 1000 * seconds / len(prompts)
    )
    rows = select_rows(
        parts,
        config.quota,
        config.strategy,
        magnitude=config.magnitude,
        exclude=[s.rows for s in excluded],
        seed=config.seed,
    )
    made = {
        "quota": str(config.quota),
        "strategy": config.strategy,
        "magnitude": config.magnitude,
        "seed": config.seed,
        "exclude": config.exclude,
        "attribution": attribution.model_dump(),
        "calibration": {
            **config.calibration.model_dump(exclude_none=True),
            "prompts": len(prompts),
            "dropped": calibration.dropped,
            "hash": calibration.hash,
        },
        "analysis_seconds": round(seconds, 3),
    }
    return RowSelection(rows, anatomy.hidden_size, fingerprint(model), made)
