"""Ways to spread a model over GPUs that are refused, and what to do instead."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn

from .. import ranks
from ..blocks import ProtectArgs
from ..model.loading import is_loaded
from .telling import Line

LOG = logging.getLogger("loki_plugin")
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
_UNDER_DDP = (
    "take `fsdp_version` and `fsdp_config` out and it trains under DDP, on as many GPUs as there"
    " are, each with the whole base"
)
_QUANTISED = (
    f"only 16/32-bit bases were proved under FSDP2; {_UNDER_DDP}; or set it to false, with"
    " `adapter: loki` or `lora` in place of `qlora`"
)
_NOT_PROVED = f"it was not proved under FSDP2; remove it, or {_UNDER_DDP}"
NOT_WITH_FSDP2 = {
    "fsdp": "the settings of FSDP2 stand in `fsdp_config`; remove it",
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "rl": f"preferences were not proved under FSDP2; {_UNDER_DDP}",
    "context_parallel_size": _NOT_PROVED,
    "dp_replicate_size": _NOT_PROVED,
    "expert_parallel_size": _NOT_PROVED,
    "fp32_norms": _NOT_PROVED,
    "torch_compile": _NOT_PROVED,
    "load_best_model_at_end": "loading a checkpoint was not proved under FSDP2; remove it",
    "early_stopping_patience": "loading the best checkpoint was not proved under FSDP2; remove it",
}
_NOT_IN_FSDP_CONFIG = {
    "offload_params": "it was not proved; remove it",
    "mixed_precision_policy": "it was not proved; remove it, `bf16: true` sets one",
}
_IN_FSDP_CONFIG: dict[str, str | bool] = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "cpu_ram_efficient_loading": True,
    "reshard_after_forward": True,
}
# What is set for the user, and said: keys of the YAML, and what becomes of them.
OVERRIDDEN_WITH_FSDP2 = {
    "fsdp_config": "`cpu_ram_efficient_loading` and `reshard_after_forward`, where they are not"
    " set, are true; `activation_checkpointing` becomes `gradient_checkpointing`",
    "gradient_checkpointing": "true, where `fsdp_config.activation_checkpointing` is",
    "gradient_checkpointing_kwargs": "then `{use_reentrant: false}`, where it is not set",
    "save_only_model": "true where checkpoints are saved: they hold the adapter alone",
}


def is_fsdp2(cfg) -> bool:
    """Whether a configuration, validated or not, asks for FSDP2."""
    given = _fsdp_config(cfg)
    version = cfg.get("fsdp_version") or given.get("fsdp_version") or given.get("version")
    return bool(given) and str(version) == "2"


def fsdp2_overrides(cfg) -> tuple[dict[str, Any], list[Line]]:
    """The keys that an FSDP2 run gets, as they were proved, and lines that say so.

    Where a key is set to something else, `fsdp_faults` refuses it.
    """
    changes: dict[str, Any] = {}
    given, inside, lines = _fsdp_config(cfg), dict(cfg["fsdp_config"]), []

    def told(key: str, before: Any, now: str) -> None:
        lines.append(("overrides", f"{key} = {before!r}: {now}"))

    for key in ("cpu_ram_efficient_loading", "reshard_after_forward"):
        if given.get(key) is None:
            inside[key] = True
            told(f"fsdp_config.{key}", None, "now True, as it was proved")
    if given.get("activation_checkpointing"):
        inside = {k: v for k, v in inside.items() if not k.endswith("activation_checkpointing")}
        changes["gradient_checkpointing"] = cfg.get("gradient_checkpointing") or True
        if not cfg.get("gradient_checkpointing_kwargs"):  # FSDP's own are not reentrant
            changes["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        told(
            "fsdp_config.activation_checkpointing", True,
            "now `gradient_checkpointing: true`, as it was proved",
        )  # fmt: skip
    if inside != dict(cfg["fsdp_config"]):
        changes["fsdp_config"] = inside
    if _saves(cfg) and not cfg.get("save_only_model"):
        changes["save_only_model"] = True
        why = "checkpoints hold the adapter alone, for resuming was not proved under FSDP2"
        told("save_only_model", cfg.get("save_only_model"), f"now True: {why}")
    return changes, lines


def _saves(cfg) -> bool:
    every = cfg.get("save_steps") or cfg.get("saves_per_epoch")
    return bool(every or cfg.get("save_strategy") != "no")


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
        for key, why in NOT_WITH_FSDP2.items()
        if cfg.get(key) and not (key in sizes and cfg[key] == 1)
    ]
    faults += [
        f"  fsdp_config.{k}: {why}" for k, why in _NOT_IN_FSDP_CONFIG.items() if given.get(k)
    ]
    faults += [
        f"  fsdp_config.{key}: FSDP2 was proved with {value} only, got {given.get(key)};"
        f" set it to {str(value).lower() if value is True else value}"
        for key, value in _IN_FSDP_CONFIG.items()
        if given.get(key) != value
    ]
    checkpointing = cfg.get("gradient_checkpointing")
    if checkpointing and checkpointing is not True:
        faults.append(
            f"  gradient_checkpointing: {checkpointing} was not proved under FSDP2; set true"
        )
    kwargs = cfg.get("gradient_checkpointing_kwargs") or {}
    if protect.anchor and checkpointing and kwargs.get("use_reentrant") is True:
        # Measured: with reentrant checkpoints the gradient of the first pass is lost.
        faults.append(
            "  gradient_checkpointing_kwargs: under FSDP2 checkpoints must not be reentrant, for"
            " `loki.protect`'s anchor is a second pass; set `{use_reentrant: false}`, or"
            " `protect: {auto: true, anchor: 0}`"
        )
    if not _saver_is_known():
        faults.append(
            "  fsdp_version: this version of Axolotl saves FSDP2 adapters in another way;"
            f" {_UNDER_DDP}"
        )
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
    """One line where a DeepSpeed configuration asks for ZeRO-3, or cannot be read."""
    zero = deepspeed.get("zero_optimization") or {}
    if not isinstance(zero, dict):
        return [f"  deepspeed: its `zero_optimization` must be a block of settings, got {zero!r}"]
    if zero.get("stage") != 3:
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


def let_anchor_pass(cfg, protect: ProtectArgs) -> None:
    """See to it, where gradients are reduced as they come, that the anchor's pass has one.

    DDP counts the gradients of each parameter, and a reentrant checkpoint, which is Axolotl's
    default, delivers them once for each pass: PyTorch ends such a step with "marked as ready
    twice". DeepSpeed says "already reduced", and under FSDP2 the gradient of one pass is lost, both
    on a single rank too. So checkpoints are made non-reentrant, and the log says so; what is
    computed stays the same.
    """
    alone = ranks.count() == 1 and not is_fsdp2(cfg) and not cfg.get("deepspeed")
    if alone or not protect.anchor or not cfg.get("gradient_checkpointing"):
        return
    kwargs = dict(cfg.get("gradient_checkpointing_kwargs") or {})
    if kwargs.get("use_reentrant") is not False:
        cfg["gradient_checkpointing_kwargs"] = kwargs | {"use_reentrant": False}
        LOG.info(
            "loki: gradient_checkpointing_kwargs.use_reentrant is now False: the anchor is a second"
            " pass, and gradients are reduced as they come"
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
