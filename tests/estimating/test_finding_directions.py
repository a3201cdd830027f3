"""What finding directions takes: as many passes and products as the real thing makes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from loki_plugin.estimating.finding import finding
from loki_plugin.protecting import eigen
from loki_plugin.protecting.finding import find_directions, targeted
from loki_plugin.protecting.solving import Wanted


@pytest.fixture
def small_budget(monkeypatch):
    """So small that sites stand in groups, or that a matrix takes the block iteration."""

    def limit(count):
        monkeypatch.setattr(eigen, "BUDGET", count)
        monkeypatch.setattr("loki_plugin.estimating.finding.BUDGET", count)

    return limit


def test_passes_and_products_are_those_of_the_real_thing(small_budget):
    small_budget((3 + 2 * 2) * 4 * 128**2)  # the work on one, and the moments of two, twice
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=99,
        )
    )
    prompts = torch.randint(3, 90, (40, 64), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = [m.in_features for m in targeted(llama).values()]
    needed = finding(sizes, [20] * 4, 40 * 64, 0)
    assert (needed.passes, needed.batches) == (1.5, 3)  # two batches up to layer 2, and up to 4
    layers = []
    for layer in llama.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda *args: layers.append(1))
    find_directions(llama, prompts, Wanted(directions=20), coverage=True)
    # A few tokens to see whether the model looks ahead, and one more batch to see which linears
    # read the same; the prompts that are kept back make 3 of two batches, so that the last of them
    # are not full.
    assert len(layers) == 4 + 4 + 3 * (2 + 4)
    moments = sum(2 * 40 * 64 * size**2 for size in sizes)
    exact = 2 * sum(22 / 3 * size**3 for size in sizes)
    assert needed.wide == pytest.approx(moments + exact)


def test_a_block_takes_the_products_that_are_predicted(small_budget, monkeypatch):
    small_budget(0)
    x = torch.randn(4096, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.logspace(0, -2, 96, dtype=torch.float64)
    monkeypatch.setattr(eigen, "budget", lambda device: 290_000)
    monkeypatch.setattr(eigen, "_FIRST_BLOCK", 8)
    moment, widths = x.T @ x, eigen.iterations(96, 40)
    with FlopCounterMode(display=False) as counted:
        found = eigen.leading(moment, 0.999999, None, 40)
    assert found.vectors.shape == (96, 40)
    assert widths == [8] * 6 + [16] * 6 + [32] * 6 + [53] * 6
    products = sum(2 * 96 * 96 * w for w in widths)
    # Besides, at each width, the small matrix whose eigenvectors are taken, and these at the end.
    small = [2 * 96 * 96 * w + 2 * 96 * w * w for w in widths[::6]]
    assert counted.get_total_flops() == products + sum(small) + 2 * 96 * widths[-1] ** 2
