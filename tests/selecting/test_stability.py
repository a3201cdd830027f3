"""Stability against selections from the resamples themselves, and against a known truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loki_plugin import select_rows
from loki_plugin.selecting.stability import _weights, bootstrap_overlap, plot_stability


def shares(a, b):
    return [
        len(set(x.tolist()) & set(y.tolist())) / max(len(x), 1) for x, y in zip(a, b, strict=True)
    ]


def noisy(prompts, noise, layers=2, hidden=400, seed=0):
    """Scores of `prompts` around a fixed mean per row, and the rows that unlimited ones choose."""
    mean = torch.randn(layers, hidden, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    scores = mean + noise * torch.randn(prompts, layers, hidden, generator=generator)
    return scores, [m.argsort()[: hidden // 10].sort().values for m in mean]


@pytest.mark.parametrize(
    ("strategy", "magnitude"),
    [("layer_balanced", False), ("layer_highest", True), ("layer_balanced", True)],
)
def test_equals_selections_from_the_resampled_scores(strategy, magnitude):
    generator = torch.Generator().manual_seed(3)
    # Many equal scores, and multiples of 1/8, so that equal means are equal.
    scores = torch.randint(-4, 5, (70, 2, 30), generator=generator) / 8
    rules = {"quota": 20, "strategy": strategy, "magnitude": magnitude, "exclude": [[[0, 7], [3]]]}
    found = bootstrap_overlap(scores, **rules, rounds=3, seed=1)
    assert found.sizes == (2, 3, 5, 9, 18, 35, 70)
    counts = torch.from_numpy(_weights(70, found.sizes, 3, 1))
    chosen = [select_rows(scores.repeat_interleave(c, 0), **rules) for c in counts]
    for i in range(3):
        first = 1 + 9 * i
        resamples = [shares(chosen[0], c) for c in chosen[first : first + 7]]
        np.testing.assert_allclose(found.overlap[i], resamples, rtol=1e-12)
        halves = shares(chosen[first + 7], chosen[first + 8])
        np.testing.assert_allclose(found.halves[i], halves, rtol=1e-12)
    assert len(np.unique(found.overlap)) > 2 < len(np.unique(found.halves))


def test_global_strategies_count_over_the_whole_model():
    scores = torch.randint(-4, 5, (12, 2, 30), generator=torch.Generator().manual_seed(3)) / 8
    found = bootstrap_overlap(scores, 10, "global_lowest", rounds=2)
    counts = torch.from_numpy(_weights(12, found.sizes, 2, 0))

    def rows(count):
        selection = select_rows(scores.repeat_interleave(count, 0), 10, "global_lowest")
        return {(layer, int(r)) for layer, some in enumerate(selection) for r in some}

    expected = [len(rows(counts[0]) & rows(c)) / 6 for c in counts[1 : 1 + len(found.sizes)]]
    np.testing.assert_allclose(found.overlap[0, :, 0], expected, rtol=1e-12)
    assert found.overlap.shape == (2, len(found.sizes), 1)


def test_resamples_are_nested_draws_and_halves_share_no_prompt():
    weights = _weights(101, (7, 50, 101), 4, seed=0)
    assert weights.shape == (1 + 4 * 5, 101) and (weights[0] == 1).all()
    for small, middle, large, one, other in weights[1:].reshape(4, 5, 101):
        assert [small.sum(), middle.sum(), large.sum(), one.sum()] == [7, 50, 101, 50]
        assert (small <= middle).all() and (middle <= large).all() and large.max() > 1
        assert (one + other == 1).all()
    assert not np.array_equal(weights[1], weights[6])
    assert not np.array_equal(weights, _weights(101, (7, 50, 101), 4, seed=1))
    # the same on every machine
    assert _weights(8, (8,), 1, 0)[1:].tolist() == [
        [1, 1, 0, 1, 0, 2, 1, 2],
        [1, 0, 0, 1, 0, 1, 0, 1],
        [0, 1, 1, 0, 1, 0, 1, 0],
    ]


def test_chunks_do_not_matter():
    scores, _ = noisy(70, 2.0)
    whole = bootstrap_overlap(scores, rounds=2)
    parts = bootstrap_overlap(iter(scores.split([1, 40, 29])), prompts=70, rounds=2)
    np.testing.assert_array_equal(parts.overlap, whole.overlap)
    np.testing.assert_array_equal(parts.halves, whole.halves)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_the_score_estimates_what_unlimited_prompts_would_keep(noise):
    scores, truth = noisy(500, noise)
    found = bootstrap_overlap(scores)
    kept = np.mean(shares(select_rows(scores), truth))
    assert abs(found.score - kept) < 0.03
    # Fewer prompts keep less, and two halves agree less than all prompts do with the truth.
    means = found.overlap.mean((0, 2))
    assert (np.diff(means) > 0).all()
    assert found.halves.mean() < found.score


def test_prompts_that_agree_are_enough_and_noise_is_not():
    agreed = bootstrap_overlap(torch.arange(40.0).expand(20, 3, 40))
    assert agreed.score == 1 and agreed.enough and agreed.halves.min() == 1
    assert "\nenough: unlimited prompts" in agreed.text() and "NOT" not in agreed.text()
    noise = bootstrap_overlap(torch.randn(20, 3, 400, generator=torch.Generator().manual_seed(0)))
    assert not noise.enough
    assert noise.halves.mean() == pytest.approx(noise.chance, abs=0.06)


def test_the_text_names_the_figures_and_the_verdict():
    scores, _ = noisy(64, 3.0, layers=3)
    found = bootstrap_overlap(scores)
    text = found.text()
    for n, mean in zip(found.sizes, found.overlap.mean((0, 2)), strict=True):
        assert f"{n:>8}  {mean:7.2%}" in text
    worst = int(found.per_layer.argmin())
    assert f"least stable layer: {worst} with {found.per_layer[worst]:.2%}" in text
    assert f"two halves: {found.halves.mean():.2%}; by chance: 10.00%" in text
    assert "NOT enough" in text and "97.57%" in text and "samples_per_subject" in text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "random"}, "'random' does not depend on prompts"),
        ({"strategy": "best"}, "'best' is unknown"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"prompts": 5}, "hold more than 5 prompts, 5 were announced"),
        ({"prompts": 7}, "hold 6 prompts, 7 were announced"),
        ({"scores": torch.zeros(1, 2, 20)}, "at least 2 prompts, got 1"),
        ({"scores": [torch.zeros(6, 2, 20)]}, "come in chunks: .* `prompts=N`"),
        ({"scores": [], "prompts": 6}, "hold 0 prompts, 6 were announced"),
        ({"quota": 1}, "quota 1 % of 20 rows is no row at all"),
    ],
)
def test_faults_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_overlap(**{"scores": torch.zeros(6, 2, 20), **given})


@pytest.mark.parametrize("strategy", ["layer_balanced", "global_lowest"])
def test_the_figure_is_drawn(tmp_path, strategy):
    found = bootstrap_overlap(noisy(30, 1.0)[0], strategy=strategy, rounds=2)
    path = plot_stability(found, tmp_path / "new" / "stability.png")
    assert path.read_bytes().startswith(b"\x89PNG")
