"""Forgetting while it trains, as a YAML asks for it: Axolotl's keys and `loki.stop_forgetting`."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from ..args import LokiConfig
from ..choices import WATCH_KEPT, WATCH_KL
from ..evaluating.held_back import held_back
from ..evaluating.watching import Watch
from ..inputs import Inputs

_OURS = (WATCH_KL, WATCH_KEPT)


def check_watched(cfg, config: LokiConfig) -> bool:
    """Whether a validated run goes by what its evaluations find forgotten.

    Raises:
        ValueError: it would, and evaluates nothing; or in a way that Axolotl does not know.
    """
    metric = _metric(cfg)
    if metric and metric not in _OURS:
        known = " and ".join(name.removeprefix("eval_") for name in _OURS)
        raise ValueError(
            f"metric_for_best_model: {cfg.metric_for_best_model} is no figure of loki; there are"
            f" {known}"
        )
    given = f"metric_for_best_model: {cfg.metric_for_best_model}" if metric else ""
    if given and cfg.rl:
        raise ValueError(
            f"{given} does not reach the trainers of `rl: {getattr(cfg.rl, 'value', cfg.rl)}`, to"
            " which Axolotl passes no such key; take it out, or set `loki.stop_forgetting`"
        )
    if config.stop_forgetting is not None:
        given = f"loki.stop_forgetting: {config.stop_forgetting:g}"
    if given and not evaluates(cfg):
        raise ValueError(
            f"{given} goes by evaluations, and this run makes none; set `val_set_size` (or"
            " `test_datasets`) and `eval_steps`"
        )
    return bool(given)


def evaluates(cfg) -> bool:
    """Whether Axolotl's trainer evaluates while it trains."""
    held_out = cfg.val_set_size or cfg.test_datasets
    return bool(held_out and (cfg.eval_steps or (cfg.eval_strategy or "no") != "no"))


def watch(
    cfg, model: nn.Module, tokenizer: Any, config: LokiConfig, inputs: Inputs, unknown: frozenset
) -> Watch | None:
    """What measures at every evaluation; None where there is none, or nothing is reported.

    Raises:
        ValueError: the run goes by figures for which it has no text.
    """
    needed = check_watched(cfg, config)
    if not evaluates(cfg) or not (config.report or needed):
        return None
    prompts, own = held_back(model, tokenizer, config, inputs, unknown)
    if not prompts and _metric(cfg) == WATCH_KEPT:
        raise ValueError(
            f"metric_for_best_model: {cfg.metric_for_best_model} needs calibration prompts that can"
            f" be held back, and `{config.calibration.source}` has one only; take loki_kl"
        )
    if not prompts and not own:
        if needed:
            raise ValueError(
                f"there is no text to measure on what is forgotten: the model cannot write, and"
                f" `{config.calibration.source}` has no prompt that can be held back; take"
                " `loki.stop_forgetting` and `metric_for_best_model` out, or give more prompts"
            )
        return None
    row = cfg.sequence_len if cfg.sample_packing or cfg.pretraining_dataset else None
    return Watch(prompts, own, config.stop_forgetting, needed, row)


def choose_by(cfg, trainer: Trainer) -> None:
    """Which way our figures are better, where the best checkpoint is chosen by one.

    The trainer takes more for better in any name that does not end in `loss`, and Axolotl keeps
    `greater_is_better: false` to itself.
    """
    if _metric(cfg):
        given = cfg.greater_is_better
        more = _metric(cfg) == WATCH_KEPT
        trainer.args.greater_is_better = more if given is None else given


def _metric(cfg) -> str | None:
    """The trainer's name of `metric_for_best_model`, where that may be one of ours."""
    name = f"eval_{str(cfg.metric_for_best_model or '').removeprefix('eval_')}"
    return name if name.startswith("eval_loki") else None
