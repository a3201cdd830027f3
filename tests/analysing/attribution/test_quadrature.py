"""Nodes and weights against tables worked out by hand, and how fast the rules converge."""

from __future__ import annotations

from math import exp, log2, sqrt

import pytest

from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.choices import RULES

# Gauss-Legendre on [0, 1]: from the roots of x, 3x²-1, 5x³-3x and 35x⁴-30x²+3 on [-1, 1].
_INNER, _OUTER = (sqrt(3 / 7 - 2 / 7 * sqrt(1.2)), sqrt(3 / 7 + 2 / 7 * sqrt(1.2)))
_HEAVY, _LIGHT = (18 + sqrt(30)) / 72, (18 - sqrt(30)) / 72
TABLES = {
    ("left", 1): ([0], [1]),
    ("left", 2): ([0, 1 / 2], [1 / 2] * 2),
    ("left", 3): ([0, 1 / 3, 2 / 3], [1 / 3] * 3),
    ("left", 4): ([0, 1 / 4, 1 / 2, 3 / 4], [1 / 4] * 4),
    ("right", 1): ([1], [1]),
    ("right", 2): ([1 / 2, 1], [1 / 2] * 2),
    ("right", 3): ([1 / 3, 2 / 3, 1], [1 / 3] * 3),
    ("right", 4): ([1 / 4, 1 / 2, 3 / 4, 1], [1 / 4] * 4),
    ("midpoint", 1): ([1 / 2], [1]),
    ("midpoint", 2): ([1 / 4, 3 / 4], [1 / 2] * 2),
    ("midpoint", 3): ([1 / 6, 1 / 2, 5 / 6], [1 / 3] * 3),
    ("midpoint", 4): ([1 / 8, 3 / 8, 5 / 8, 7 / 8], [1 / 4] * 4),
    ("trapezoid", 2): ([0, 1], [1 / 2] * 2),
    ("trapezoid", 3): ([0, 1 / 2, 1], [1 / 4, 1 / 2, 1 / 4]),
    ("trapezoid", 4): ([0, 1 / 3, 2 / 3, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    ("gauss-legendre", 1): ([1 / 2], [1]),
    ("gauss-legendre", 2): ([(1 - 1 / sqrt(3)) / 2, (1 + 1 / sqrt(3)) / 2], [1 / 2] * 2),
    ("gauss-legendre", 3): (
        [(1 - sqrt(0.6)) / 2, 1 / 2, (1 + sqrt(0.6)) / 2],
        [5 / 18, 4 / 9, 5 / 18],
    ),
    ("gauss-legendre", 4): (
        [(1 - _OUTER) / 2, (1 - _INNER) / 2, (1 + _INNER) / 2, (1 + _OUTER) / 2],
        [_LIGHT, _HEAVY, _HEAVY, _LIGHT],
    ),
}


@pytest.mark.parametrize(("rule", "n"), TABLES)
def test_nodes_and_weights_are_those_of_the_tables(rule, n):
    nodes, weights = TABLES[rule, n]
    found = quadrature(rule, n)
    assert found.nodes == pytest.approx(nodes, abs=1e-15)
    assert found.weights == pytest.approx(weights, abs=1e-15)
    assert found.steps == n


def test_the_tables_leave_out_no_rule():
    assert {rule for rule, _ in TABLES} == set(RULES)
    assert len(TABLES) == 4 * len(RULES) - 1  # a trapezoid needs both its ends


@pytest.mark.parametrize("n", [2, 3, 7, 50])
@pytest.mark.parametrize("rule", RULES)
def test_weights_sum_to_one_and_nodes_rise_within_the_path(rule, n):
    nodes, weights = quadrature(rule, n)
    assert sum(weights) == pytest.approx(1, abs=1e-14) and min(weights) > 0
    assert list(nodes) == sorted(nodes) and 0 <= nodes[0] and nodes[-1] <= 1


def miss(rule: str, n: int) -> float:
    """How far the rule is from ∫₀¹ exp(α) dα = e - 1."""
    nodes, weights = quadrature(rule, n)
    return abs(sum(w * exp(a) for a, w in zip(nodes, weights, strict=True)) - (exp(1) - 1))


@pytest.mark.parametrize(
    ("rule", "order"), [("left", 1), ("right", 1), ("midpoint", 2), ("trapezoid", 2)]
)
def test_halving_the_step_divides_the_error_by_two_to_the_order(rule, order):
    extra = 1 if rule == "trapezoid" else 0  # n nodes make n - 1 intervals
    assert log2(miss(rule, 32 + extra) / miss(rule, 64 + extra)) == pytest.approx(order, abs=0.03)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_gauss_legendre_is_exact_for_polynomials_up_to_2n_minus_1_and_no_further(n):
    nodes, weights = quadrature("gauss-legendre", n)

    def missed(power):
        return abs(sum(w * a**power for a, w in zip(nodes, weights, strict=True)) - 1 / (power + 1))

    assert max(missed(k) for k in range(2 * n)) < 1e-14
    assert missed(2 * n) > 1e-10


def test_a_rule_cannot_be_changed():
    with pytest.raises(AttributeError):
        quadrature("left", 3).nodes = ()
