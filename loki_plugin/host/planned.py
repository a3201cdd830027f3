"""What of an Axolotl configuration decides memory and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..choices import SELF
from ..estimating.base import Stored
from ..estimating.planned import Planned
from .sharding import SPREADING

_FUSED_LOSSES = ("cut_cross_entropy", "liger_fused_linear_cross_entropy")
_ON_BY_DEFAULT = "CutCrossEntropyPlugin"  # the plugin, with its key or without


def planned(run: Mapping[str, Any]) -> Planned:
    """Read the YAML's keys; what is not given is as Axolotl has it.

    Raises:
        ValueError: a size that is no positive whole number.
    """
    from axolotl.utils.schemas.config import AxolotlInputConfig

    def value(key: str) -> Any:
        given = run.get(key)
        return AxolotlInputConfig.model_fields[key].default if given is None else given

    def size(key: str) -> int:
        number = value(key)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{key} = {number!r}, expected a whole number of at least 1")
        return number

    # "auto" is Axolotl's default: bf16 on every card that we name, unless fp16 is asked for.
    bf16 = run.get("bf16", AxolotlInputConfig.model_fields["bf16"].default)
    bf16 = not run.get("fp16") if bf16 == "auto" else bf16
    half = torch.bfloat16 if bf16 or run.get("bfloat16") else None
    if half is None and any(run.get(key) for key in ("fp16", "float16", "load_in_8bit")):
        half = torch.float16
    dtype = half or torch.float32
    nested = (run.get("bnb_config_kwargs") or {}).get("bnb_4bit_use_double_quant", True)
    bits = 4 if run.get("load_in_4bit") else 8 if run.get("load_in_8bit") else 0
    kept = run.get("peft_autocast_adapter_dtype") is False
    optimizer = value("optimizer")
    return Planned(
        stored=Stored(dtype, bits, nested),
        sequences=size("micro_batch_size"),
        length=size("sequence_len"),
        micro_batches=size("gradient_accumulation_steps"),
        checkpointing=bool(value("gradient_checkpointing")),
        optimizer=getattr(optimizer, "value", optimizer),
        adapter_dtype=dtype if kept else torch.float32,
        logits=not _fused_loss(run),
    )


def _fused_loss(run: Mapping[str, Any]) -> bool:
    """Whether the loss is computed without the logits of all tokens at once."""
    names = [str(plugin).rpartition(".")[2] for plugin in run.get("plugins") or []]
    if _ON_BY_DEFAULT in names and run.get("cut_cross_entropy") is None:
        return True
    return any(run.get(key) for key in _FUSED_LOSSES)


def not_counted(run: Mapping[str, Any]) -> list[str]:
    """What of a YAML changes memory or time in ways that the estimate leaves out."""
    found = []
    spread = [key for key in SPREADING if run.get(key)]
    if spread:
        found.append(f"{', '.join(spread)}: memory is that of one GPU that holds everything")
    if run.get("rl"):
        found.append(f"rl: {run['rl']}: counted as plain fine-tuning on the same number of tokens")
    moved = [key for key in ("activation_offloading", "layer_offloading") if run.get(key)]
    if moved:
        found.append(f"{', '.join(moved)}: what they move to the CPU is counted on the card")
    if run.get("quantize_moe_experts"):
        found.append("quantize_moe_experts: routed experts are counted as not quantised")
    if ((run.get("loki") or {}).get("attribution") or {}).get("path") == "sequence":
        found.append("attribution.path: sequence: counted as `token`, which is many times faster")
    protect = (run.get("loki") or {}).get("protect") or {}
    text = protect.get("text")
    if text and text != SELF and protect.get("anchor"):
        found.append(f"protect.text: {text}: the anchor is counted with calibration prompts")
    if text == SELF:
        found.append("protect.text: self: the time that the model takes to write is not counted")
    return found
