"""The prediction's arithmetic, by hand; that a miss is called a miss."""

from __future__ import annotations

import pytest

from benchmarks.roofline import AIMS, KERNELS, LAUNCH, LEAST, Card, aims_of, milliseconds

CARD = Card(flops=1e12, bandwidth=1e9)


@pytest.mark.parametrize(
    ("costs", "seconds", "waits_for"),
    [
        ([("stack", 1, 3_000_000_000, 10, 2)], 2 * 3e-3, "device"),  # by FLOPs
        ([("stack", 1, 0, 5_000_000, 1), ("head", 1, 10, 1_000_000, 1)], 6e-3, "device"),  # bytes
        ([("stack", 2, 0, 1, 100)], 200 * LAUNCH, "host"),  # launches
    ],
)
def test_a_kernel_takes_the_longest_of_three(costs, seconds, waits_for):
    found, waits = milliseconds(costs, CARD, batch=4)
    assert found == pytest.approx(1000 * seconds / 4) and waits == waits_for
    assert LEAST < LAUNCH


def test_a_miss_is_printed_as_a_miss():
    def run(kernels):
        return {"kernels": {"stack": kernels}, "costs": [("stack", 1, 0, 0, kernels)]}

    batches = {(weights, 8) for _, weights in AIMS} | KERNELS.keys()
    for kernels, said in ((100, "met"), (1_000_000, "MISSED")):
        rows = aims_of({(w, b, False): run(kernels) for w, b in batches})
        assert len(rows) == len(AIMS) + len(KERNELS)
        assert all(row[""].startswith(said) for row in rows)
