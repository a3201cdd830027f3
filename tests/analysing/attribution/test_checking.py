"""Every model is asked, once, whether the fast analysis reproduces it."""

from __future__ import annotations

import pytest
import torch
from helpers.families import COMMON, GQA, tiny
from helpers.faults import Shifted, values_off
from helpers.prompts import error, prompts
from helpers.quantised import in_4_bit
from transformers import AutoConfig, AutoModelForCausalLM

from loki_plugin import attribute
from loki_plugin.analysing.attribution import checking, replay, stack
from loki_plugin.analysing.attribution.checking import NotReproduced, check_reproduces
from loki_plugin.analysing.attribution.quiet import quiet
from loki_plugin.analysing.calibration.prompts import Prompt
from loki_plugin.model.anatomy import find_anatomy

IDS = torch.stack(prompts(lengths=(9, 9)))


def make(model_type, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.15)
    return model


def check(model):
    with quiet(model) as own_attention:
        prompt = Prompt(tuple(IDS[0].tolist()))
        check_reproduces(model, find_anatomy(model), prompt, own_attention)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("diffllama", "layer 0 attends more than once"),
        ("gemma3n_text", r"takes hidden states of shape \[4, 1, 1, 48\]"),
        ("mpt", "called in a way that loki does not know .AttributeError"),
        ("gpt_neo", "does not attend through transformers' attention interface"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_family_that_the_stack_does_not_know_is_found(model_type, message, dtype):
    settings = {
        "diffllama": GQA,
        "gemma3n_text": GQA
        | {"head_dim": 12, "num_kv_shared_layers": 1, "activation_sparsity_pattern": None}
        | {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
        "mpt": {"d_model": 48, "n_heads": 4, "n_layers": 3, "vocab_size": 97},
        "gpt_neo": {"hidden_size": 48, "num_heads": 4, "num_layers": 3, "vocab_size": 97}
        | {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
    }[model_type]
    model = make(model_type, **settings).to(dtype)
    for _ in range(2):  # a failed check does not count as one
        with pytest.raises(NotReproduced, match=message):
            check(model)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16", "NF4"])
def build(request, tmp_path_factory):
    """Llamas in every precision in which people train."""
    if request.param == "NF4":
        return lambda: in_4_bit("llama", tmp_path_factory.mktemp("model"))
    return lambda: tiny("llama", dtype=getattr(torch, request.param))


def test_a_mixer_that_the_stack_does_not_know_is_found_in_every_precision(build):
    """By structure: what it does is far below what half precision shows."""
    check(build())
    model = build()
    model.model.layers[1].input_layernorm = Shifted(model.model.layers[1].input_layernorm, 1e-3)
    with pytest.raises(NotReproduced, match=r"1 of its 3 layers .*; the first is layer 1. mix"):
        check(model)


def test_a_wrong_formula_of_1_percent_is_found_in_every_precision(build):
    with values_off(0.01), pytest.raises(NotReproduced, match="in float32, .* misses"):
        check(build())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_fault_that_half_precision_alone_has_is_found_above_its_rounding(dtype):
    model = tiny("llama", dtype=dtype)
    size = 64 * torch.finfo(dtype).eps
    with values_off(size, only_half=True), pytest.raises(NotReproduced, match="its own precision"):
        check(model)
    with values_off(size / 512, only_half=True):
        check(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", ["answers", "shared keys", "in place"])
def test_a_fault_in_the_stack_is_seen(monkeypatch, fault, dtype):
    """Three faults that were once there: none of them shows in the plain forward."""
    family = "falcon" if fault == "in place" else "gemma4"
    if fault == "answers":  # a linear after the down-projection answers as without a change
        monkeypatch.setattr(stack, "known_answers", lambda layer, down, memo: dict(memo))
    elif fault == "shared keys":
        monkeypatch.setattr(replay, "copy", lambda x: x)
    else:
        monkeypatch.setattr(stack.torch.Tensor, "clone", lambda x: x)
    with pytest.raises(NotReproduced):
        check(tiny(family, dtype=dtype))


def test_a_model_is_checked_once_and_left_as_it_was(monkeypatch):
    seen = []
    inner = checking._states_of_the_model
    monkeypatch.setattr(
        checking,
        "_states_of_the_model",
        lambda m, a, ids, some: seen.append(len(ids)) or inner(m, a, ids, some),
    )
    monkeypatch.setattr(checking, "_TOKENS", 20)  # two of the four copies at once
    model = tiny("qwen2", attention="sdpa", dtype=torch.bfloat16)
    before = {n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters()}
    first = attribute(model, IDS)
    # In float32 and as it is.
    assert seen == [9, 9] and model.config._attn_implementation == "sdpa"
    assert {n: (p.dtype, p.data_ptr()) for n, p in model.named_parameters()} == before
    assert torch.equal(attribute(model, IDS), first) and seen == [9, 9]
    other = tiny("qwen2", dtype=torch.bfloat16)
    assert error(attribute(other, IDS), first) < 0.1 and seen == [9, 9, 9, 9]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_weights_are_put_back_when_the_check_breaks_off(monkeypatch):
    model = tiny("llama", dtype=torch.bfloat16)
    before = {n: p.data_ptr() for n, p in model.named_parameters()}

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.model.layers[1].mlp.act_fn, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        check(model)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == before
    assert all(p.dtype is torch.bfloat16 for p in model.parameters())


@pytest.fixture
def tf32():
    """As `TrainingArguments(tf32=True)` leaves a process with a GPU."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield
    matmul.fp32_precision = before


def test_tf32_set_through_pytorchs_newer_setting_counts_as_rounding(tf32):
    with pytest.raises(RuntimeError, match="matmul precision"):
        torch.get_float32_matmul_precision()
    model = tiny("llama")
    assert checking._rounds(model)
    attribute(model, IDS)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not checking._rounds(model)


def test_memory_that_runs_out_in_the_check_is_not_taken_for_an_unknown_family(monkeypatch):
    def full(*arguments, **settings):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(checking, "climb", full)
    with pytest.raises(torch.AcceleratorError, match="out of memory"):
        attribute(tiny("llama"), IDS)


def test_a_model_that_does_not_run_here_says_so_and_loki_is_not_blamed(monkeypatch):
    """As with Liger's kernels on a CPU."""
    model = tiny("llama")

    def launch(x):
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr(model.model.norm, "forward", launch)
    wanted = r"the model itself does not run on CPU.*0 active drivers.*`liger_\*`"
    with pytest.raises(ValueError, match=wanted):
        attribute(model, IDS)


def test_a_model_that_overflows_says_so_itself():
    model = tiny("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e5)
    with pytest.raises(ValueError, match=r"model itself answers nan or inf in torch.float16"):
        attribute(model, IDS)


def test_large_activations_are_not_taken_for_mixing():
    """SmolLM2 in float16: their squares are out of range."""
    model = tiny("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(5e3)
    check(model)


def test_one_prompt_that_is_sent_elsewhere_by_rounding_does_not_refuse_a_model(monkeypatch):
    tries = []
    inner = checking._states_of_the_model

    def first_is_wrong(model, anatomy, ids, some):
        tries.append(len(ids))
        return inner(model, anatomy, ids, some) * (3 if len(tries) == 1 else 1)

    monkeypatch.setattr(checking, "_states_of_the_model", first_is_wrong)
    attribute(tiny("llama"), IDS)
    assert tries == [9, 8]


def test_layers_of_different_width_and_their_shared_experts_are_found():
    anatomy = find_anatomy(tiny("llama4"))
    assert [n.split(".", 3)[3] for n in anatomy.names] == [
        "feed_forward.down_proj",
        "feed_forward.shared_expert.down_proj",
        "feed_forward.down_proj",
    ]
    assert [d.in_features for d in anatomy.down] == [96, 80, 96]
    assert anatomy.intermediate_size == 96 and COMMON["hidden_size"] == anatomy.hidden_size
