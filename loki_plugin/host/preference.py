"""Preference training (`rl:`): TRL's trainer builds the PEFT model, or adds its reference to it."""

from __future__ import annotations

from peft import PeftModel
from transformers import Trainer

from ..implanting.saved import REFERENCE

# Whose loss looks at what the reference says; TRL makes it from the model that it is given.
WITH_REFERENCE = ("dpo", "ipo", "kto", "grpo")
KNOWN = (*WITH_REFERENCE, "orpo", "simpo")


def preference_faults(cfg) -> list[str]:
    """What of a configuration's `rl:` cannot be combined with LoKI."""
    method = cfg.get("rl")
    if not method:
        return []
    if method not in KNOWN:
        return [f"  rl: {method}: loki trains preferences with {', '.join(KNOWN)}"]
    faults = []
    if method in WITH_REFERENCE and cfg.get("lora_model_dir"):
        faults.append(
            f"  lora_model_dir with rl: {method}: its reference is the base without any adapter;"
            " merge the earlier adapter and use the merged model as base_model"
        )
    if cfg.get("rl_adapter_ref_model"):
        faults.append(
            "  rl_adapter_ref_model: the base with the adapter off is the reference, bit for bit;"
            " a second copy of it is not needed"
        )
    trl = cfg.get("trl") or {}
    asynchronous = trl.get("async_prefetch") or trl.get("use_data_producer")
    if trl.get("use_vllm") and not (trl.get("vllm_lora_sync") and asynchronous):
        # Merging and unmerging rounds the base at every step; Axolotl's own way reads lora_A and
        # lora_B past what protects them.
        faults.append(
            "  trl.use_vllm: to bring the policy to vLLM, TRL merges the adapter into the base and"
            " takes it out again, which rounds the base. Set `trl.vllm_lora_sync: true` with"
            " `trl.async_prefetch: true`, which sends the adapter, or generate without vLLM"
        )
    return faults


def model_of(trainer: Trainer) -> PeftModel:
    """The PEFT model that `trainer` trains, without TRL's copy of the adapter.

    A fresh update is zero, so the base with the adapter off says what the copy would; TRL takes
    that where there is no copy. Axolotl holds the base that TRL has wrapped and saves that, under
    LoRA's inner names, which nothing loads; from now on it saves the adapter.
    """
    model = trainer.model
    if REFERENCE in model.peft_config:
        model.delete_adapter(REFERENCE)
    # Called late: installing the rows replaces the method.
    model.get_base_model().save_pretrained = lambda *a, **more: model.save_pretrained(*a, **more)
    return model
