"""Analysing bitsandbytes weights: against float64 truth on the very weights they stand for."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from helpers.prompts import pad, prompts, rms
from helpers.reference import Exact, loop
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from loki_plugin import attribute
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.quantised import dequantising, row_scales, unpack

RULE = quadrature("left", 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12)
    model.save_pretrained(path)
    return path


def load(folder, bits: int, dtype=torch.float32):
    if bits == 4:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=torch.bfloat16,
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=settings, attn_implementation="sdpa"
    )


def dequantised(folder, quantised):
    """A float64 model with the weights that the quantised one stands for."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=quantised.dtype).double()
    for name, module in quantised.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            weight = bnb.functional.dequantize_4bit(module.weight.data, state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weight = module.weight.data.double() * row_scales(module)[:, None].double() / 127
        else:
            continue
        model.get_submodule(name).weight.data.copy_(weight)
    return model


@pytest.mark.parametrize("evaluated", [False, True])
def test_nf4_in_float32_equals_the_truth_on_its_dequantised_weights(folder, evaluated):
    """Also after an evaluation, in which some CPUs repack the weights and lose the gradient."""
    model = load(folder, 4)
    ids = prompts()
    if evaluated:
        with torch.no_grad():
            model.eval()(input_ids=ids[0][None])
        unpack(model)
    exact = dequantised(folder, model)
    with Exact():
        truth = loop(exact, find_anatomy(exact).down, ids, *RULE)
    scores = attribute(model, *pad(ids, "left"))
    scale = truth.abs().amax(-1, keepdim=True)
    assert float(((scores - truth) / scale).abs().max()) <= 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_bfloat16_on_quantised_weights_is_no_worse_than_the_plain_loop(folder, bits):
    ours, plain = [], []
    for seed in range(3):
        model = load(folder, bits, torch.bfloat16)
        exact = dequantised(folder, model)
        ids = prompts(seed=seed)
        targets = [int(exact(input_ids=i[None]).logits[0, -1].argmax()) for i in ids]
        with Exact():
            truth = loop(exact, find_anatomy(exact).down, ids, *RULE, targets)
        ours.append(rms(attribute(model, *pad(ids, "left"), targets=targets), truth))
        model.train()  # an evaluated 4-bit model has no gradient on some CPUs
        plain.append(rms(loop(model, find_anatomy(model).down, ids, *RULE, targets), truth))
    assert sum(ours) <= sum(plain) + 3 * torch.finfo(torch.bfloat16).eps / 4


def test_8_bit_in_float32_equals_the_truth_on_its_dequantised_weights(folder):
    """Twice: bitsandbytes moves its scales in the first forward."""
    model = load(folder, 8)
    ids = prompts()
    exact = dequantised(folder, model)
    with Exact():
        truth = loop(exact, find_anatomy(exact).down, ids, *RULE)
    first = attribute(model, *pad(ids, "left"))
    scale = truth.abs().amax(-1, keepdim=True)
    assert float(((first - truth) / scale).abs().max()) <= 1e-5
    with torch.no_grad():
        model.eval()(input_ids=ids[0][None])
    assert find_anatomy(model).down[0].weight.SCB is None  # bitsandbytes has moved it
    assert torch.equal(attribute(model, *pad(ids, "left")), first)


def test_bitsandbytes_own_8_bit_product_comes_back(folder):
    model = load(folder, 8).eval()
    ids = prompts()[0][None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.raises(RuntimeError), dequantising(model):
            assert not torch.equal(model(input_ids=ids).logits, before)
            raise RuntimeError
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_8_bit_prompts_do_not_depend_on_their_neighbours(folder):
    """An outlier in one token makes bitsandbytes treat that column apart for all of them."""
    down = find_anatomy(load(folder, 8)).down[0].eval()
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))
    outlier = torch.zeros(1, 5, 128)
    outlier[..., 7] = 100.0
    both = torch.cat([x, outlier])
    with torch.no_grad():
        assert not torch.equal(down(both)[:1], down(x))  # so that this test can fail
        with dequantising(down):
            torch.testing.assert_close(down(both)[:1], down(x), rtol=0, atol=1e-6)


def test_8_bit_layers_that_accelerate_moves_inputs_for_are_dequantised_too(folder):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    down = find_anatomy(load(folder, 8)).down[0].eval()
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with dequantising(down):
            expected = down(x)
        own = down(x)
        add_hook_to_module(down, AlignDevicesHook("cpu"))
        with dequantising(down):
            assert torch.equal(down(x), expected)
        assert torch.equal(down(x), own) and not torch.equal(own, expected)
        remove_hook_from_module(down)


def test_adapters_on_8_bit_layers_are_not_passed_by(folder):
    from loki_plugin import implant

    model = implant(load(folder, 8), [[1, 2]] * 3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.fill_(0.1)
        with dequantising(model):
            ids = prompts()[0][None]
            tuned = model(input_ids=ids).logits
            with model.disable_adapter():
                assert not torch.allclose(model(input_ids=ids).logits, tuned)
