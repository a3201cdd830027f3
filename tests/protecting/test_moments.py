"""Second moments: half of each is computed, and what is seen in parts adds up."""

from __future__ import annotations

import pytest
import torch

from loki_plugin.protecting.moments import SINK, Moments


@pytest.mark.parametrize("size", [1, 3, 4, 30, 33])
def test_a_moment_is_the_sum_over_all_tokens(size):
    generator = torch.Generator().manual_seed(size)
    parts = [torch.randn(n, size, generator=generator, dtype=torch.float64) for n in (7, 1, 20)]
    moments = Moments()
    for part in parts:
        moments.add(part, length=0.0)
    expected = torch.zeros(size, size, dtype=torch.float64)
    for x in torch.cat(parts):
        expected += torch.outer(x, x) / x.dot(x)
    torch.testing.assert_close(moments.ordinary, expected, rtol=1e-12, atol=1e-12)
    assert moments.tokens == 28 and moments.sinks is None


def test_sinks_add_up_apart():
    x = torch.randn(12, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x /= x.norm(dim=-1, keepdim=True)
    x[[2, 7]] *= 3 * SINK
    moments = Moments()
    for part in x.split(5):
        moments.add(part, length=1.0)
    long = x[[2, 7]] / (3 * SINK)
    torch.testing.assert_close(moments.sinks, long.T @ long)
    rest = x[[i for i in range(12) if i not in (2, 7)]]
    torch.testing.assert_close(moments.ordinary, rest.T @ rest)
    assert moments.sink_tokens == 2 and moments.tokens == 10
    assert moments.longest == pytest.approx(3 * SINK)
