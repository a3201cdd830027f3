"""`python -m benchmarks.memory`: the tables are made of what `loki estimate` says."""

from __future__ import annotations

from benchmarks import memory


def test_a_line_of_the_table_is_what_the_estimate_says():
    row = memory.row("Qwen2.5-0.5B", nf4=True)
    assert float(row["weights_GB"]) < float(row["training_rank_32_GB"])
    assert float(row["training_rank_32_GB"]) <= float(row["training_dense_GB"])
    assert row["dense_from_GB"] in memory.CARDS


def test_protection_adds_its_directions_and_what_the_anchor_takes():
    dense, still, moving = memory.protection("Qwen2.5-0.5B")
    # Where A stands still nothing is held, and half of the weights need no optimizer.
    assert float(still["directions_GB"]) == 0 and still["directions_add"] == "0.0%"
    assert float(still["auto_adds_GB"]) < float(moving["auto_adds_GB"])
    for line in (dense, moving):
        assert 0 < float(line["directions_GB"]) < float(line["auto_adds_GB"]) + 0.05
        assert 0 < float(line["directions_add"].rstrip("%")) < 20
        assert 5 < float(line["anchor_adds"].rstrip("%")) < 20
        added = float(line["directions_add"].rstrip("%")) + float(line["anchor_adds"].rstrip("%"))
        assert added / 8 < float(line["both_of_8"].rstrip("%")) < 0.8 * added
