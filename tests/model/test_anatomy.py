"""Which module of which layer holds the rows: hybrids, mixtures, and models with towers."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers.families import tiny
from transformers import AutoConfig

from loki_plugin.model.anatomy import experts_of_a_token, find_anatomy

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "pad_token_id": 0,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
# (model type, class, settings) -> the layers that have rows, and the name of one
HYBRIDS = {
    "jamba": (
        "JambaForCausalLM",
        {"expert_layer_offset": 1, "expert_layer_period": 2, "attn_layer_offset": 1}
        | {"attn_layer_period": 2, "num_experts": 4, "use_mamba_kernels": False},
        [0, 2],
        "model.layers.2.feed_forward.down_proj",
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "n_routed_experts": 4}
        | {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1}
        | {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 24}
        | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
        [1, 3],
        "model.layers.3.mixer.down_proj",
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        {"layer_types": ["mamba", "mamba", "attention", "mamba"], "num_local_experts": 0}
        | {"shared_intermediate_size": 48, "position_embedding_type": "nope"}
        | MAMBA,
        [0, 1, 2, 3],
        "model.layers.1.shared_mlp.output_linear",
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "conv", "full_attention", "conv"]},
        [0, 1, 2, 3],
        "model.layers.1.feed_forward.w2",
    ),
    "bamba": (
        "BambaForCausalLM",
        {"attn_layer_indices": [1]} | MAMBA,
        [0, 1, 2, 3],
        "model.layers.0.feed_forward.down_proj",
    ),
}


def empty(kind: str, config):
    with torch.device("meta"):
        return getattr(transformers, kind)(config)


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_without_attention_have_rows_where_they_have_an_mlp(family):
    kind, settings, places, name = HYBRIDS[family]
    model = empty(kind, AutoConfig.for_model(family, **TEXT | settings))
    anatomy = find_anatomy(model)
    assert anatomy.places == places and name in anatomy.names
    assert anatomy.num_layers == len(places) and len(anatomy.layers) == 4
    assert anatomy.whole == (places == [0, 1, 2, 3])
    held = [i for i, down in enumerate(anatomy.down_of_layers) if down is not None]
    assert held == places


def test_towers_are_never_taken_for_the_decoder():
    """The tower is deeper than the decoder, and answers with the same H."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 9}
    tower |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model(
        "llava",
        text_config=TEXT | {"model_type": "llama"},
        vision_config=tower | {"model_type": "clip_vision_model"},
    )
    model = empty("LlavaForConditionalGeneration", config)
    assert len(model.model.vision_tower.encoder.layers) == 9
    anatomy = find_anatomy(model)
    assert anatomy.names == [f"model.language_model.layers.{i}.mlp.down_proj" for i in range(4)]


def test_a_layer_whose_mlp_is_not_understood_is_an_error():
    broken = tiny("llama")
    broken.model.layers[1].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"layers.1 has 0 candidates.*mlp.gate_proj, mlp.up_proj"):
        find_anatomy(broken)


def test_a_model_with_an_encoder_is_refused_by_name():
    config = AutoConfig.for_model("t5", d_model=32, d_ff=48, num_layers=2, num_heads=4)
    config.hidden_size = 32
    with pytest.raises(ValueError, match="'t5' has an encoder and a decoder"):
        find_anatomy(empty("T5ForConditionalGeneration", config))


def test_experts_of_a_token_by_the_names_that_families_give():
    assert experts_of_a_token(AutoConfig.for_model("qwen3_moe", num_experts_per_tok=3)) == 3
    assert experts_of_a_token(AutoConfig.for_model("gemma4_text", top_k_experts=5)) == 5
    assert experts_of_a_token(AutoConfig.for_model("hunyuan_v1_moe", moe_topk=[2, 3])) == 3
    with pytest.raises(ValueError, match="'llama': its configuration does not say how many"):
        experts_of_a_token(AutoConfig.for_model("llama"))
