"""Which models look at what follows, and what becomes of their texts."""

from __future__ import annotations

import pytest
import torch
from helpers.families import FAMILIES, tiny
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks.standins import published, shrink
from loki_plugin import implant
from loki_plugin.analysing.calibration.prompts import Text
from loki_plugin.evaluating.watching import measure
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.causal import looks_ahead
from loki_plugin.protecting import moments
from loki_plugin.protecting.anchor import Anchor, _logits
from loki_plugin.protecting.finding import Wanted, find_directions

TEXTS = [list(range(5, 10)), list(range(20, 31)), list(range(40, 45))]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_models_look_back_only(family, dtype):
    assert not looks_ahead(tiny(family).to(dtype))


def test_a_model_without_a_head_is_asked_too():
    llama = tiny("llama")
    whole = find_directions(llama, TEXTS, Wanted(directions=2)).basis
    bare = find_directions(llama.model, TEXTS, Wanted(directions=2)).basis
    assert all(torch.equal(a, b) for a, b in zip(whole, bare, strict=True))


@pytest.fixture(params=["bert", "paligemma"])
def both_ways(request):
    kind = {"bert": AutoModelForCausalLM, "paligemma": AutoModelForImageTextToText}[request.param]
    torch.manual_seed(0)
    model = kind.from_config(shrink(published(request.param))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def test_texts_of_a_model_that_looks_ahead_are_not_padded(both_ways, monkeypatch):
    """Padding would be read: an adapter that does nothing would be told that it had forgotten."""
    assert looks_ahead(both_ways)
    together = find_directions(both_ways, TEXTS, Wanted(directions=2)).basis
    with monkeypatch.context() as patch:
        patch.setattr(moments, "TOKENS", 1)
        alone = find_directions(both_ways, TEXTS, Wanted(directions=2)).basis
    for v, w in zip(together, alone, strict=True):
        assert torch.allclose(v @ v.T, w @ w.T, atol=1e-4)
    model = implant(both_ways, [[1, 2, 3]] * find_anatomy(both_ways).num_layers)
    kl = Anchor(TEXTS, 1.0, 3).divergence(model, [0, 1, 2])
    assert abs(float(kl)) < 1e-7
    kl.backward()
    assert all(p.grad.abs().max() < 1e-6 for p in model.parameters() if p.grad is not None)
    texts = [Text(tuple(t), (1,)) for t in TEXTS]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    passes = []
    model.get_input_embeddings().register_forward_hook(lambda *a: passes.append(1))
    _logits(model, [TEXTS[0], TEXTS[2]])  # of one length
    assert len(passes) == 1
    with monkeypatch.context() as patch:  # beside ranks whose texts are not
        patch.setattr("loki_plugin.protecting.anchor.is_sharded", lambda model: True)
        _logits(model, [TEXTS[0], TEXTS[2]])
    assert len(passes) == 3
    each = [measure(model, [t], []).kl for t in texts]
    tokens = torch.tensor([float(len(t)) for t in TEXTS])
    wanted = float((torch.tensor(each) * tokens).sum() / tokens.sum())
    assert measure(model, texts, []).kl == pytest.approx(wanted, rel=1e-4) and wanted > 1e-4
