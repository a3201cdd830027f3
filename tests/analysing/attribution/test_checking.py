"""Every model is asked, once, whether the fast analysis reproduces it."""

from __future__ import annotations

import pytest
import torch
from helpers.families import COMMON, GQA, tiny
from helpers.prompts import error, prompts
from transformers import AutoConfig, AutoModelForCausalLM

from loki_plugin import attribute
from loki_plugin.analysing.attribution import checking, replay, stack

IDS = torch.stack(prompts(lengths=(9, 9)))


def make(model_type, **settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.15)
    return model


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("diffllama", "p moves by .* of which the fast analysis misses"),  # attends twice
        ("gemma3n_text", r"takes hidden states of shape \[4, 1, 1, 48\]"),
        ("mpt", "called in a way that loki does not know .AttributeError"),
        ("gpt_neo", "does not attend through transformers' attention interface"),
        ("qwen3_5_text", r"in every layer .seen in layers \[3\]."),  # three are linear attention
    ],
)
def test_a_family_that_cannot_be_analysed_is_refused_and_never_scored(model_type, message):
    settings = {
        "diffllama": GQA,
        "gemma3n_text": GQA
        | {"head_dim": 12, "num_kv_shared_layers": 1, "activation_sparsity_pattern": None}
        | {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8},
        "mpt": {"d_model": 48, "n_heads": 4, "n_layers": 3, "vocab_size": 97},
        "gpt_neo": {"hidden_size": 48, "num_heads": 4, "num_layers": 3, "vocab_size": 97}
        | {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4},
        "qwen3_5_text": GQA | {"head_dim": 12, "num_hidden_layers": 4},
    }[model_type]
    model = make(model_type, **settings)
    for _ in range(2):  # a failed check does not count as one
        with pytest.raises(ValueError, match=message):
            attribute(model, IDS)


@pytest.mark.parametrize("fault", ["answers", "shared keys", "in place"])
def test_a_fault_in_the_stack_is_seen(monkeypatch, fault):
    """Three faults that were once there: none of them shows in the plain forward."""
    family = "falcon" if fault == "in place" else "gemma4"
    if fault == "answers":  # a linear after the down-projection answers as without a change
        monkeypatch.setattr(stack, "known_answers", lambda layer, down, memo: dict(memo))
    elif fault == "shared keys":
        monkeypatch.setattr(replay, "copy", lambda x: x)
    else:
        monkeypatch.setattr(stack.torch.Tensor, "clone", lambda x: x)
    with pytest.raises(ValueError, match=f"'{family}.*cannot be analysed"):
        attribute(tiny(family), IDS)


def test_a_model_is_checked_once_and_left_as_it_was(monkeypatch):
    seen = []
    inner = checking._p_of_the_model
    monkeypatch.setattr(
        checking, "_p_of_the_model", lambda m, a, ids: seen.append(len(ids)) or inner(m, a, ids)
    )
    monkeypatch.setattr(checking, "_TOKENS", 20)  # two of the three copies at once
    model = tiny("qwen2", attention="sdpa")
    first = attribute(model, IDS)
    assert seen == [9] and model.config._attn_implementation == "sdpa"
    assert torch.equal(attribute(model, IDS), first) and seen == [9]
    assert error(attribute(tiny("qwen2"), IDS), first) < 1e-5 and seen == [9, 9]
    assert not any(m._forward_hooks for m in model.modules())


@pytest.fixture
def tf32():
    """As `TrainingArguments(tf32=True)` leaves a process with a GPU."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    yield
    matmul.fp32_precision = before


def test_tf32_set_through_pytorchs_newer_setting_makes_the_check_coarser(tf32):
    with pytest.raises(RuntimeError, match="matmul precision"):
        torch.get_float32_matmul_precision()
    model = tiny("llama")
    assert not checking._is_exact(model)
    attribute(model, IDS)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert checking._is_exact(model)


def test_memory_that_runs_out_in_the_check_is_not_taken_for_an_unknown_family(monkeypatch):
    def full(*arguments):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(checking, "integrate", full)
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


def test_one_prompt_that_is_sent_elsewhere_by_rounding_does_not_refuse_a_model(monkeypatch):
    tries = []
    inner = checking._p_of_the_model

    def first_is_wrong(model, anatomy, ids):
        tries.append(len(ids))
        return inner(model, anatomy, ids) * (3 if len(tries) == 1 else 1)

    monkeypatch.setattr(checking, "_p_of_the_model", first_is_wrong)
    attribute(tiny("llama"), IDS)
    assert tries == [9, 8]


def test_layers_of_different_width_and_their_shared_experts_are_found():
    from loki_plugin.model.anatomy import find_anatomy

    anatomy = find_anatomy(tiny("llama4"))
    assert [n.split(".", 3)[3] for n in anatomy.names] == [
        "feed_forward.down_proj",
        "feed_forward.shared_expert.down_proj",
        "feed_forward.down_proj",
    ]
    assert [d.in_features for d in anatomy.down] == [96, 80, 96]
    assert anatomy.intermediate_size == 96 and COMMON["hidden_size"] == anatomy.hidden_size
