"""Selecting against a plain statement of the paper's steps, and by hand."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch

from loki_plugin import select_rows
from loki_plugin.selecting import quota_to_count


def plainly(scores, k):
    """The paper's steps 1-4, with the tie rule, in plain Python."""
    selection = []
    for layer in range(scores.shape[1]):
        votes, sums = {}, {}
        for prompt in scores[:, layer].tolist():
            ranked = sorted(range(len(prompt)), key=lambda j: (prompt[j], j))
            for j in ranked[:k]:
                votes[j] = votes.get(j, 0) + 1
            for j, value in enumerate(prompt):
                sums[j] = sums.get(j, 0.0) + value
        order = sorted(sums, key=lambda j: (-votes.get(j, 0), sums[j], j))
        selection.append(sorted(order[:k]))
    return selection


def lists(rows):
    return [r.tolist() for r in rows]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("values", [2, 5, 10**6], ids="{} values".format)
def test_equals_the_plain_statement_ties_included(seed, values):
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/8 add up exactly, so that equal means are equal.
    scores = torch.randint(-values, values, (9, 3, 40), generator=generator) / 8
    for quota in (2.5, 10, 30, 100):
        k = quota_to_count(quota, 40)
        assert lists(select_rows(scores, quota)) == plainly(scores, k)


def test_by_hand():
    scores = torch.tensor(
        [
            [[5.0, 1, 2, 9, 9]],  # votes rows 1 and 2
            [[0.0, 7, 3, 9, 9]],  # votes rows 0 and 2
            [[4.0, 3, 8, 9, 3]],  # votes rows 1 and 4 (equal scores, both in)
        ]
    )
    # votes: 1, 2, 2, 0, 1 -> rows 1 and 2
    assert lists(select_rows(scores, 40)) == [[1, 2]]
    # one row: rows 1 and 2 tie with... votes of k = 1: rows 1, 0, 1 -> row 1
    assert lists(select_rows(scores, 20)) == [[1]]


def test_ties_of_votes_go_to_the_lower_mean_then_the_lower_index():
    scores = torch.tensor([[[0.0, 5, 5, 5]], [[5.0, 0, 5, 5]], [[5.0, 5, 0.0, 5]]])
    assert lists(select_rows(scores, 25)) == [[0]]
    scores[2, 0, 2] = -1
    assert lists(select_rows(scores, 25)) == [[2]]


@pytest.mark.parametrize("sizes", [[30], [1] * 30, [7, 11, 12]])
def test_chunks_and_order_of_prompts_do_not_matter(sizes):
    scores = torch.randn(30, 2, 64, generator=torch.Generator().manual_seed(0))
    whole = select_rows(scores, 10)
    shuffled = scores[torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    for some in (scores, shuffled):
        assert lists(select_rows(iter(some.split(sizes)), 10)) == lists(whole)


@pytest.mark.parametrize(
    ("quota", "hidden", "count"),
    [
        *[(q, 4096, k) for q, k in ((10, 409), (20, 819), (30, 1228))],
        *[(q, 896, k) for q, k in ((5, 44), (10, 89), (20, 179), (30, 268), (25, 224))],
        (100, 7, 7),
        (2.5, 1000, 25),
        (0.1, 3000, 3),  # 0.1 * 30 is 3.0000000000000004 in binary
        (0.7, 1000, 7),  # and 0.7 / 100 * 1000 is 6.999999999999999
        (Decimal("33.3"), 1000, 333),
        ("12.5", 8, 1),
    ],
)
def test_the_count_is_exact(quota, hidden, count):
    assert quota_to_count(quota, hidden) == count


@pytest.mark.parametrize(
    ("quota", "message"),
    [
        (0, r"percentage in \(0, 100\], got 0"),
        (100.1, r"\(0, 100\], got 100.1"),
        (-5, "got -5"),
        (1, "quota 1 % of 64 rows is no row at all; the smallest quota that trains one is 1.562"),
        ("ten", "number of percent, got 'ten'"),
        (float("nan"), "nan"),
    ],
)
def test_bad_quotas_are_named(quota, message):
    with pytest.raises(ValueError, match=message):
        select_rows(torch.randn(2, 3, 64), quota)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(3, 4), r"must be \[N, L, H\], got \[3, 4\]"),
        (torch.zeros(0, 3, 20), "no scores to select from"),
        ([], "no scores to select from"),
        ([torch.zeros(1, 3, 20), torch.zeros(1, 2, 20)], r"\[N, 3, 20\] and then \[1, 2, 20\]"),
        (torch.full((2, 1, 20), float("nan")), "prompt 0, layer 0, row 0 is nan"),
    ],
)
def test_bad_scores_are_named(scores, message):
    with pytest.raises(ValueError, match=message):
        select_rows(scores, 10)


def test_a_bad_score_in_a_later_chunk_is_named_by_its_prompt():
    good, bad = torch.zeros(5, 2, 20), torch.zeros(5, 2, 20)
    bad[3, 1, 7] = float("inf")
    with pytest.raises(ValueError, match="prompt 8, layer 1, row 7 is inf"):
        select_rows([good, bad], 10)


# Two prompts, two layers of four rows.
SCORES = torch.tensor([[[4.0, -3, 2, 1], [-8, 7, -6, 5]], [[4.0, -3, 1, 2], [-8, 7, -6, 5]]])


@pytest.mark.parametrize(
    ("strategy", "magnitude", "rows"),
    [
        ("layer_balanced", False, [[1], [0]]),
        ("layer_balanced", True, [[2], [3]]),  # |1|, |2| tie in votes and mean: lower index
        ("layer_highest", False, [[0], [1]]),
        ("layer_highest", True, [[0], [0]]),
        ("global_lowest", False, [[], [0, 2]]),
        ("global_highest", False, [[], [1, 3]]),
        ("global_lowest", True, [[2, 3], []]),
        ("global_highest", True, [[], [0, 1]]),
    ],
)
def test_every_strategy_by_hand(strategy, magnitude, rows):
    found = select_rows(SCORES, 25, strategy, magnitude=magnitude)
    assert lists(found) == rows


def test_random_rows_depend_on_the_seed_alone():
    scores = torch.randn(3, 2, 100)
    rows = lists(select_rows(scores, 10, "random", seed=5))
    assert rows == lists(select_rows(torch.zeros(1, 2, 100), 10, "random", seed=5))
    assert rows != lists(select_rows(scores, 10, "random", seed=6)) and rows[0] != rows[1]
    assert [len(set(r)) for r in rows] == [10, 10]
    assert rows[0] == [4, 7, 8, 19, 23, 29, 31, 48, 88, 99]  # the same on every machine


@pytest.mark.parametrize("strategy", ["layer_balanced", "global_lowest", "random"])
def test_excluded_rows_are_never_chosen_and_the_count_stays(strategy):
    scores = torch.randn(6, 2, 40, generator=torch.Generator().manual_seed(0))
    first = select_rows(scores, 25, strategy)
    second = select_rows(scores, 25, strategy, exclude=[first])
    third = select_rows(scores, 25, strategy, exclude=[first, second])
    for a, b in ((first, second), (first, third), (second, third)):
        assert not any(set(x.tolist()) & set(y.tolist()) for x, y in zip(a, b, strict=True))
    assert sum(map(len, first)) == sum(map(len, second)) == sum(map(len, third)) == 20
    if strategy == "layer_balanced":  # what is left is ranked as if the others were not there
        for layer, rows in enumerate(first):
            kept = [j for j in range(40) if j not in rows]
            again = select_rows(scores[:, layer : layer + 1, kept], 33.34)
            assert [kept[j] for j in again[0]] == second[layer].tolist()


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ([[[1]]], "exclusion 0 has 1 layers, the scores have 2"),
        ([[[1], [4]]], r"exclusion 0, layer 1: row 4 is outside \[0, 4\)"),
        ([[[0, 1], []], [[2, 3], []]], "layer 0 has only 0 rows left .* the quota takes 1"),
    ],
)
def test_exclusions_that_do_not_fit_are_named(exclude, message):
    with pytest.raises(ValueError, match=message):
        select_rows(SCORES, 25, exclude=exclude)


def test_an_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="'best' is unknown; expected layer_balanced"):
        select_rows(SCORES, 25, "best")
