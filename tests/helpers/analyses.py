"""A finished analysis in a cache folder, and rows that were chosen from it."""

from __future__ import annotations

import torch

from loki_plugin.analysing.calibration.prompts import Calibration, Prompt
from loki_plugin.analysing.scores.cache import open_log
from loki_plugin.analysing.scores.log import ScoreLog, fill
from loki_plugin.rows import RowSelection
from loki_plugin.selecting.select import select_rows

MARK = {"config": "c", "identity": "i", "weights": "w", "quantisation": "none:float32"}
SETTINGS = {"steps": 7, "rule": "left", "path": "token"}


def analysed(
    cache, scores: torch.Tensor, model: str = "model", **made
) -> tuple[ScoreLog, RowSelection]:
    """The log of `scores` [N, L, H], and the selection of 25 % that says so."""
    prompts = [Prompt((i, i + 1), None) for i in range(len(scores))]
    shape = scores.shape[1:]
    log = open_log(cache, MARK, Calibration(prompts, 0, "here"), SETTINGS, *shape, model)
    fill(log, lambda positions: scores[list(positions)], log.missing())
    made = {"quota": 25, "strategy": "layer_balanced", "analysis": log.folder.name} | made
    rows = select_rows(scores, made["quota"], made["strategy"])
    return log, RowSelection(rows, shape[1], MARK, made)
