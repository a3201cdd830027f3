"""Ways to spread a model over GPUs that are refused, and what to do instead."""

from __future__ import annotations

import os

from torch import nn

from .. import ranks
from ..args import ProtectArgs
from ..model.loading import is_loaded

_INSTEAD = (
    "DDP (several GPUs and neither `fsdp` nor `deepspeed`), with `load_in_4bit: true` where the"
    " base does not fit on one GPU"
)
# Keys that spread a model or its optimizer over processes; one process alone needs none of them.
SPREADING = (
    "fsdp",
    "fsdp_config",
    "fsdp_version",
    "fsdp_final_state_dict_type",
    "deepspeed",
    "ddp",
    "dp_shard_size",
    "dp_replicate_size",
    "context_parallel_size",
    "use_ray",
)
_PATIENCE = 6 * 3600  # seconds


# What was proved under FSDP2, on CPU ranks, stands in docs/ways.md; all else is refused.
_NOT_WITH_FSDP2 = {
    "fsdp": "the settings of FSDP2 stand in `fsdp_config`",
    "load_in_4bit": "only 16/32-bit bases were proved under FSDP2",
    "load_in_8bit": "only 16/32-bit bases were proved under FSDP2",
    "rl": "preferences were not proved under FSDP2",
    "context_parallel_size": "it was not proved under FSDP2",
    "dp_replicate_size": "it was not proved under FSDP2",
    "expert_parallel_size": "it was not proved under FSDP2",
    "fp32_norms": "it was not proved under FSDP2",
    "torch_compile": "it was not proved under FSDP2",
    "load_best_model_at_end": "loading a checkpoint was not proved under FSDP2",
    "early_stopping_patience": "loading the best checkpoint was not proved under FSDP2",
}
_NOT_IN_FSDP_CONFIG = {
    "activation_checkpointing": "use `gradient_checkpointing: true`",
    "offload_params": "it was not proved",
    "mixed_precision_policy": "it was not proved; `bf16: true` sets one",
}
_IN_FSDP_CONFIG = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "cpu_ram_efficient_loading": True,
    "reshard_after_forward": True,
}


def is_fsdp2(cfg) -> bool:
    """Whether a configuration, validated or not, asks for FSDP2."""
    given = _fsdp_config(cfg)
    version = cfg.get("fsdp_version") or given.get("fsdp_version") or given.get("version")
    return bool(given) and str(version) == "2"


def fsdp_faults(cfg, protect: ProtectArgs) -> list[str]:
    """One line for each setting that asks for FSDP1, or under FSDP2 for what was not proved.

    FSDP1 hides the parameters from the check of what trains.

    Args:
        protect: of the `loki:` block.
    """
    if not is_fsdp2(cfg):
        return [
            f"  {key}: FSDP1 hides what trains; use `fsdp_version: 2` with a 16/32-bit base, or"
            f" {_INSTEAD}"
            for key in ("fsdp", "fsdp_config")
            if cfg.get(key)
        ]
    given = _fsdp_config(cfg)
    sizes = ("context_parallel_size", "dp_replicate_size", "expert_parallel_size")
    faults = [
        f"  {key}: {why}"
        for key, why in _NOT_WITH_FSDP2.items()
        if cfg.get(key) and not (key in sizes and cfg[key] == 1)
    ]
    faults += [
        f"  fsdp_config.{k}: {why}" for k, why in _NOT_IN_FSDP_CONFIG.items() if given.get(k)
    ]
    faults += [
        f"  fsdp_config.{key}: FSDP2 was proved with {value} only, got {given.get(key)}"
        for key, value in _IN_FSDP_CONFIG.items()
        if given.get(key) != value
    ]
    checkpointing = cfg.get("gradient_checkpointing")
    if checkpointing and checkpointing is not True:
        faults.append(f"  gradient_checkpointing: {checkpointing} was not proved under FSDP2")
    kwargs = cfg.get("gradient_checkpointing_kwargs") or {}
    if protect.anchor and checkpointing and kwargs.get("use_reentrant") is not False:
        # Measured: with reentrant checkpoints the gradient of the first pass is lost.
        faults.append(
            "  loki.protect.anchor: under FSDP2 gradient checkpointing must not be reentrant, for"
            " the anchor is a second pass; set"
            " `gradient_checkpointing_kwargs: {use_reentrant: false}`"
        )
    if protect.soft:
        faults.append("  loki.protect.soft: soft directions were not proved under FSDP2")
    saves = cfg.get("save_steps") or cfg.get("saves_per_epoch") or cfg.get("save_strategy") != "no"
    if saves and not cfg.get("save_only_model"):
        faults.append(
            "  save_strategy: resuming was not proved under FSDP2; set `save_only_model: true`, and"
            " checkpoints hold the adapter alone, or `save_strategy: 'no'`"
        )
    if not _saver_is_known():
        faults.append("  fsdp_version: this version of Axolotl saves FSDP2 adapters in another way")
    return faults


def check_starts_afresh(cfg) -> None:
    """Check, before a training, that an FSDP2 run goes on from nothing.

    Raises:
        ValueError: it would load an adapter or a checkpoint into a sharded model.
    """
    keys = ("lora_model_dir", "resume_from_checkpoint", "auto_resume_from_checkpoints")
    given = [key for key in keys if cfg.get(key)]
    if is_fsdp2(cfg) and given:
        raise ValueError(
            f"{', '.join(given)}: going on from an adapter or a checkpoint was not proved under"
            f" FSDP2; start afresh, merge the adapter and train on the merged model, or use"
            f" {_INSTEAD}"
        )


def _saver_is_known() -> bool:
    try:
        from axolotl.integrations.expert_parallel import shard
    except ImportError:
        return False
    return hasattr(shard, "save_fsdp2_lora_adapter")


def _fsdp_config(cfg) -> dict:
    given = cfg.get("fsdp_config") or {}
    if not isinstance(given, dict):
        raise ValueError(f"`fsdp_config:` must be a block of settings, got {given!r}")
    # Axolotl still takes keys with the prefix.
    return {k if k == "fsdp_version" else k.removeprefix("fsdp_"): v for k, v in given.items()}


def zero_faults(deepspeed: dict) -> list[str]:
    """One line where a DeepSpeed configuration asks for ZeRO-3."""
    if (deepspeed.get("zero_optimization") or {}).get("stage") != 3:
        return []
    return [f"  deepspeed: ZeRO-3 shards the base; use ZeRO-1 or 2, or {_INSTEAD}"]


def meet() -> None:
    """Let the ranks of one run talk before rows and directions are chosen, of which all need one.

    Axolotl starts their process group at this point for sharded runs only; under DDP the trainer
    would start it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The others wait for the rank that analyses; half an hour would be Axolotl's limit, and
        # `ddp_timeout` has set this already where the YAML has it.
        os.environ.setdefault("AXOLOTL_NCCL_TIMEOUT", str(_PATIENCE))
        from axolotl.utils.distributed import init_distributed_state

        init_distributed_state()


def check_anchor(cfg, protect: ProtectArgs) -> None:
    """Check, where several processes train, that the anchor's second pass can be differentiated.

    DDP counts the gradients of each parameter, and a reentrant checkpoint delivers them once for
    each pass: PyTorch ends such a step with "marked as ready twice". `fsdp_faults` has FSDP2's.

    Raises:
        ValueError: reentrant gradient checkpoints, Axolotl's default, beside an anchor.
    """
    kwargs = cfg.get("gradient_checkpointing_kwargs") or {}
    reentrant = cfg.get("gradient_checkpointing") and kwargs.get("use_reentrant") is not False
    if ranks.count() > 1 and protect.anchor and reentrant:
        raise ValueError(
            "loki.protect.anchor: with several processes gradient checkpointing must not be"
            " reentrant, for the anchor is a second pass; set"
            " `gradient_checkpointing_kwargs: {use_reentrant: false}`"
        )


def check_loaded(model: nn.Module, sharded: bool = False) -> None:
    """Check, on every rank together, that each holds the whole base.

    Args:
        sharded: by FSDP2, whose first rank alone holds it; the others get their parts of it later.

    Raises:
        ValueError: on a rank without weights; RuntimeError on all others.
    """
    with ranks.together():
        must_hold = ranks.is_first() or not sharded
        if ranks.count() > 1 and must_hold and not is_loaded(model):
            raise ValueError(
                f"rank {ranks.current()} holds none of the base's weights: something shards the"
                " model (ACCELERATE_USE_FSDP, FSDP_CPU_RAM_EFFICIENT_LOADING, ZeRO-3). Use"
                f" {_INSTEAD}"
            )
