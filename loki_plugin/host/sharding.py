"""Ways to spread a model over GPUs that are refused, and what to do instead."""

from __future__ import annotations

from torch import nn

from .. import ranks
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


def fsdp_faults(cfg) -> list[str]:
    """One line for each setting that asks for FSDP.

    Axolotl saves an FSDP2 adapter from its parameters, not from the state dict, so lora_B would be
    missing; FSDP1 hides the parameters from the check of what trains.
    """
    return [
        f"  {key}: FSDP shards the adapter, and it would be saved without lora_B; use {_INSTEAD}"
        for key in ("fsdp", "fsdp_config")
        if cfg.get(key)
    ]


def zero_faults(deepspeed: dict) -> list[str]:
    """One line where a DeepSpeed configuration asks for ZeRO-3."""
    if (deepspeed.get("zero_optimization") or {}).get("stage") != 3:
        return []
    return [f"  deepspeed: ZeRO-3 shards the base; use ZeRO-1 or 2, or {_INSTEAD}"]


def check_loaded(model: nn.Module) -> None:
    """Check, on every rank together, that each holds the whole base.

    Raises:
        ValueError: on a rank without weights; RuntimeError on all others.
    """
    with ranks.together():
        if ranks.count() > 1 and not is_loaded(model):
            raise ValueError(
                f"rank {ranks.current()} holds none of the base's weights: something shards the"
                " model (ACCELERATE_USE_FSDP, FSDP_CPU_RAM_EFFICIENT_LOADING, ZeRO-3). Use"
                f" {_INSTEAD}"
            )
