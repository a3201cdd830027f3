"""The settings of a run: what is refused, what is overridden, and the `loki:` block as a model.

A LoKI run travels through Axolotl as a LoRA run whose adapter is constrained.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..args import LokiConfig
from ..choices import ALL, DOWN, LINEAR_RANK
from .preference import preference_faults
from .sharding import (
    OVERRIDDEN_WITH_FSDP2,
    fsdp2_overrides,
    fsdp_faults,
    is_fsdp2,
    zero_faults,
)
from .telling import Line

LOG = logging.getLogger("loki_plugin")

# Keys that would train, move or scale something else than the selected rows, and why.
REFUSED = {
    "reward_model": "reward models are not supported yet",
    "process_reward_model": "reward models are not supported yet",
    "relora": "ReLoRA merges and restarts the adapter; LoKI keeps one",
    "peft_use_dora": "DoRA rescales every row of the weight, frozen ones too",
    "peft_use_rslora": "LoKI's scaling is always 1",
    "peft_init_lora_weights": "LoKI's update starts at zero",
    "peft_layers_to_transform": "use `loki.exclude` or a rows file to leave layers out",
    "peft_layers_pattern": "use `loki.exclude` or a rows file to leave layers out",
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
    "lora_exclude_modules": "use `loki.exclude` or a rows file to leave layers out",
    "flash_attn_fuse_mlp": "it replaces the MLPs, and with them the down-projections",
}
# What to do about them, where it is not to remove the key.
_TAKE_16_BIT = "take the 16-bit model that it was made from, with `load_in_4bit: true` if need be"
DO = {"gptq": _TAKE_16_BIT, "model_quantization_config": _TAKE_16_BIT}
REMOVE = "remove it"
REFUSED_PLUGINS = {
    "DiffusionPlugin": "it trains to fill masks by attention in both directions, and rows are"
    " chosen by what follows a causal prompt",
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
_KERNEL = "the fused kernel reads lora_A and lora_B past what constrains them"
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
# Axolotl takes new tokens beside an adapter only if their embeddings are named to be trained. They
# stand in the configuration for its check and are out of it while the adapter is made.
# Tokens of a shard where `tiled_mlp_num_shards` does not say how many there are.
_SHARD = 32768
EMBEDDINGS = ["embed_in", "embed_out", "embed_tokens", "embeddings", "lm_head", "word_embeddings"]
WRITTEN = (*OVERRIDDEN, *OVERRIDDEN_WITH_FSDP2, "adapter", "lora_r", "lora_alpha", "loki")
# Rates from here on are LoRA's, ten times those of full fine-tuning, of which the dense form is a
# part (docs/choosing.md).
_RATE_OF_LORA = 5e-5


def parse(cfg) -> LokiConfig:
    """The `loki:` block as a checked model.

    Raises:
        ValueError: all faults of the block at once.
    """
    block = cfg.get("loki")
    if block is None:
        block = {}
    if not isinstance(block, dict):
        raise ValueError(f"`loki:` must be a block of settings, got {block!r}")
    block = block.to_dict() if hasattr(block, "to_dict") else block
    try:
        return LokiConfig(**block)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            where = ".".join(["loki", *(str(part) for part in fault["loc"])])
            said, hint = fault["msg"], ""
            if fault["type"] == "extra_forbidden":
                hint = f"; known fields: {', '.join(_fields_at(fault['loc'][:-1]))}"
            elif fault["type"] == "model_type":  # pydantic would name the class
                said = f"expected a block of {', '.join(_fields_at(fault['loc']))}"
            lines.append(f"  {where}: {said} (got {fault['input']!r}){hint}")
        raise ValueError("the `loki:` block is not valid:\n" + "\n".join(lines)) from error


def _fields_at(path: tuple) -> list[str]:
    model: Any = LokiConfig
    for part in path:
        model = model.model_fields[part].annotation
    return sorted(model.model_fields)


def prepare(cfg) -> list[Line]:
    """Check the run and rewrite its keys so that Axolotl builds the LoRA carrier.

    A configuration that went through here before comes out as it went in. `cfg` is changed only
    if all is well with it.

    Returns the lines that say what was set and what was overridden.

    Raises:
        ValueError: a setting that contradicts LoKI, before anything is loaded.
    """
    config = parse(cfg)
    adapter, rank = _adapter(cfg, config)
    sharding, lines = fsdp2_overrides(cfg) if is_fsdp2(cfg) else ({}, [])
    about: list[Line] = []
    config = _aim(cfg, config, rank, about)
    _refuse({**cfg, **sharding}, config)
    form = "dense" if rank is None else "low-rank"
    if config.form is None:
        given = cfg.get("adapter") or "not set"
        about.append(("adapter", f"'{given}' runs as '{adapter}', in the {form} form"))
        about += _about_rate(cfg, config) if form == "dense" else []
    if is_fsdp2(cfg):
        about.append(("sharding", "FSDP2: has run on CPU ranks only, see docs/ways.md"))
    wanted = {**OVERRIDDEN, "adapter": adapter, "lora_r": rank or 1, "lora_alpha": rank or 1}
    if _adds_tokens(cfg):
        wanted["lora_modules_to_save"] = EMBEDDINGS
    told = {"adapter", "lora_target_modules", "lora_target_linear"}
    if config.targets != DOWN and rank is None and config.linear_rank == _rank(cfg.get("lora_r")):
        told.add("lora_r")  # it is the rank on the other linears
    for key, value in wanted.items():
        given = cfg.get(key)
        if given is not None and given != value and key not in told:
            reason = f"now {value}, for {WHY[key]}" if key in WHY else "set from the rows"
            if key == "lora_modules_to_save":
                reason = WHY[key]
            lines.append(("overrides", f"{key} = {given!r}: {reason}"))
    cfg.update({**sharding, **wanted})
    cfg["loki"] = config.model_dump(mode="json", exclude_none=True) | {"rank": rank, "form": form}
    return about + lines


def _about_rate(cfg, config: LokiConfig) -> list[Line]:
    """A word where the dense form would train at a rate that was meant for a LoRA."""
    try:
        given = float(cfg.get("learning_rate") or 0)  # YAML takes 1e-4 for text
    except (TypeError, ValueError):
        return []  # Axolotl's to say
    optimizer, scale = str(cfg.get("optimizer") or "adamw"), config.lr_scale
    if config.targets != DOWN or "adam" not in optimizer or given * scale < _RATE_OF_LORA:
        return []
    scaled = f" x lr_scale {scale:g}" if scale != 1 else ""
    return [
        (
            "rate",
            f"learning_rate = {given:g}{scaled} is kept, a rate of LoRA; dense rows train as in"
            " full fine-tuning, and forget more at higher rates: about 1e-5 is advised"
            " (docs/choosing.md). Set it, or `loki.lr_scale`",
        )
    ]


def _aim(cfg, config: LokiConfig, rank: int | None, lines: list[Line]) -> LokiConfig:
    """The block with `targets`, which may stand in LoRA's own keys, and the rank on linears."""
    if config.form is not None:
        return config
    key, found = _lora_targets(cfg)
    if key and config.targets == DOWN and "targets" not in config.model_fields_set:
        config = _changed(config, targets=found)
        lines.append(("targets", f"{key} = {cfg[key]!r} is taken as `loki.targets: {found}`"))
    elif key and config.targets != found:
        lines.append(("overrides", f"{key} = {cfg[key]!r}: `loki.targets: {config.targets}`"))
    if config.targets == DOWN:
        return config
    linear_rank = config.linear_rank or rank or _rank(cfg.get("lora_r")) or LINEAR_RANK
    lines.append(("linears", f"besides rows of the down-projections: LoRA of rank {linear_rank}"))
    return _changed(config, linear_rank=linear_rank)


def _changed(config: LokiConfig, **fields: Any) -> LokiConfig:
    return LokiConfig(**{**config.model_dump(mode="json", exclude_none=True), **fields})


def _lora_targets(cfg) -> tuple[str | None, str | list[str]]:
    """Which of LoRA's keys says what trains, and what it says."""
    modules = cfg.get("lora_target_modules")
    if modules:
        return "lora_target_modules", ALL if modules == "all-linear" else modules
    return ("lora_target_linear", ALL) if cfg.get("lora_target_linear") else (None, DOWN)


def remember(cfg) -> dict[str, Any]:
    """What `prepare` may change, as it stands now; see `restore`."""
    return {key: cfg[key] for key in WRITTEN if key in cfg}


def restore(cfg, before: dict[str, Any]) -> None:
    """Undo `prepare`."""
    for key in WRITTEN:
        cfg.pop(key, None)
    cfg.update(before)


def _refuse(cfg, config: LokiConfig) -> None:
    faults = [
        f"  {key}: {why}; {DO.get(key, REMOVE)}" for key, why in REFUSED.items() if cfg.get(key)
    ]
    if cfg.get("model_quantization_config") == "Mxfp4Config":  # of gpt-oss alone
        faults[:] = [f for f in faults if "model_quantization_config" not in f]
        faults.append(
            "  model_quantization_config: Mxfp4Config is the form of gpt-oss, whose layers have"
            " routed experts only; loki cannot train it, stored as 16 bits neither. Take a dense"
            " model, or a mixture with shared experts (docs/limits.md)"
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
    if cfg.get("optimizer") == "polora":
        faults.append(
            "  optimizer: polora works on pairs of A and B; take another, such as adamw_torch"
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
    if is_fsdp2(cfg) and config.targets != DOWN:
        faults.append(
            "  loki.targets: linears besides the down-projections were not proved with FSDP2;"
            " remove it"
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


def _adds_tokens(cfg) -> bool:
    return bool(cfg.get("tokens") or cfg.get("special_tokens"))


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


def _adapter(cfg, config: LokiConfig) -> tuple[str, int | None]:
    given, rank = cfg.get("adapter"), config.rank
    if given not in (None, "loki", "lora", "qlora"):
        raise ValueError(
            f"adapter: {given} cannot be combined with plugins: [loki]; use `adapter: loki`, or"
            " `lora`/`qlora` with `lora_r` for the low-rank form"
        )
    if given in ("lora", "qlora") and config.form is None:
        r = _rank(cfg.get("lora_r"))
        if rank is not None and r is not None and r != rank:
            raise ValueError(f"lora_r = {r} and loki.rank = {rank} disagree; give one of them")
        rank = rank if r is None else r
        if rank is None:
            raise ValueError(
                f"adapter: {given} with plugins: [loki] is the low-rank form and needs `lora_r`;"
                " for the dense form write `adapter: loki`"
            )
    if given == "qlora":
        return given, rank
    return ("qlora" if cfg.get("load_in_4bit") else "lora"), rank


def _rank(given) -> int | None:
    if given is None:
        return None
    if not str(given).isdecimal() or int(str(given)) < 1:  # "8" is 8, as for Axolotl
        raise ValueError(f"lora_r = {given!r}, expected a whole number of at least 1")
    return int(str(given))
