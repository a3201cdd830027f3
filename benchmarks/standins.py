"""Tiny stand-ins of real models: the same class and structure, with sizes that run anywhere.

A configuration is shrunk in place: every width becomes small and keeps what it must divide, every
list of layers keeps each kind of layer that it has. Where a class cannot be built from what is left
it says why, and the model is built from its own sizes on the meta device instead.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import AutoConfig

HIDDEN, HEADS, HEAD, INNER, LAYERS, VOCABULARY, EXPERTS = 64, 4, 16, 96, 4, 320, 4

# What a field is called in one family or another -> its size in a stand-in.
_SIZES = (
    (HIDDEN, (
        "hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "out_hidden_size",
        "projection_dim", "text_hidden_size", "vision_hidden_size", "mm_hidden_size", "dim",
        "d_inner_hidden", "adapter_hidden_size", "output_dim", "lm_hidden_size", "encoder_hidden",
        "projector_hidden_size", "cross_attention_hidden_size", "hidden_dim", "lru_width",
        "linear_key_dim", "moe_latent_size", "n_embed",
    )),
    (HEADS, (
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
        "decoder_attention_heads", "num_key_value_heads", "num_kv_heads", "swa_num_attention_heads",
        "linear_num_value_heads", "linear_num_key_heads", "mamba_num_heads", "mamba_n_heads",
        "swa_num_key_value_heads", "index_n_heads", "num_attention_heads_per_layer",
    )),
    (HEAD, (
        "head_dim", "v_head_dim", "global_head_dim", "attention_head_dim", "d_kv", "swa_head_dim",
        "linear_key_head_dim", "linear_value_head_dim", "mamba_head_dim", "mamba_d_head", "d_head",
        "qk_nope_head_dim", "kv_channels", "index_head_dim", "query_pre_attn_scalar",
        "swa_v_head_dim", "d_k", "kda_head_dim", "cross_head_dim",
    )),
    (HEAD // 2, (
        "qk_rope_head_dim", "mamba_d_state", "ssm_state_size", "state_size", "rotary_dim",
    )),
    (INNER, (
        "intermediate_size", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff",
        "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size",
        "intermediate_size_mlp", "dense_intermediate_size", "mlp_dim", "ff_dim", "ffn_size",
        "moe_shared_expert_intermediate_size", "intermediate_size_swa", "expert_ffn_hidden_size",
        "shared_intermediate_size", "moe_ffn_hidden_size", "prefix_dense_intermediate_size",
        "block_ff_dim", "adapter_intermediate_size",
    )),
    (VOCABULARY, (
        "vocab_size", "vocab_size_per_layer_input", "text_vocab_size", "audio_vocab_size",
        "ngram_vocab_size",
    )),
    (EXPERTS, (
        "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
        "num_routed_experts", "num_local_routed_experts",
    )),
    (2, (
        "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "moe_num_shared",
    )),
    (1, ("n_group", "topk_group", "mamba_n_groups", "n_groups", "mamba_expand", "zero_expert_num")),
    (32, ("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input")),
    (128, ("max_position_embeddings", "n_positions", "max_seq_len", "sliding_window",
          "attention_chunk_size", "max_source_positions", "max_target_positions", "n_ctx")),
    (28, ("image_size", "force_image_size")),
    (14, ("patch_size",)),
)  # fmt: skip
_OF = {name: size for size, names in _SIZES for name in names}
_LISTS = (
    "layer_types", "layers_block_type", "mlp_layer_types", "block_types", "hybrid_override_pattern",
    "attention_types", "layers_types", "no_rope_layers", "mlp_types", "layer_type",
)  # fmt: skip
# How many layers there are, of a decoder or of a tower.
_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers",
    "decoder_layers", "num_local_layers", "num_encoder_layers",
)  # fmt: skip
_HEADS_OF_KEYS = ("num_key_value_heads", "num_kv_heads", "linear_num_key_heads")


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_HALF_MROPE = _MROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
_ONE_OF_EACH = ["full_attention", "sliding_attention"] * (LAYERS // 2)
# What a family needs besides: fields without a default, and sizes that follow from others.
_MORE: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "falcon_h1": {"mamba_d_ssm": HIDDEN},
    "mamba2": {"num_heads": 8, "expand": 2},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD, "num_experts": EXPERTS, "moe_topk": 2},
    "hunyuan_vl_text": {"head_dim": HEAD},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "mistral4": {"qk_nope_head_dim": HEAD // 2, "qk_head_dim": HEAD, "head_dim": HEAD},
    "dots1": {"sliding_window": 128, "n_routed_experts": EXPERTS, "n_shared_experts": 1}
    | {"num_experts_per_tok": 2},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "glm4v_moe_text": {"rope_parameters": _HALF_MROPE},
    "gemma3n_text": {"layer_types": _ONE_OF_EACH, "num_kv_shared_layers": 0}
    | {"activation_sparsity_pattern": [0.0] * LAYERS, "head_dim": HEAD},
    "cohere_compass_text": {"layer_types": _ONE_OF_EACH},
    "xmod": {"default_language": "en_XX"},
    "step3p7_text": {"sliding_window": 128},
    "reformer": {"is_decoder": True},
    "prophetnet": {"ngram": 2},
}  # fmt: skip


# Towers that a family's published models have and its default configuration leaves out.
_TOWERS = {
    "gemma4": {"vision_config": "gemma4_vision", "audio_config": "gemma4_audio"},
    "gemma4_unified": {
        "vision_config": "gemma4_unified_vision", "audio_config": "gemma4_unified_audio",
    },
}  # fmt: skip


def published(family: str, text: str | None = None) -> Any:
    """A family's default configuration, with the towers that its published models have.

    Args:
        family: a model type of transformers.
        text: the model type of its text model, where that is not the default's.
    """
    parts = _TOWERS.get(family, {}) | ({"text_config": text} if text else {})
    return AutoConfig.for_model(
        family, **{name: AutoConfig.for_model(kind).to_dict() for name, kind in parts.items()}
    )


def shrink(config: Any) -> Any:
    """A copy of a configuration of transformers with small sizes, in it and in its parts."""
    small = copy.deepcopy(config)
    for name in ("quantization_config", "auto_map"):
        if hasattr(small, name):
            delattr(small, name)
    return _shrink(small)


def _shrink(config: Any) -> Any:
    kept = _kept_layers(config)
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _set(config, name, _shrink(value))
        elif isinstance(value, dict) and "model_type" in value:
            continue
        elif name in _LISTS and isinstance(value, list | tuple):
            _set(config, name, [value[i] for i in kept if i < len(value)])
        elif name in _COUNTS and isinstance(value, int):
            _set(config, name, len(kept))
        elif name == "rope_parameters" and isinstance(value, dict):
            _set(config, name, _sections(value))
        elif name in _OF and isinstance(value, list) and all(isinstance(v, int) for v in value):
            _set(config, name, [_OF[name]] * len(kept))
        elif name in _OF and isinstance(value, int) and not isinstance(value, bool) and value:
            size = _OF[name]
            if name in _HEADS_OF_KEYS and value < (getattr(config, "num_attention_heads", 0) or 0):
                size = HEADS // 2
            _set(config, name, min(size, value) if size <= 2 else size)
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            _set(config, name, value % (VOCABULARY - 20) if value >= VOCABULARY else value)
        elif name.endswith("token_id") and isinstance(value, list):
            _set(config, name, [v % (VOCABULARY - 20) for v in value])
    _settle(config)
    if getattr(config, "_heterogeneity_spec", None) is None:
        return config
    fields = config.to_dict()  # sizes of single layers, by numbers that are gone
    fields.pop("per_layer_config", None)
    return type(config)(**fields | {"global_head_dim": HEAD})


def _settle(config: Any) -> None:
    """Sizes that follow from others, and what `_MORE` says of a family."""
    if getattr(config, "qk_rope_head_dim", None):  # latent attention: the part that is rotated
        _set(config, "head_dim", config.qk_rope_head_dim)
        if hasattr(config, "qk_head_dim"):
            _set(config, "qk_head_dim", config.qk_rope_head_dim + config.qk_nope_head_dim)
    for name, value in _MORE.get(getattr(config, "model_type", ""), {}).items():
        _set(config, name, copy.deepcopy(value))


def _sections(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parts of time, height and width, which together make half of a head."""
    found: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            value = _sections(value)
        elif name == "mrope_section":
            share = float(rope.get("partial_rotary_factor") or 1)
            half = int(HEAD * share) // 2
            value = [half - 2 * (half // 3), half // 3, half // 3]
        found[name] = value
    return found


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except (AttributeError, ValueError, TypeError):
        pass  # what a property computes of other fields follows by itself


def _kept_layers(config: Any) -> list[int]:
    """Layers of each kind that the lists name, in order; at least `LAYERS` where there are."""
    lists = [getattr(config, n, None) for n in _LISTS]
    known = [v for v in lists if isinstance(v, list | tuple) and v]
    if not known:
        return list(range(LAYERS))
    count = min(len(v) for v in known)
    kinds: dict[tuple, int] = {}
    for i in range(count):
        kinds.setdefault(tuple(str(v[i]) for v in known), i)
    chosen = set(kinds.values())
    for i in range(count):
        if len(chosen) < LAYERS:
            chosen.add(i)
    return sorted(chosen)
