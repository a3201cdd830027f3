"""A run's numbers to its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..selecting.stability import ENOUGH
from .drawing.rows import density_figure, scores_figure
from .drawing.stability import stability_figure
from .drawing.style import to_png
from .drawing.tradeoff import tradeoff_figure
from .drawing.training import training_figure
from .numbers import Numbers, array

# What can be drawn of a run, in the order in which it is read.
NAMES = ("tradeoff", "training", "density", "scores", "stability")
TITLES = {
    "tradeoff": "Knowledge kept against task learned",
    "training": "The training",
    "density": "Where high and low rows sit",
    "scores": "Scores per layer",
    "stability": "Would other prompts have chosen the same rows?",
}


@dataclass(frozen=True)
class Picture:
    """One figure, with what a reader must know to read it."""

    name: str
    figure: Figure
    caption: str

    @property
    def title(self) -> str:
        return TITLES[self.name]


def pictures(numbers: Numbers, report: dict[str, Any]) -> tuple[list[Picture], dict[str, str]]:
    """Every picture that the numbers allow, and of the others why they are not there.

    Args:
        report: what `loki_report.json` holds; empty where there is none.

    Raises:
        ValueError: numbers that do not fit together.
    """
    makers = {
        "tradeoff": lambda: _tradeoff(numbers, report),
        "training": lambda: _training(numbers),
        "density": lambda: _density(numbers),
        "scores": lambda: _scores(numbers),
        "stability": lambda: _stability(numbers),
    }
    drawn, left_out = [], {}
    reasons = numbers.get("left_out", {})
    for name in NAMES:
        try:
            picture = makers[name]()
        except (TypeError, KeyError, IndexError) as error:
            raise ValueError(f"the numbers of '{name}' are damaged ({error!r})") from error
        if isinstance(picture, str):
            left_out[name] = reasons.get("scores" if name == "density" else name) or picture
        else:
            drawn.append(picture)
            if name == "density" and "scores" not in numbers:
                left_out["density"] = reasons.get("scores", "there are no scores")
    return drawn, left_out


def save_pictures(drawn: list[Picture], folder: Path) -> list[Path]:
    """Write each as NAME.png into `folder`."""
    paths = []
    for picture in drawn:
        paths.append(folder / f"{picture.name}.png")
        to_png(picture.figure, paths[-1])
    return paths


def learned(numbers: Numbers) -> float | None:
    """How much of the first logged training loss is gone, in percent.

    None where none was logged, or where it is no amount of anything: that of GRPO is about 0 and
    takes either sign.
    """
    training = numbers.get("training") or {}
    first, last = training.get("first_loss"), training.get("last_loss")
    if first is None or last is None or first <= 0 or np.nanmin(array(training["loss"])) < 0:
        return None
    return 100 * (first - last) / first


def _tradeoff(numbers: Numbers, report: dict[str, Any]) -> Picture | str:
    forgetting = report.get("forgetting") or {}
    if "same_answer" not in forgetting:
        return f"forgetting was not measured ({forgetting.get('not_measured', 'no report')})"
    gained = learned(numbers)
    if gained is None and (numbers.get("training") or {}).get("first_loss") is not None:
        return "the loss of this training does not say how much was learned"
    if gained is None:
        return "no training loss was logged"
    kept = 100 * forgetting["same_answer"]
    way, caption = _way(numbers), ""
    if way:
        caption = (
            " Dotted: the way there, from one evaluation to the next, on the few prompts that are"
            " held back for them."
        )
    return Picture(
        "tradeoff",
        tradeoff_figure(["this run"], [gained], [kept], way=way),
        f"Up: the share of {forgetting['prompts']} calibration prompts that the tuned model answers"
        " as its base does. Right: how much of the first logged training loss is gone. Top right is"
        " best; both are measured on what the run itself has seen, so they are no test set."
        + caption,
    )


def _way(numbers: Numbers) -> list[tuple[float, float]]:
    """Percent of the first loss gone, and kept, at each evaluation."""
    training = numbers["training"]
    found, first = training.get("evaluated") or {"loss": [], "kept": []}, training["first_loss"]
    pairs = zip(array(found["loss"]), array(found["kept"]), strict=True)
    return [(100 * (first - x) / first, 100 * y) for x, y in pairs if np.isfinite(x + y)]


def _training(numbers: Numbers) -> Picture | str:
    curve = numbers.get("training")
    if not curve:
        return "no loss was logged"
    series = {k: array(curve[k]) for k in ("update_norm", "kl_to_base") if k in curve}
    caption = "Logged by the trainer."
    if "update_norm" in series:
        caption += (
            " ‖ΔW‖ is the Frobenius norm of what all trained rows together have moved away from"
            " the base."
        )
    return Picture(
        "training",
        training_figure(
            curve["step"],
            array(curve["loss"]),
            series.get("update_norm"),
            series.get("kl_to_base"),
        ),
        caption,
    )


def _density(numbers: Numbers) -> Picture | str:
    scores, chosen = numbers.get("scores"), numbers.get("chosen")
    if scores is None and chosen is None:
        return "there are no scores"
    share = scores["share"] if scores else 0
    figure = density_figure(
        array(scores["highest"]) if scores else None,
        array(scores["lowest"]) if scores else None,
        array(chosen) if chosen else None,
        numbers["hidden_size"],
        share,
    )
    caption = "Green: the rows that train, as the share of the rows of a cell."
    if scores:
        caption = (
            f"For every calibration prompt the {share:g} % of all rows of the model with the"
            " highest scores are counted, and the same number with the lowest. The shade of a cell"
            f" is the mean share of the {scores['prompts']:,} prompts, on a log scale; by chance it"
            f" would be {share:g} % everywhere. The paper's Figure 2. {caption}"
        )
    return Picture("density", figure, caption)


def _scores(numbers: Numbers) -> Picture | str:
    scores = numbers.get("scores")
    if scores is None:
        return "there are no scores"
    chosen = array(scores["chosen_mean"])
    return Picture(
        "scores",
        scores_figure(
            array(scores["quantiles"]),
            None if np.isnan(chosen).all() else chosen,
            tuple(scores["levels"]),
        ),
        "The score of a row says how much of the probability of the answer it carries, averaged"
        " over the prompts; negative rows work against it. Strategies other than the controls"
        " choose where scores are lowest.",
    )


def _stability(numbers: Numbers) -> Picture | str:
    found = numbers.get("stability")
    if found is None:
        return "there are no scores"
    verdict = (
        "enough prompts" if found["enough"] else f"not enough prompts ({ENOUGH:.0%} is asked for)"
    )
    return Picture(
        "stability",
        stability_figure(
            found["sizes"],
            array(found["overlap"]),
            array(found["halves"]),
            found["chance"],
            ENOUGH,
        ),
        f"Rows are chosen again from resampled prompts: unlimited prompts of this kind would keep"
        f" about {found['score']:.1%} of the rows; {verdict}. Dots: two halves of the prompts,"
        " which share none, against each other.",
    )
