"""Quadrature rules on [0, 1]: where the path is sampled, and with what weight."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...choices import RULE, RULES, STEPS


class Rule(NamedTuple):
    """S nodes α_k and their weights w_k: ∫₀¹ f(α) dα ≈ Σ_k w_k f(α_k)."""

    nodes: tuple[float, ...]
    weights: tuple[float, ...]

    @property
    def steps(self) -> int:
        return len(self.nodes)


def quadrature(rule: str = RULE, n_steps: int = STEPS) -> Rule:
    """Nodes α_k and weights w_k of a rule, so that ∫₀¹ f(α) dα ≈ Σ_k w_k f(α_k).

    | rule | α_k | w_k |
    |---|---|---|
    | left (the authors' first release) | k/S, k = 0..S-1 | 1/S |
    | right (the paper's Eq. 5) | k/S, k = 1..S | 1/S |
    | midpoint | (k + 1/2)/S, k = 0..S-1 | 1/S |
    | trapezoid | k/(S-1), k = 0..S-1 | 1/(S-1), half of it at both ends |
    | gauss-legendre | roots of P_S mapped to [0, 1] | Gauss weights / 2 |

    The weights of every rule sum to 1 (captum's `riemann_trapezoid` sums to (S-1)/S).

    Args:
        rule: one of `choices.RULES`.
        n_steps: S >= 1; the trapezoid needs S >= 2.

    Raises:
        ValueError: unknown rule or too few steps.
    """
    if rule not in RULES:
        raise ValueError(
            f"attribution rule {rule!r} is unknown; expected one of {', '.join(RULES)}"
        )
    least = 2 if rule == "trapezoid" else 1
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < least:
        raise ValueError(
            f"n_steps = {n_steps!r}; rule '{rule}' needs an integer of at least {least}"
        )
    s = n_steps
    if rule == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(s)
        return Rule(tuple(((nodes + 1) / 2).tolist()), tuple((weights / 2).tolist()))
    if rule == "trapezoid":
        inner = 1 / (s - 1)
        ends = inner / 2
        return Rule(tuple(k / (s - 1) for k in range(s)), (ends, *[inner] * (s - 2), ends))
    shift = {"left": 0.0, "right": 1.0, "midpoint": 0.5}[rule]
    return Rule(tuple((k + shift) / s for k in range(s)), (1 / s,) * s)
