"""Axolotl's options that are refused, with what to do about each, or overridden.

`docs/options.md` is written from these tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..args import LokiConfig
from .preference import preference_faults
from .sharding import fsdp_faults, is_fsdp2, zero_faults

_KERNEL = "the fused kernel reads lora_A and lora_B past what constrains them"
_NAME_THEM = "name what trains in `loki.targets`: a list of names, or a regular expression"
# Keys that would train, move or scale something else than the selected rows, and why.
REFUSED = {
    "reward_model": "reward models are not supported yet",
    "process_reward_model": "reward models are not supported yet",
    "relora": "ReLoRA merges and restarts the adapter; LoKI keeps one",
    "peft_use_dora": "DoRA rescales every row of the weight, frozen ones too",
    "peft_use_rslora": "LoKI's scaling is always 1",
    "peft_init_lora_weights": "LoKI's update starts at zero",
    "peft_layers_to_transform": _NAME_THEM,
    "peft_layers_pattern": _NAME_THEM,
    "peft_layer_replication": "replicated layers have no rows of their own",
    "peft_trainable_token_indices": "it trains embeddings",
    "lora_rank_pattern": "LoKI sets the ranks from the rows",
    "lora_alpha_pattern": "LoKI sets the ranks from the rows",
    "loraplus_lr_ratio": "use `loki.lr_scale`",
    "fix_untrained_tokens": "it changes embeddings of the base model",
    "gptq": "only 16/32-bit and bitsandbytes 8-bit or 4-bit bases are supported",
    "model_quantization_config": "only bitsandbytes 8-bit or 4-bit bases are supported",
    "use_onebitllms": "it rewrites every linear layer of the base model",
    "qat": "it rounds the weights of the base model, frozen ones too",
    "llmcompressor": "it prunes the base model",
    "fp8": "it replaces the linear layers, and with them the constraint to the rows",
    "reinit_weights": "the rows would be chosen and trained on random weights",
    "scaling_softmax": "it changes attention in this training alone; the base was analysed, and is"
    " merged, without it",
    "shrink_embeddings": "it cuts tokens off the base model's embeddings",
    "lisa_step_interval": "LISA trains layers of the base model",
    "spectrum_top_fraction": "Spectrum trains layers of the base model",
    "lora_exclude_modules": _NAME_THEM,
    "flash_attn_fuse_mlp": "it replaces the MLPs, and with them the down-projections",
    "dsv4_shared_mlp_lora_kernel": _KERNEL,
    "dsv4_fp8_lora_kernel": _KERNEL,
    "use_glm_dsa_kernels": _KERNEL,
    "nvfp4_merge_aware": _KERNEL,
}
# At zero they do not stand for "off": LoRA+ would train lora_B at a rate of nothing.
_SET_AT_ZERO = {"loraplus_lr_ratio"}
# What to do about them, where it is not to remove the key.
_TAKE_16_BIT = "take the 16-bit model that it was made from, with `load_in_4bit: true` if need be"
DO = {"gptq": _TAKE_16_BIT, "model_quantization_config": _TAKE_16_BIT}
REMOVE = "remove it"
REFUSED_PLUGINS = {
    "DiffusionPlugin": "it trains to fill masks by attention in both directions, and rows are"
    " chosen by what follows a causal prompt",
    "HatcheryPlugin": "it trains on a remote machine, where nothing keeps to the rows",
    "SpectrumPlugin": "it trains layers of the base model",
}
OVERRIDDEN = {
    "lora_target_modules": ["down_proj"],  # until the rows are known
    "lora_target_linear": None,
    "lora_target_parameters": None,
    "lora_dropout": 0.0,
    # The kernels read lora_B.weight past the module's forward, and so past the constraint.
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "lora_embedding_kernel": False,
    "lora_modules_to_save": None,
    # Axolotl freezes and unfreezes by it after the adapter is loaded.
    "unfrozen_parameters": None,
}
WHY = {
    "lora_target_parameters": "routed experts do not train",
    "lora_dropout": "LoKI trains without dropout",
    "lora_mlp_kernel": _KERNEL,
    "lora_qkv_kernel": _KERNEL,
    "lora_o_kernel": _KERNEL,
    "lora_embedding_kernel": _KERNEL,
    "lora_modules_to_save": "whole modules do not train, new embeddings neither",
    "unfrozen_parameters": "parameters of the base do not train",
}

# Tokens of a shard where `tiled_mlp_num_shards` does not say how many there are.
_SHARD = 32768


def refuse(cfg, config: LokiConfig) -> None:
    """Check a YAML against the tables and against what else cannot be used.

    Raises:
        ValueError: all faults at once, each with what to do.
    """
    faults = [
        f"  {key}: {why}; {DO.get(key, REMOVE)}"
        for key, why in REFUSED.items()
        if cfg.get(key) or (key in _SET_AT_ZERO and cfg.get(key) is not None)
    ]
    if cfg.get("model_quantization_config") == "Mxfp4Config":  # of gpt-oss alone
        faults[:] = [f for f in faults if "model_quantization_config" not in f]
        faults.append(
            "  model_quantization_config: Mxfp4Config is the form of gpt-oss, whose layers have"
            " routed experts only; nothing is merged into it. Take the same model stored as 16"
            " bits, and `loki: {targets: all}`, which trains all but the experts"
        )
    for plugin in cfg.get("plugins") or []:
        name = str(plugin).rpartition(".")[2]
        if name in REFUSED_PLUGINS:
            faults.append(f"  plugins: {plugin}: {REFUSED_PLUGINS[name]}; take it out")
    if cfg.get("adapter") == "qlora" and not (cfg.get("load_in_4bit") or cfg.get("merge_lora")):
        faults.append(
            "  adapter: qlora is LoRA on a 4-bit base; set `load_in_4bit: true`, or write"
            " `adapter: lora` (low-rank) or `adapter: loki` (dense) for a 16/32-bit base"
        )
    if _block(cfg, "peft").get("loftq_config"):
        faults.append("  peft.loftq_config: LoKI's update starts at zero; remove it")
    if str(cfg.get("tensor_parallel_size") or 1) != "1":
        faults.append(
            "  tensor_parallel_size: it spreads the rows of a layer over the GPUs; remove it"
        )
    held_out = cfg.get("val_set_size") or cfg.get("test_datasets")
    cut = cfg.get("context_parallel_size") or cfg.get("sequence_parallel_degree") or 1
    if str(cut) != "1" and (config.protect.anchor or held_out):
        faults.append(
            "  context_parallel_size: it cuts every text into parts, the anchor's and those of"
            " what is measured at evaluations too; remove it, or set `protect: off` and take the"
            " evaluations out"
        )
    if cfg.get("nf4_backend") == "torchao":
        faults.append(
            "  nf4_backend: torchao stores 4-bit weights in a form that loki does not read; take"
            " bitsandbytes, the default"
        )
    if cfg.get("optimizer") == "polora":
        faults.append(
            "  optimizer: polora works on pairs of A and B; take another, such as adamw_torch"
        )
    if str(cfg.get("optimizer")).endswith("_layerwise") and config.lr_scale != 1:
        faults.append(
            f"  optimizer: {cfg['optimizer']} has an optimizer for each parameter, which"
            " `loki.lr_scale` does not reach; set `learning_rate`, or take another"
        )
    if cfg.get("lr_groups") and config.lr_scale != 1:
        faults.append("  lr_groups: its rates are absolute; set them or `loki.lr_scale`, not both")
    if _tiled_wrongly(cfg):
        faults.append(
            "  tiled_mlp: Axolotl's backward of several shards mixes up the sequences of a batch,"
            " and gradients are wrong; set `micro_batch_size: 1` or `tiled_mlp_num_shards: 1`"
        )
    faults += preference_faults(cfg)
    faults += fsdp_faults(cfg, config.protect)
    if config.stop_forgetting is not None:
        if is_fsdp2(cfg):
            faults.append(
                "  loki.stop_forgetting: loading a checkpoint back was not proved under FSDP2;"
                " remove it"
            )
        elif cfg.get("deepspeed") and cfg.get("save_only_model"):
            faults.append(
                "  save_only_model: under DeepSpeed such checkpoints cannot be loaded back, as"
                " `loki.stop_forgetting` does; remove one of them"
            )
    faults += _deepspeed_faults(cfg.get("deepspeed"), config)
    if faults:
        raise ValueError(
            "these settings cannot be used with loki; each line says what to do:\n"
            + "\n".join(faults)
        )
    if config.rows and config.exclude:
        raise ValueError(
            "loki.rows and loki.exclude disagree: rows from a file are used as they are; give one"
        )


def _block(cfg, key: str) -> dict[str, Any]:
    found = cfg.get(key) or {}
    if not isinstance(found, dict):
        raise ValueError(f"`{key}:` must be a block of settings, got {found!r}")
    return found


def _tiled_wrongly(cfg) -> bool:
    """Whether a tiled MLP cuts a batch of several sequences; packed ones run as one."""
    if not cfg.get("tiled_mlp") or cfg.get("sample_packing"):
        return False
    shards = cfg.get("tiled_mlp_num_shards") or -(-(cfg.get("sequence_len") or 1) // _SHARD)
    return shards > 1 and (cfg.get("micro_batch_size") or 1) > 1


def _deepspeed_faults(deepspeed, config: LokiConfig) -> list[str]:
    """What a DeepSpeed configuration may not define: there the trainer's own makers are skipped."""
    if isinstance(deepspeed, str):
        if not Path(deepspeed).is_file():
            return []  # Axolotl's to say
        try:
            deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except ValueError as error:
            return [f"  deepspeed: '{deepspeed}' is not JSON: {error}"]
    deepspeed = deepspeed or {}
    if not isinstance(deepspeed, dict):
        return [f"  deepspeed: {deepspeed!r} is no configuration; give one, or the file of one"]
    faults = zero_faults(deepspeed)
    if deepspeed.get("optimizer"):
        faults.append(
            "  deepspeed: its configuration defines an `optimizer`, which loki cannot guard; take"
            " it out there and set `optimizer:` in the YAML"
        )
    if deepspeed.get("scheduler") and config.lr_scale != 1:
        faults.append(
            "  deepspeed: its configuration defines a `scheduler`, which knows nothing of"
            " `loki.lr_scale`; take it out there and set `lr_scheduler:` in the YAML"
        )
    return faults
