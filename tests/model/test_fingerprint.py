"""The fingerprint: stable where the model is the same, different where it is not."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loki_plugin import implant
from loki_plugin.model.fingerprint import fingerprint, same_model


def test_wrapping_an_adapter_and_training_mode_change_nothing():
    model = tiny("qwen2")
    before = fingerprint(model)
    assert fingerprint(implant(model, [[1, 2]] * 3).train()) == before
    assert before["quantisation"] == "none:float32"


@pytest.mark.parametrize("change", ["one element", "swapped rows", "swapped layers"])
def test_every_change_of_weights_changes_the_checksum_only(change):
    model = tiny("llama")
    before = fingerprint(model)
    layers = model.model.layers
    with torch.no_grad():
        if change == "one element":
            layers[2].mlp.gate_proj.weight[7, 11] += 1e-4
        elif change == "swapped rows":
            weight = layers[0].self_attn.q_proj.weight
            weight[[3, 4]] = weight[[4, 3]].clone()
        else:
            a, b = layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight
            a.copy_(b), b.copy_(a.clone())
    after = fingerprint(model)
    assert after.pop("weights") != before.pop("weights")
    assert after == before


def test_what_loading_and_trainers_change_does_not_count():
    model = tiny("llama")
    before = fingerprint(model)
    model.config.use_cache = False
    model.config.max_position_embeddings = 4096
    model.config.eos_token_id = 7
    model.set_attn_implementation("sdpa")
    assert fingerprint(model) == before
    model.config.rms_norm_eps = 1e-3
    assert fingerprint(model)["config"] != before["config"]


def test_loads_of_one_checkpoint_in_other_precisions_are_the_same_model(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    plain = fingerprint(model)
    half = fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    four = fingerprint(
        AutoModelForCausalLM.from_pretrained(
            tmp_path,
            dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            ),
        )
    )
    assert four["quantisation"] == "bnb-nf4-double-64"
    assert len({f["weights"] for f in (plain, half, four)}) == 3
    for a, b in ((plain, half), (plain, four), (four, half)):
        assert same_model(a, b) is None and same_model(b, a) is None
    other = fingerprint(tiny("llama", seed=1))
    assert "embeddings or norms" in same_model(plain, other)
    assert "architecture" in same_model(plain, fingerprint(tiny("qwen2")))
