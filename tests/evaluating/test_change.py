"""Flips, their test, and the paper's mean, by hand."""

from __future__ import annotations

import pytest

from loki_plugin.evaluating.change import TaskChange, flips, mcnemar, mean_relative_drop


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


def test_the_mean_is_signed_unless_gains_are_clipped():
    changes = [TaskChange("a", "acc", 0.5, 0.25), TaskChange("b", "acc", 0.5, 0.75)]
    assert mean_relative_drop(changes) == 0
    assert mean_relative_drop(changes, clip_gains=True) == 0.25
    nothing = TaskChange("c", "acc", 0.0, 0.5)
    assert nothing.relative_drop is None
    assert mean_relative_drop([nothing]) is None
    assert mean_relative_drop([*changes, nothing]) == 0
