"""Plain RMSNorms run as one operation while the engine's passes run, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny

from loki_plugin.analysing.attribution.norms import fused_norms


def norms_of(model):
    return {n: m for n, m in model.named_modules() if type(m).__name__.endswith("Norm")}


@pytest.mark.parametrize(
    ("family", "fused"),
    [("llama", True), ("qwen3", True), ("deepseek_v3", True)]
    + [(f, False) for f in ("gemma3", "olmo2", "llama4", "gpt2", "cohere")],
)
def test_only_llamas_own_code_is_replaced_and_put_back(family, fused):
    model = tiny(family)
    with pytest.raises(KeyboardInterrupt), fused_norms(model):
        replaced = ["forward" in m.__dict__ for m in norms_of(model).values()]
        raise KeyboardInterrupt
    assert all(replaced) if fused else not any(replaced)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_it_computes_what_the_norm_computes():
    model = tiny("llama")
    norm = model.model.layers[0].input_layernorm
    x = torch.randn(3, 5, 48, requires_grad=True)
    truth = norm(x)
    (grad,) = torch.autograd.grad(truth.square().sum(), x)
    with fused_norms(model):
        found = norm(x)
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), x)[0], grad)


def test_where_it_would_round_or_widen_differently_the_norms_own_code_runs():
    x = torch.randn(2, 48, dtype=torch.bfloat16)
    model = tiny("llama")
    with fused_norms(model):  # float32 norms in a half-precision model hand out float32
        assert model.model.norm(x).dtype == torch.float32
    for dtype in (torch.float64, torch.bfloat16):
        model = tiny("llama", dtype=dtype)
        with fused_norms(model):
            assert not any("forward" in m.__dict__ for m in model.modules())


def test_a_forward_that_somebody_put_there_stays():
    model = tiny("llama")
    model.model.norm.forward = lambda x: x
    with fused_norms(model):
        assert model.model.norm(3) == 3
    assert model.model.norm(3) == 3
