"""Tiny random models of the supported families, by their real transformers classes."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 64,
}
GQA = COMMON | {"num_key_value_heads": 2}
SLIDING = {"sliding_window": 4}
SHARED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
}

DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12, "head_dim": 12,
}  # fmt: skip
SHARED_EXPERT = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 2, "mamba_d_state": 16,
    "mamba_expand": 2, "mamba_chunk_size": 8, "pad_token_id": 0,
}  # fmt: skip

# family -> (model_type, settings); every entry exercises what its family adds to Llama.
FAMILIES = {
    "llama": ("llama", GQA),
    "llama3-rope": (
        "llama",
        GQA
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "gemma": ("gemma", GQA | {"head_dim": 12}),
    "seed_oss": ("seed_oss", GQA | {"head_dim": 12}),
    "arcee": ("arcee", GQA),
    "apertus": ("apertus", GQA),
    "nemotron": ("nemotron", GQA),
    "qwen2": ("qwen2", GQA),
    "qwen2-sliding": (
        "qwen2",
        GQA | SLIDING | {"use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", GQA | {"head_dim": 16}),
    "mistral-sliding": ("mistral", GQA | SLIDING),
    "gemma2": ("gemma2", GQA | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        GQA | SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window_pattern": 2},
    ),
    "gemma4": (
        "gemma4_text",
        GQA
        | SLIDING
        | {
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 1,
            "head_dim": 12,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 97,
        },
    ),
    "phi": ("phi", COMMON | {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", GQA | {"pad_token_id": 0}),
    "phi4": ("phi3", GQA | {"pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "granite": (
        "granite",
        GQA
        | {
            "residual_multiplier": 0.3,
            "logits_scaling": 3.0,
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.4,
        },
    ),
    "olmo2": ("olmo2", GQA),
    "olmo3": ("olmo3", GQA | SLIDING),
    "exaone4": ("exaone4", GQA | SLIDING),
    "ministral3": ("ministral3", GQA),
    "smollm3": ("smollm3", GQA | {"no_rope_layer_interval": 2, "pad_token_id": 0}),
    "cohere": ("cohere", GQA | {"logit_scale": 0.5}),
    "cohere2": ("cohere2", GQA | SLIDING | {"logit_scale": 0.5}),
    "glm": ("glm", GQA | {"head_dim": 12, "pad_token_id": 0}),
    "glm4": ("glm4", GQA | {"head_dim": 12, "pad_token_id": 0}),
    "starcoder2": ("starcoder2", GQA | {"use_bias": True}),
    "stablelm": ("stablelm", GQA | {"partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", COMMON | {"use_parallel_residual": True}),
    "gpt_neox-sequential": ("gpt_neox", COMMON | {"use_parallel_residual": False}),
    "opt": (
        "opt",
        {k: v for k, v in COMMON.items() if k != "intermediate_size"}
        | {"ffn_dim": 80, "word_embed_proj_dim": 48},
    ),
    "opt-post-norm": (
        "opt",
        {k: v for k, v in COMMON.items() if k != "intermediate_size"}
        | {"ffn_dim": 80, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "gpt2": (
        "gpt2",
        {"n_embd": 48, "n_inner": 80, "n_layer": 3, "n_head": 4, "vocab_size": 97}
        | {"n_positions": 64},
    ),
    "falcon": (
        "falcon",
        {k: v for k, v in COMMON.items() if k != "intermediate_size"}
        | {"ffn_hidden_size": 80, "multi_query": True, "alibi": False},
    ),
    "falcon-alibi": (
        "falcon",
        {k: v for k, v in COMMON.items() if k != "intermediate_size"}
        | {"ffn_hidden_size": 80, "multi_query": False, "alibi": True, "parallel_attn": False},
    ),
    "falcon-new": (
        "falcon",
        {k: v for k, v in COMMON.items() if k != "intermediate_size"}
        | {"ffn_hidden_size": 80, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    # Mixtures of experts with a shared expert or a dense MLP in every layer.
    "qwen2_moe": (
        "qwen2_moe",
        GQA
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 64},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        GQA
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64}
        | {"pad_token_id": 0},
    ),
    "llama4": (
        "llama4_text",
        GQA
        | {"head_dim": 16, "attention_chunk_size": 6, "pad_token_id": 0}
        | {"num_local_experts": 4, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        COMMON
        | SHARED_EXPERTS
        | {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 12}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_group": 2, "topk_group": 1},
    ),
    "glm4_moe": ("glm4_moe", GQA | SHARED_EXPERTS | {"head_dim": 12}),
    "hunyuan_moe": (
        "hunyuan_v1_moe",
        GQA | {"num_experts": 4, "moe_topk": 2, "head_dim": 12, "pad_token_id": 0},
    ),
    "afmoe": (
        "afmoe",
        GQA
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"num_shared_experts": 1, "num_dense_layers": 1, "head_dim": 12},
    ),
    # A recurrence or a convolution instead of attention in some layers, or beside it.
    "qwen3_5": ("qwen3_5_text", GQA | DELTA),
    "qwen3_5_moe": ("qwen3_5_moe_text", GQA | DELTA | SHARED_EXPERT),
    "qwen3_next": ("qwen3_next", GQA | DELTA | SHARED_EXPERT),
    "olmo_hybrid": (
        "olmo_hybrid",
        COMMON | DELTA | {"linear_num_key_heads": 4, "pad_token_id": 0, "num_key_value_heads": 4},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        GQA
        | MAMBA
        | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 80}
        | {"num_local_experts": 0},
    ),
    "granitemoehybrid-experts": (
        "granitemoehybrid",
        GQA
        | MAMBA
        | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 64}
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "bamba": ("bamba", GQA | MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": (
        "falcon_h1",
        GQA | MAMBA | {"mamba_d_ssm": 96, "time_step_limit": (0.05, 0.6)},
    ),
    "jamba": (
        "jamba",
        GQA
        | {"num_experts": 1, "num_experts_per_tok": 1, "pad_token_id": 0, "mamba_dt_rank": 6}
        | {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 8},
    ),
    "lfm2": (
        "lfm2",
        GQA
        | {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}
        | {"pad_token_id": 0},
    ),
}
RECURRENT = list(FAMILIES)[list(FAMILIES).index("qwen3_5") :]


def tiny(family: str, attention: str = "eager", dtype=torch.float32, seed: int = 0, **widths: int):
    """A model with weights large enough that scores are far above rounding.

    `widths` take the place of the settings of that name, in families that have them.
    """
    model_type, settings = FAMILIES[family]
    settings = settings | {k: v for k, v in widths.items() if k in settings}
    if settings.get("alibi"):
        attention = "sdpa"  # transformers' eager Falcon adds the bias a second time
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(
        config,
        attn_implementation=attention,
        experts_implementation="eager",  # the default, grouped products, does not take float64
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif parameter.dim() == 1:  # norms and biases: not at their trivial initial values
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()
