"""`use_kernels`: transformers puts kernels into a model, for inference some without a backward."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny
from kernels import Mode, use_kernel_mapping
from torch import nn

from loki_plugin import attribute, implant
from loki_plugin.model.quantised import evaluating
from loki_plugin.protecting.anchor import Anchor

IDS = torch.arange(1, 19).view(2, 9)


class NoBackward(nn.Module):
    """SiLU as such a kernel computes it: into a tensor that autograd does not know."""

    has_backward = False
    can_torch_compile = True

    def forward(self, x):
        with torch.no_grad():
            return nn.functional.silu(x)


class Repository:
    layer_name = "SiLU"

    def load(self):
        return NoBackward


@pytest.fixture
def kernels():
    """As transformers maps SiLU on a GPU: for inference alone."""
    mapping = {"SiLU": {"cpu": {Mode.INFERENCE | Mode.TORCH_COMPILE: Repository()}}}
    with use_kernel_mapping(mapping):
        yield


def is_kernel(model):
    act = model.get_submodule("model.layers.0.mlp.act_fn")
    return getattr(act.forward, "__func__", None) is NoBackward.forward


def model_with_kernels():
    torch.manual_seed(0)
    model = tiny("llama").eval()
    model.set_use_kernels(True)
    return model


def test_what_is_asked_in_training_leaves_the_kernels_of_training(kernels):
    model = model_with_kernels()
    assert is_kernel(model)  # as `from_pretrained` leaves it
    model.train()
    assert not is_kernel(model)
    with evaluating(model):
        assert not is_kernel(model) and not model.training
    assert not is_kernel(model) and model.model.layers[0].mlp.training
    model.train()
    assert not is_kernel(model)


def test_scores_are_those_without_kernels(kernels):
    plain = attribute(tiny("llama").eval(), IDS)
    model = model_with_kernels()
    torch.testing.assert_close(attribute(model, IDS), plain)
    assert is_kernel(model) and not model.training  # as it was found


def test_an_anchor_leaves_every_gradient(kernels):
    """A gradient that a kernel cut off would be missing from the second step on."""
    found = []
    for kernel in (False, True):
        model = model_with_kernels() if kernel else tiny("llama")
        rows = [range(model.config.hidden_size)] * len(model.model.layers)
        torch.manual_seed(1)
        model = implant(model, rows, rank=2, targets="all", linear_rank=2).train()
        anchor = Anchor(IDS.tolist(), 1.0, 2, 1, [(3,)] * len(IDS))
        for _ in range(2):
            model.zero_grad()
            anchor.divergence(model, [0, 1]).backward()
            model.train()
            model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, msg=name)
