"""Selecting against a plain statement of the paper's steps, and by hand."""

from __future__ import annotations

import itertools
import math
import re
from decimal import Decimal

import numpy as np
import pytest
import torch

from loki_plugin import select_rows
from loki_plugin.choices import STRATEGIES
from loki_plugin.selecting.select import quota_to_count


def plainly(scores, count, strategy="layer_balanced", magnitude=False, taken=()):
    """The paper's steps in plain Python, with the tie rule; `taken` are (layer, row) pairs.

    Every prompt ranks the rows of a contest, its first `count` get a vote, and the `count` rows
    with the most votes win.
    """
    prompts, layers, hidden = scores.shape
    sign = -1 if strategy.endswith("highest") else 1

    def key(n, place):
        value = float(scores[n][place])
        return sign * (abs(value) if magnitude else value)

    contests = [[(layer, j) for j in range(hidden)] for layer in range(layers)]
    if strategy.startswith("global"):
        contests = [sum(contests, [])]
    rows = [[] for _ in range(layers)]
    for contest in contests:
        places = [place for place in contest if place not in taken]
        votes = dict.fromkeys(places, 0)
        for n in range(prompts):
            for place in sorted(places, key=lambda p: (key(n, p), p))[:count]:
                votes[place] += 1
        sums = {p: math.fsum(key(n, p) for n in range(prompts)) for p in places}
        for layer, j in sorted(places, key=lambda p: (-votes[p], sums[p], p))[:count]:
            rows[layer].append(j)
    return [sorted(r) for r in rows]


def as_the_authors(scores, quota, strategy):
    """Their rule: votes after min-max scaling; equal scores and votes fall as numpy sorts them.

    Returns for each contest the votes and the number of places.
    """
    prompts, layers, hidden = scores.shape
    scores = scores.numpy()
    width = layers * hidden if strategy.startswith("global") else hidden
    count = int(width * quota / 100)
    contests = scores.reshape(prompts, -1, width)
    low = contests.min(-1, keepdims=True)
    scaled = (contests - low) / (contests.max(-1, keepdims=True) - low)
    order = np.argsort(-scaled if strategy.endswith("highest") else scaled, -1)
    votes = np.zeros(contests.shape, int)
    np.put_along_axis(votes, order[..., :count], 1, -1)
    return votes.sum(0), count


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


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "random"])
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("values", [2, 10**6], ids="{} values".format)
def test_every_strategy_equals_the_plain_statement(strategy, magnitude, values):
    generator = torch.Generator().manual_seed(values)
    scores = torch.randint(-values, values, (7, 3, 20), generator=generator) / 8
    exclude = [[[0, 5], [], [19]], [[5, 6], [1], []]]
    taken = {(layer, j) for rows in exclude for layer, some in enumerate(rows) for j in some}
    k = quota_to_count(20, 60 if strategy.startswith("global") else 20)
    found = select_rows(scores, 20, strategy, magnitude=magnitude, exclude=exclude)
    assert lists(found) == plainly(scores, k, strategy, magnitude, taken)
    found = select_rows(scores, 20, strategy, magnitude=magnitude)
    assert lists(found) == plainly(scores, k, strategy, magnitude)


@pytest.mark.parametrize("strategy", ["layer_balanced", "global_lowest", "global_highest"])
@pytest.mark.parametrize("quota", [5, 10, 30])
def test_equals_the_authors_rule_up_to_ties(strategy, quota):
    scores = torch.randn(25, 4, 60, generator=torch.Generator().manual_seed(quota)).double()
    votes, count = as_the_authors(scores, quota, strategy)
    rows = select_rows(scores, quota, strategy)
    chosen = np.zeros((4, 60), bool)
    for layer, some in enumerate(rows):
        chosen[layer, some] = True
    for won, tally in zip(chosen.reshape(votes.shape), votes, strict=True):
        limit = np.sort(tally)[-count]
        assert won.sum() == count
        assert won[tally > limit].all() and not won[tally < limit].any()
        assert (tally > limit).sum() > 0  # not everything is a tie


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


@pytest.mark.parametrize("strategy", ["layer_balanced", "global_highest"])
def test_means_that_floating_point_sums_confuse(strategy):
    # Rows 1 and 2 have the same values in another order: 1e8 + 1e-6 - 1e8 is 0 or 1e-6 as you add.
    scores = torch.tensor([[[0, 1e8, 1e-6, 9e9]], [[0, 1e-6, -1e8, 9e9]], [[0, -1e8, 1e8, 9e9]]])
    scores = torch.cat([scores, -scores])  # every row has mean 0, exactly
    expected = plainly(scores, 2, strategy)
    for order in itertools.permutations(range(6)):
        assert lists(select_rows(scores[list(order)], 50, strategy)) == expected


def test_the_mean_sees_small_differences_beside_large_scores():
    scores = torch.tensor([[[1e6, 1e6, 5e6]], [[1e-9, 0.0, 5e6]]])  # rows 0 and 1: one vote each
    assert lists(select_rows(scores, 34)) == [[1]]
    scores = torch.tensor([[[1e6, 1e6, 5e6]], [[0.0, 0.0, 5e6]], [[1e6, 1e6 - 0.0625, 5e6]]])
    assert lists(select_rows(scores, 34)) == [[0]]  # votes 2 and 1 count before the mean


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64, torch.long])
def test_scores_of_other_types(kind):
    scores = torch.randint(-3, 4, (9, 2, 30), generator=torch.Generator().manual_seed(0))
    expected = lists(select_rows(scores.float(), 20))
    assert lists(select_rows(scores.to(kind), 20)) == expected
    assert lists(select_rows(scores.numpy(), 20)) == expected
    assert lists(select_rows([s.numpy() for s in scores.split(4)], 20)) == expected


def test_scores_are_left_as_they_were_and_read_once():
    scores = torch.randn(9, 2, 30, generator=torch.Generator().manual_seed(0))
    before, reads = scores.clone(), []

    def chunks():
        for chunk in scores.split(4):
            reads.append(len(chunk))
            yield chunk

    select_rows(chunks(), 20, "layer_highest", magnitude=True, exclude=[[[1], [2]]])
    assert reads == [4, 4, 1] and torch.equal(scores, before)


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
        (1, r"quota 1 % of 64 rows is no row at all \(k = 0\); the smallest .* one is 1.563"),
        ("ten", "number of percent, got 'ten'"),
        (float("nan"), "nan"),
    ],
)
def test_bad_quotas_are_named(quota, message):
    with pytest.raises(ValueError, match=message):
        select_rows(torch.randn(2, 3, 64), quota)


@pytest.mark.parametrize("hidden", [3, 64, 896, 3584, 4096, 5120])
def test_the_quota_that_the_error_advises_trains_one_row(hidden):
    with pytest.raises(ValueError, match="trains one is") as caught:
        quota_to_count("0.001", hidden)
    advised = re.search(r"trains one is ([\d.]+)\. ", str(caught.value))[1]
    assert quota_to_count(advised, hidden) == 1


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
        ([[[1], []], [[3, -1], []]], r"exclusion 1, layer 0: row -1 is outside \[0, 4\)"),
        ([[[0, 1], []], [[2, 3], []]], "layer 0 has only 0 rows left .* the quota takes 1"),
    ],
)
def test_exclusions_that_do_not_fit_are_named(exclude, message):
    with pytest.raises(ValueError, match=message):
        select_rows(SCORES, 25, exclude=exclude)


def test_an_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="'best' is unknown; expected layer_balanced"):
        select_rows(SCORES, 25, "best")
