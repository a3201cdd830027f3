"""Which linears there are besides the down-projections, by family."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny
from transformers import AutoModelForCausalLM

from benchmarks.standins import published, shrink
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.linears import chosen, kind_of, other_linears

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
GATED = {"gate_proj", "up_proj"}


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", ATTENTION | GATED),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj"}),
        ("qwen2_moe", ATTENTION | GATED),  # of the shared expert; its gate and the router stay
        ("falcon_h1", ATTENTION | GATED | {"in_proj"}),
    ],
)
def test_every_linear_but_experts_routers_and_what_kernels_read(family, kinds):
    model = tiny(family)
    anatomy = find_anatomy(model)
    found = other_linears(model, anatomy)
    assert {kind_of(name) for name in found} == kinds
    assert not set(found) & set(anatomy.names)
    assert all(model.get_submodule(name) is module for name, module in found.items())


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("hunyuan_v1_moe", ATTENTION | GATED),  # its router lies inside of `gate`
        ("jamba", ATTENTION | GATED | {"in_proj"}),  # and not what Mamba's code reads past them
        ("mamba", {"in_proj"}),
        ("deepseek_v4", GATED | {"q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"}),
        (
            "deepseek_v32",  # its indexer chooses, and has no gradient
            GATED | {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"},
        ),
    ],
)
def test_what_would_train_past_its_module_or_never_is_left_out(family, kinds):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shrink(published(family)))
    assert {kind_of(name) for name in other_linears(model, find_anatomy(model))} == kinds


def test_what_gemma_3n_reads_past_its_module_while_it_trains_is_left_out():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shrink(published("gemma3n_text")))
    found = {kind_of(name) for name in other_linears(model, find_anatomy(model))}
    assert "prediction_coefs" in found and "correction_coefs" not in found


def test_where_no_linear_can_train_that_is_said():
    """JetMoE has routed experts in its attention too."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shrink(published("jetmoe")))
    anatomy = find_anatomy(model)
    with pytest.raises(ValueError, match="'jetmoe': .* in their attention too: no linear module"):
        chosen(model, anatomy, "all")
