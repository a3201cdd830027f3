"""Published relatives: each is the formula that it says."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer

from benchmarks.real.arms import ARMS
from benchmarks.real.rivals import CHANNEL


def layers(model):
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    assert len(found) == 14
    return [(n.removeprefix("base_model.model."), m) for n, m in found]


def update(layer):
    """ΔW [O, I]: what the layer gives beside its frozen weight."""
    x = torch.eye(layer.in_features)
    with torch.no_grad():
        return (layer(x) - layer.get_base_layer()(x)).T


@pytest.mark.parametrize("name", ["oplora", "fora"])
def test_the_update_stays_out_of_the_leading_triples(lab, name):
    model = ARMS[name].build(lab.model(), lab)
    known = lab.protected(energy=0.9, soft=False)
    for where, layer in layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        weight = layer.get_base_layer().weight.detach()
        u, _, v = torch.linalg.svd(weight, full_matrices=False)
        k = len(v) // 8
        found = update(layer)
        blind = v[:k].T if name == "oplora" else known[where]
        assert found.norm() > 1 and k > 0
        assert (u[:, :k].T @ found).norm() < 1e-4 * found.norm()
        assert (found @ blind).norm() < 1e-4 * found.norm()
        if name == "fora":  # the channel adds U2 diag(δ) V2ᵀ
            with torch.no_grad():
                layer.lora_delta.fill_(2.0)
            channel = 2 * u[:, k : k + CHANNEL] @ v[k : k + CHANNEL]
            torch.testing.assert_close(update(layer) - found, channel, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frozen", [False, True])
def test_lora_null_begins_as_the_base_in_what_inputs_use_least(lab, frozen):
    model = ARMS["lora_null_frozen" if frozen else "lora_null"].build(lab.model(), lab)
    ids = torch.tensor([lab.written[0]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, lab.known(ids).logits, rtol=1e-3, atol=1e-3)
    moments = {n: m for site, m in lab.moments() for n in site.names}
    for where, layer in layers(model):
        c = moments[where].ordinary
        a = layer.lora_A["default"].weight.detach()
        rows = torch.linalg.svd(a, full_matrices=False).Vh  # [r, I], an orthonormal basis
        least = torch.linalg.eigvalsh(c.double())[: len(a)].sum()
        assert float((rows @ c @ rows.T).trace()) == pytest.approx(float(least), abs=1e-3)
        assert layer.lora_A["default"].weight.requires_grad is not frozen
