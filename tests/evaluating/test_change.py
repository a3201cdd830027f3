"""Flips, their test, and the paper's mean, by hand."""

from __future__ import annotations

import pytest

from loki_plugin.evaluating.change import TaskChange, flips, mcnemar, mean_relative_drop
from loki_plugin.evaluating.forgetting import ForgettingReport
from loki_plugin.evaluating.gate import Gate
from loki_plugin.evaluating.harness import changes
from loki_plugin.evaluating.quick import Forgetting


@pytest.mark.parametrize(
    ("down", "up", "p"),
    [
        (0, 0, 1.0),
        (1, 1, 1.0),
        (5, 5, 1.0),
        (3, 0, 0.25),  # 2 · 1/8
        (0, 3, 0.25),
        (5, 1, 2 * 7 / 64),
        (8, 2, 2 * 56 / 1024),
    ],
)
def test_mcnemar_by_hand(down, up, p):
    assert mcnemar(down, up) == pytest.approx(p)


def test_flips_keep_their_direction():
    assert flips([1, 1, 0, 0, 1], [1, 0, 1, 0, 0]) == (2, 1)
    with pytest.raises(ValueError, match="2 items before and 1 after"):
        flips([1, 0], [1])


def test_a_perplexity_that_rises_is_a_loss():
    worse = TaskChange("wikitext", "word_perplexity", 10.0, 20.0, higher_is_better=False)
    assert worse.relative_drop == 1
    assert mean_relative_drop([worse], clip_gains=True) == 1


def results(scores, subtasks=None, higher=None):
    found = {"results": {t: {} if s is None else {"acc,none": s} for t, s in scores.items()}}
    return found | {"group_subtasks": subtasks or {}, "higher_is_better": higher or {}}


def test_a_group_counts_once_and_one_without_a_score_is_left_out():
    inside = {"mmlu": ["stem"], "stem": ["a", "b"], "list": ["c"], "a": [], "c": []}
    before = {"mmlu": 0.5, "stem": 0.5, "a": 0.5, "b": 0.5, "c": 0.8, "list": None}
    after = before | {"c": 0.4}
    found = changes(results(before, inside), results(after, inside))
    assert {c.task for c in found} == {"mmlu", "stem", "a", "b", "c"}
    assert {c.task for c in found if c.counts} == {"mmlu", "c"}
    assert mean_relative_drop(found) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="have no score"):
        changes(results({"list": None}), results({"list": None}))


def test_lm_evals_word_on_what_is_better_is_taken():
    told = {"a": {"acc": False}}
    (change,) = changes(results({"a": 0.5}, higher=told), results({"a": 0.75}, higher=told))
    assert not change.higher_is_better and change.relative_drop == 0.5


def test_the_mean_is_signed_unless_gains_are_clipped():
    changes = [TaskChange("a", "acc", 0.5, 0.25), TaskChange("b", "acc", 0.5, 0.75)]
    assert mean_relative_drop(changes) == 0
    assert mean_relative_drop(changes, clip_gains=True) == 0.25
    nothing = TaskChange("c", "acc", 0.0, 0.5)
    assert nothing.relative_drop is None
    assert mean_relative_drop([nothing]) is None
    assert mean_relative_drop([*changes, nothing]) == 0


@pytest.mark.parametrize(
    ("before", "after", "higher", "said"),
    [
        (-0.02, -0.3, True, "lost 1400 %"),  # a correlation
        (-2.0, -9.0, True, "lost 350 %"),  # a log-likelihood
        (-1.0, 0.5, False, "lost 150 %"),
        (0.0, 5.0, False, "cola was 0 and is 5, more than --max-drop 1"),
        (0.0, -0.5, True, "cola was 0 and is -0.5"),
        (-0.3, -0.02, True, None),
        (-1.0, -5.0, False, None),
        (0.0, 0.2, True, None),
    ],
)
def test_a_metric_below_zero_that_gets_worse_breaks_the_gate(before, after, higher, said):
    change = TaskChange("cola", "mcc,none", before, after, higher_is_better=higher)
    broken = Gate(max_drop=1).broken(ForgettingReport(Forgetting(10, 0.0, 1.0), [change]))
    assert (said in broken[0]) if said else not broken
