"""The numbers behind the pictures: right, small, and honest about what is missing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from helpers.analyses import analysed

from loki_plugin.picturing import numbers
from loki_plugin.picturing.numbers import CELLS, POINTS, cells, gather, of_training
from loki_plugin.picturing.pictures import learned, pictures
from loki_plugin.rows import RowSelection


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.randn(70, 3, 40)  # two shards; 5 % of 120 rows are 6


def test_densities_are_those_of_the_slow_loop(tmp_path, scores):
    _, selection = analysed(tmp_path, scores)
    found = gather(selection, tmp_path, None)["scores"]
    votes = {"highest": torch.zeros(3, 40), "lowest": torch.zeros(3, 40)}
    for prompt in scores:
        order = prompt.flatten().argsort().tolist()
        for name, rows in (("lowest", order[:6]), ("highest", order[-6:])):
            for row in rows:
                votes[name][row // 40, row % 40] += 1
    for name, counted in votes.items():
        assert np.array(found[name]) == pytest.approx(counted.numpy() / 70, rel=1e-3)
    means = scores.double().mean(0)
    levels = torch.tensor(numbers.LEVELS, dtype=torch.double)
    quantiles = means.quantile(levels, dim=1).T
    assert np.array(found["quantiles"]) == pytest.approx(quantiles.numpy(), rel=1e-3)
    chosen = [float(means[i, r].mean()) for i, r in enumerate(selection.rows)]
    assert found["chosen_mean"] == pytest.approx(chosen, rel=1e-3)


@pytest.mark.parametrize("hidden", [1, 7, CELLS, CELLS + 1, 4096])
def test_cells_are_means_of_neighbours_and_lose_nothing(hidden):
    values = np.random.default_rng(0).random((2, hidden))
    found = cells(values)
    assert found.shape == (2, min(hidden, CELLS))
    edges = np.linspace(0, hidden, found.shape[1] + 1).astype(int)
    slow = [[row[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)] for row in values]
    assert np.allclose(found, slow)
    if hidden <= CELLS:
        assert np.array_equal(found, values)


def test_the_density_of_what_trains_counts_every_row_once():
    selection = RowSelection([range(0, 300, 3), range(7)], 300)
    found = numbers.chosen_density(selection)
    sizes = np.diff(np.linspace(0, 300, CELLS + 1).astype(int))
    assert (found * sizes).sum(1) == pytest.approx([100, 7])


def test_a_large_model_leaves_a_small_file(tmp_path):
    """32 layers x 4096 rows: a sixth of a megabyte, and a page of half of one."""
    from loki_plugin.picturing.page import write_page

    torch.manual_seed(0)
    _, selection = analysed(tmp_path, torch.randn(4, 32, 4096))
    history = [{"loss": 2.0, "step": i, "loki/update_norm": i / 3} for i in range(1, 5000)]
    found = gather(selection, tmp_path, history)
    assert numbers.save(found, tmp_path).stat().st_size < 170_000
    selection.save(tmp_path / "loki_rows.json")
    page, drawn, left_out = write_page(tmp_path, found)
    assert {p.name for p in drawn} == {"training", "density", "scores", "stability"}
    assert left_out == {"tradeoff": "forgetting was not measured (no report)"}
    assert page.stat().st_size < 500_000


def test_the_curve_is_thinned_in_means_and_keeps_first_and_last():
    history = [{"loss": float(i), "step": i + 1} for i in range(10 * POINTS)]
    found = of_training([*history, {"train_loss": 3.0, "step": 10 * POINTS}, {"eval_loss": 1.0}])
    assert len(found["loss"]) == len(found["step"]) == POINTS
    assert found["loss"][:2] == pytest.approx([4.5, 14.5]) and found["step"][-1] == 10 * POINTS
    assert found["first_loss"] == 0
    assert found["last_loss"] == pytest.approx(9.5 * POINTS, rel=0.01)  # the mean of the last tenth
    assert "update_norm" not in found


def test_a_curve_of_text_and_nan_is_json():
    """Some trainers log text; a diverged run logs NaN, which JSON does not know."""
    history = [{"loss": "1.5", "step": 1, "loki/update_norm": 0.5}, {"loss": math.nan, "step": 2}]
    found = of_training(history)
    assert found["loss"] == [1.5, None] and found["update_norm"] == [0.5, None]
    json.dumps(found, allow_nan=False)
    assert of_training([{"eval_loss": 1.0, "step": 3}]) is None


@pytest.mark.parametrize(
    ("made", "left_out", "reason"),
    [
        ({"analysis": None}, {"scores", "stability"}, "do not say from which analysis"),
        ({"analysis": "0" * 20}, {"scores", "stability"}, "has no analysis '0000"),
        ({"exclude": ["gone.json"]}, {"stability"}, "'gone.json' cannot be read"),
    ],
)
def test_what_is_missing_is_named(tmp_path, scores, made, left_out, reason):
    _, selection = analysed(tmp_path, scores, **made)
    found = gather(selection, tmp_path, [{"loss": 1.0, "step": 1}])
    assert found["left_out"].keys() == left_out
    assert all(reason in why for why in found["left_out"].values())
    assert left_out.isdisjoint(found)


@pytest.mark.parametrize(("rows", "drawn"), [(range(40), False), ((3, 5), True)])
def test_where_all_rows_train_there_is_nothing_to_see(tmp_path, rows, drawn):
    found = gather(RowSelection([list(rows)] * 3, 40, None, {}), tmp_path, None)
    assert (found["chosen"] is not None) is drawn


def test_random_rows_have_scores_but_no_stability(tmp_path, scores):
    _, selection = analysed(tmp_path, scores, strategy="random")
    found = gather(selection, tmp_path, None)
    assert "scores" in found and "does not depend on prompts" in found["left_out"]["stability"]


def test_rows_of_the_select_command_know_their_analysis(tmp_path, scores):
    log, selection = analysed(tmp_path, scores)
    made = {"quota": 25, "strategy": "layer_balanced"}
    made["scores"] = f"analysis {log.folder.name} of model"
    assert "scores" in gather(RowSelection(selection.rows, 40, None, made), tmp_path, None)


def test_scores_of_another_model_are_not_taken(tmp_path, scores):
    log, _ = analysed(tmp_path, scores)
    other = RowSelection([[0]] * 2, 40, None, {"analysis": log.folder.name})
    assert "is of 3 layers x 40 rows" in gather(other, tmp_path, None)["left_out"]["scores"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a loki_figures file"),
        ('{"format": "loki_figures", "version": 2}', "has version 2, this package reads 1"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "loki_figures.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        numbers.load(tmp_path)


def test_each_evaluation_stands_beside_the_loss_that_it_had():
    """Of 40 logged losses a tenth are 4; the evaluation before the first step is no point."""
    history = [{"step": 0, "eval_loki_kl": 0.0, "eval_loki_kept": 1.0, "eval_loss": 9.0}]
    for step in range(1, 41):
        history.append({"step": step, "loss": 50.0 - step})
        if step % 20 == 0:
            history.append({"step": step, "eval_loki_kl": step / 1000, "eval_loki_kept": 0.75})
    found = of_training(history)
    assert found["evaluated"] == {
        "step": [20, 40],
        "kl": [0.02, 0.04],
        "kept": [0.75, 0.75],
        "loss": [30.5, 11.5],
    }
    assert found["last_loss"] == 11.5
    assert "evaluated" not in of_training([e for e in history if "loss" in e])
    (drawn, *_), _ = pictures(
        {"training": found, "left_out": {}, "hidden_size": 0},
        {"forgetting": {"same_answer": 0.5, "prompts": 8}},
    )
    (axis,) = drawn.figure.axes
    points = next(line for line in axis.lines if line.get_linestyle() == ":").get_xydata()
    first = 49.0
    way = [(0, 100)] + [(100 * (first - loss) / first, 75) for loss in (30.5, 11.5)]
    assert np.allclose(points, way) and "Dotted: the way there" in drawn.caption


@pytest.mark.parametrize(
    ("losses", "gone"),
    [([2.0, 1.0], 50.0), ([0.002, -0.4], None), ([0.0, 0.1], None), ([0.1, -0.2, 0.1], None)],
)
def test_a_loss_of_either_sign_is_no_share_of_what_was_learned(tmp_path, losses, gone):
    """GRPO's begins at about 0; a share of that would be any figure."""
    found = {"training": of_training([{"loss": x, "step": i} for i, x in enumerate(losses, 1)])}
    assert learned(found) == (None if gone is None else pytest.approx(gone))
    report = {"forgetting": {"same_answer": 0.9, "prompts": 10}}
    left_out = pictures(found, report)[1].get("tradeoff", "")
    assert ("does not say how much was learned" in left_out) == (gone is None)
    assert "no training loss was logged" in pictures({}, report)[1]["tradeoff"]
