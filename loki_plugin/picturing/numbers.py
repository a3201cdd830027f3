"""The numbers behind a run's pictures: small whatever the model's size, kept beside its report.

`loki_figures.json` holds densities and quantiles of the scores, the stability of the selection and
the training's curve. Pictures are drawn from it, so that they can be drawn again without scores.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..analysing.scores.cache import find_log
from ..analysing.scores.log import ScoreLog
from ..choices import WATCH_KEPT, WATCH_KL
from ..implanting.saved import FIGURES_NAME
from ..model.writing import write_text
from ..rows import RowSelection
from ..selecting.select import Election, blocks
from ..selecting.stability import bootstrap_overlap

FORMAT = "loki_figures"
VERSION = 1
SHARE = 5  # percent of all rows of the model: the paper's Figure 2
CELLS = 128  # into which the rows of a layer are gathered, at most
POINTS = 400  # of the training's curve, at most
LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)  # quantiles of a layer's mean scores
NOT_ANALYSED = "the rows do not say from which analysis they were chosen"
_NAMED = re.compile(r"analysis ([0-9a-f]{20}) of ")  # how `loki select` names its scores

Numbers = dict[str, Any]


def gather(
    selection: RowSelection, cache: Path, history: Sequence[dict[str, Any]] | None
) -> Numbers:
    """Everything that can be had for a run; what cannot stands in `left_out` with its reason.

    Args:
        cache: the folder of score logs.
        history: `trainer.state.log_history`, or None where it is gone.
    """
    found: Numbers = {"format": FORMAT, "version": VERSION, "left_out": {}}
    found["hidden_size"] = selection.hidden_size
    # Where all rows train, or none, there is nothing to see.
    hidden = selection.hidden_size or 0
    drawn = any(0 < count < hidden for count in selection.counts)
    found["chosen"] = _rounded(chosen_density(selection)) if drawn else None
    try:
        log = _log_of(selection, cache)
        found["scores"] = of_scores(log, selection)
    except ValueError as error:
        found["left_out"] |= {"scores": str(error), "stability": str(error)}
    else:
        try:
            found["stability"] = of_stability(log, selection)
        except ValueError as error:
            found["left_out"]["stability"] = str(error)
    training = of_training(history or ())
    if training:
        found["training"] = training
    else:
        found["left_out"]["training"] = "no loss was logged"
    return found


def _log_of(selection: RowSelection, cache: Path) -> ScoreLog:
    """The analysis that the rows were chosen from.

    Raises:
        ValueError: the rows name none, it is not in the cache, or it is of another size.
    """
    key = selection.made.get("analysis")
    if key is None:
        named = _NAMED.match(str(selection.made.get("scores")))
        if named is None:
            raise ValueError(NOT_ANALYSED)
        key = named[1]
    log = find_log(cache, key)
    if log.shape != (selection.num_layers, selection.hidden_size):
        raise ValueError(f"analysis '{key}' is of {log.shape[0]} layers x {log.shape[1]} rows")
    return log


def of_scores(log: ScoreLog, selection: RowSelection) -> dict[str, Any]:
    """Where high and low scores sit, and how they spread per layer; one pass over the scores."""
    prompts, (layers, hidden) = len(log.manifest["prompts"]), log.shape
    votes = {n: np.zeros((layers, hidden)) for n in ("highest", "lowest")}
    elections = {n: Election(log.shape, SHARE, f"global_{n}") for n in votes}
    sums = np.zeros((layers, hidden))
    for block in blocks(log.read()):
        sums += block.sum(0, dtype=np.float64)
        for name, election in elections.items():
            votes[name] += election.vote(election.key(block)).sum(0).reshape(layers, hidden)
    means = sums / prompts
    chosen = [
        float(layer[rows.numpy()].mean()) if len(rows) else math.nan
        for layer, rows in zip(means, selection.rows, strict=True)
    ]
    return {
        "prompts": prompts,
        "share": SHARE,
        **{name: _rounded(cells(v / prompts)) for name, v in votes.items()},
        "levels": list(LEVELS),
        "quantiles": _rounded(np.quantile(means, LEVELS, axis=1).T),
        "chosen_mean": _rounded(np.array(chosen)),
    }


def of_stability(log: ScoreLog, selection: RowSelection) -> dict[str, Any]:
    """Overlaps of `bootstrap_overlap` for the rows' own quota and strategy.

    Raises:
        ValueError: a selection that depends on no prompt, or whose excluded rows are gone.
    """
    made = selection.made
    missing = [k for k in ("quota", "strategy") if k not in made]
    if missing:
        raise ValueError(f"the rows do not say their {' and '.join(missing)}")
    found = bootstrap_overlap(
        log.read(),
        made["quota"],
        made["strategy"],
        magnitude=made.get("magnitude", False),
        exclude=[RowSelection.load(path).rows for path in made.get("exclude", ())],
        prompts=len(log.manifest["prompts"]),
    )
    return {
        "sizes": list(found.sizes),
        "overlap": _rounded(found.overlap.mean(0)),
        "halves": _rounded(found.halves.mean(0)),
        "chance": found.chance,
        "score": found.score,
        "enough": found.enough,
    }


def of_training(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The logged training steps, in `POINTS` means at most; None where none was logged."""
    logged = [entry for entry in history if "loss" in entry and "step" in entry]
    if not logged:
        return None
    groups = np.array_split(np.arange(len(logged)), min(len(logged), POINTS))
    curve: dict[str, Any] = {"step": [int(logged[g[-1]]["step"]) for g in groups]}
    for key, name in (
        ("loss", "loss"),
        ("loki/update_norm", "update_norm"),
        ("loki/kl_to_base", "kl_to_base"),
    ):
        values = np.array([_number(entry.get(key)) for entry in logged])
        if np.isfinite(values).any():
            curve[name] = _rounded(np.array([_mean(values[g]) for g in groups]))
    losses = np.array([_number(entry["loss"]) for entry in logged])
    curve |= {"first_loss": _plain(losses[0]), "last_loss": _plain(_recent(losses))}
    return curve | _evaluated(history, [entry["step"] for entry in logged], losses)


def _evaluated(
    history: Sequence[dict[str, Any]], steps: Sequence[int], losses: np.ndarray
) -> dict[str, Any]:
    """Of each evaluation that measured what is kept: its step, KL, share kept, and the loss there.

    Without the one before the first step.
    """
    found = [e for e in history if WATCH_KEPT in e and e["step"] >= steps[0]]
    if not found:
        return {}
    names = {"step": "step", "kl": WATCH_KL, "kept": WATCH_KEPT}
    columns = {n: [_plain(_number(e[key])) for e in found] for n, key in names.items()}
    seen = [np.searchsorted(steps, e["step"], side="right") for e in found]
    return {"evaluated": columns | {"loss": [_plain(_recent(losses[:n])) for n in seen]}}


def _recent(losses: np.ndarray) -> float:
    """The mean of the last tenth."""
    return _mean(losses[-max(1, len(losses) // 10) :])


def chosen_density(selection: RowSelection) -> np.ndarray:
    """The share of the rows of a cell that train, [L, C]."""
    mask = np.zeros((selection.num_layers, selection.hidden_size or 0))
    for layer, rows in zip(mask, selection.rows, strict=True):
        layer[torch.as_tensor(rows).numpy()] = 1
    return cells(mask)


def cells(values: np.ndarray) -> np.ndarray:
    """[L, H] to [L, C], C = min(H, `CELLS`): means of neighbouring rows."""
    hidden = values.shape[1]
    edges = np.linspace(0, hidden, min(hidden, CELLS) + 1).astype(int)
    return np.add.reduceat(values, edges[:-1], axis=1) / np.diff(edges)


def save(numbers: Numbers, folder: Path) -> Path:
    path = folder / FIGURES_NAME
    write_text(path, json.dumps(numbers, allow_nan=False) + "\n")
    return path


def load(folder: Path) -> Numbers | None:
    """The numbers of a run, or None where it has none.

    Raises:
        ValueError: not a file of ours, or of a later version.
    """
    path = folder / FIGURES_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON ({error}); remove it and try again") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"'{path}' is not a {FORMAT} file; remove it and try again")
    if content.get("version") != VERSION:
        raise ValueError(
            f"'{path}' has version {content.get('version')!r}, this package reads {VERSION}; update"
            " loki_plugin, or remove the file and try again"
        )
    return content


def array(values: Any) -> np.ndarray:
    """Numbers as they were saved, as an array; null is NaN."""
    return np.array(values, dtype=float)


def _rounded(values: np.ndarray) -> list:
    if values.ndim > 1:
        return [_rounded(v) for v in values]
    return [_plain(v) for v in values]


def _plain(value: float) -> float | None:
    """Four digits, which no picture shows; None for NaN and Inf, which JSON does not know."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _number(value: Any) -> float:
    """A logged value, which some trainers write as text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
