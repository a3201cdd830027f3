"""Llama's rope runs in fewer kernels while the engine's passes run, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny
from transformers.models.llama import modeling_llama
from transformers.models.phi import modeling_phi
from transformers.models.qwen3 import modeling_qwen3

from loki_plugin.analysing.attribution.attention import AttentionState, Mode
from loki_plugin.analysing.attribution.devices import Copies
from loki_plugin.analysing.attribution.rope import fused_rope
from loki_plugin.model.anatomy import find_anatomy

NAME = "apply_rotary_pos_emb"


def state(mode):
    return AttentionState(last=Copies([3]), final_layer=2, uniform=True, mode=mode)


def inputs(dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 4, 8, dtype=dtype), torch.randn(2, 5, 2, 8, dtype=dtype)
    angle = torch.randn(2, 5, 8, dtype=dtype)  # its halves differ, unlike any family's
    return q.transpose(1, 2).requires_grad_(), k.transpose(1, 2).requires_grad_(), angle


def turned(dtype, mode=Mode.STACK):
    """q and k turned, and the gradients of q and k, in float64."""
    q, k, angle = inputs(dtype)
    with state(mode):
        out = modeling_llama.apply_rotary_pos_emb(q, k, angle.cos(), angle.sin())
    up = [o.detach().flip(-1).square() for o in out]
    return [x.double() for x in (*out, *torch.autograd.grad(out, (q, k), up))]


@pytest.mark.parametrize(("family", "file"), [("llama", modeling_llama), ("qwen3", modeling_qwen3)])
def test_llamas_code_is_replaced_and_put_back(family, file):
    own = getattr(file, NAME)
    with pytest.raises(KeyboardInterrupt), fused_rope(find_anatomy(tiny(family))):
        assert getattr(file, NAME) is not own
        raise KeyboardInterrupt
    assert getattr(file, NAME) is own


@pytest.mark.parametrize("family", ["cohere", "gpt2", "olmo2", "glm4"])
def test_other_code_stays(family):
    anatomy = find_anatomy(tiny(family))
    file = __import__(type(anatomy.layers[0]).__module__, fromlist=["_"])
    own = getattr(file, NAME, None)
    with fused_rope(anatomy):
        assert getattr(file, NAME, None) is own


def test_somebodys_own_rope_stays(monkeypatch):
    def liger(q, k, cos, sin, unsqueeze_dim=1):
        return q, k

    for family, file in (("phi", modeling_phi), ("llama", modeling_llama)):
        anatomy = find_anatomy(tiny(family))
        with fused_rope(anatomy):
            assert getattr(file, NAME).__name__ == "rotate"  # ours, and after it theirs
        monkeypatch.setattr(file, NAME, liger)
        with fused_rope(anatomy):
            assert getattr(file, NAME) is liger


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_is_no_further_from_the_truth_than_the_familys_own(dtype):
    plain = turned(dtype)
    q, k, angle = (x.detach().double() for x in inputs(dtype))
    cos, sin = (f(inputs(dtype)[2]).double() for f in (torch.cos, torch.sin))
    truth = modeling_llama.apply_rotary_pos_emb(q.requires_grad_(), k.requires_grad_(), cos, sin)
    with fused_rope(find_anatomy(tiny("llama"))):
        found = turned(dtype)
    assert found[0].shape == (2, 4, 5, 8)
    for new, old in zip(found[:2], truth, strict=True):
        other = plain[0] if new.shape == plain[0].shape else plain[1]
        assert (new - old).abs().sum() <= (other - old).abs().sum() + 1e-12
    tolerance = 8 * torch.finfo(dtype).eps
    for new, old in zip(found[2:], plain[2:], strict=True):
        torch.testing.assert_close(
            new, old, rtol=tolerance, atol=tolerance * float(old.abs().max())
        )


def test_widened_inputs_and_replays_are_left_alone():
    q, k, angle = inputs(torch.bfloat16)
    with fused_rope(find_anatomy(tiny("llama"))):
        with state(Mode.STACK):
            out, _ = modeling_llama.apply_rotary_pos_emb(q, k, angle.float(), angle.float())
            assert out.dtype == torch.float32  # as the family's own code
        with state(Mode.REPLAY):
            assert modeling_llama.apply_rotary_pos_emb(q, k, angle, angle) == (q, k)
