"""attribute() of the text decoder inside a model for images, sound and text."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from helpers.prompts import error, pad, prompts
from helpers.reference import Exact, loop

from benchmarks.standins import published, shrink
from loki_plugin import attribute
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.building import kinds

WRAPPERS = (
    "gemma3", "gemma4", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llama4", "llava",
    "internvl", "smolvlm", "glm46v", "paddleocr_vl", "voxtral", "qwen3_5",
)  # fmt: skip


@pytest.mark.parametrize("family", WRAPPERS)
def test_scores_are_those_of_the_loop_in_float64_and_nothing_is_left_behind(family):
    torch.manual_seed(0)
    (kind, *_) = kinds(shrink(published(family)))
    model = kind.loader.from_config(shrink(published(family)), dtype=torch.float32).eval()
    assert type(model).__name__.endswith("ForConditionalGeneration")
    ids = [i % 90 + 5 for i in prompts()]
    exact = deepcopy(model).double()
    with Exact():
        truth = loop(exact, find_anatomy(exact).down, ids, *quadrature("left", 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    scores = attribute(model, *pad(ids, "left"), n_steps=4)
    assert scores.dtype == torch.float32
    assert error(scores, truth) <= 1e-4
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
