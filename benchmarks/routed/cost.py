"""What a training step takes for rows of routed experts: measured, predicted, for known models."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.routed.adapting import IDS, RANK, adapt, experts_of

# Where a step's memory is measured; L, E, H, I of published models, and all of their parameters.
WIDE = {
    "hidden_size": 512, "moe_intermediate_size": 512, "intermediate_size": 512, "num_experts": 32,
    "num_experts_per_tok": 2, "num_attention_heads": 8, "head_dim": 64, "num_key_value_heads": 8,
    "vocab_size": 320,
}  # fmt: skip
PUBLISHED = {
    "Qwen3-30B-A3B": (48, 128, 2048, 768, 30.5e9),
    "Mixtral-8x7B": (32, 8, 4096, 14336, 46.7e9),
    "gpt-oss-20b": (24, 32, 2880, 2880, 20.9e9),
}


class Live(TorchDispatchMode):
    """Bytes of the tensors that live at once, besides those that were there.

    Attributes:
        peak: the most.
    """

    def __init__(self, resident: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in resident}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in [t.untyped_storage() for t in tree_leaves(out) if torch.is_tensor(t)]:
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.live -= size
        self.known.discard(key)


def predicted(layers: int, checkpointed: bool, wide: bool) -> int:
    """What a step takes for experts' rows, in units of one layer's experts n = E·H·I weights.

    While a layer works ΔW stands beside W + ΔW, 2 n; where A and B are float32 and W is 16 bits,
    B·A and its scaled copy are twice as wide, 4 n. Without checkpointing every other layer keeps
    its W + ΔW for the backward pass.
    """
    return (4 if wide else 2) + (0 if checkpointed else layers - 1)


def measured(
    layers: int, dtype: torch.dtype, checkpointed: bool, autocast: bool, experts: bool
) -> float:
    """The peak of one step in units of n, with adapters on experts or on attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **WIDE, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if experts:
        tuned = adapt(model, experts_of(model))
    else:
        tuned = get_peft_model(model, LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"]))
    tuned.train().enable_input_require_grads()  # as adapters on attention do: all layers keep
    if checkpointed:
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
    with Live([*tuned.parameters(), *tuned.buffers()]) as live:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = tuned(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    n = WIDE["num_experts"] * WIDE["hidden_size"] * WIDE["moe_intermediate_size"]
    return live.peak / (n * dtype.itemsize)


def costs() -> list[dict[str, Any]]:
    """Measured against predicted."""
    rows = []
    for what, dtype, autocast in (
        ("float32", torch.float32, False),
        ("bfloat16, adapter float32", torch.bfloat16, False),
        ("the same under autocast", torch.bfloat16, True),
    ):
        for layers in (2, 4):
            for checkpointed in (True, False):
                found, without = (
                    measured(layers, dtype, checkpointed, autocast, experts)
                    for experts in (True, False)
                )
                wide = dtype != torch.float32 and not autocast
                rows.append(
                    {
                        "weights": what,
                        "layers": layers,
                        "checkpointed": "yes" if checkpointed else "no",
                        "adapters on experts, n": f"{found:.2f}",
                        "on attention, n": f"{without:.2f}",
                        "predicted for experts, n": predicted(layers, checkpointed, wide),
                    }
                )
    return rows


def published() -> list[dict[str, Any]]:
    """By formula, at quota 10 and rank 16."""
    rows = []
    for name, (layers, experts, hidden, inner, parameters) in PUBLISHED.items():
        n, k, r = experts * hidden * inner, hidden // 10, 16
        held = 3 * layers * n  # gate and up are as large as down, each
        step = [predicted(layers, checkpointed, True) for checkpointed in (True, False)]
        rows.append(
            {
                "model": name,
                "L, E, H, I": f"{layers}, {experts}, {hidden}, {inner}",
                "n in 16 bits, GB": f"{2 * n / 1e9:.2f}",
                "a step, checkpointed, GB": f"{2 * n * step[0] / 1e9:.1f}",
                "not checkpointed, GB": f"{2 * n * step[1] / 1e9:.1f}",
                "weights in 16 bits, GB": f"{2 * parameters / 1e9:.0f}",
                "with `load_in_4bit`, GB": f"{(2 * held + (parameters - held) / 2) / 1e9:.0f}",
                "all in 4 bits, GB": f"{parameters / 2e9:.0f}",
                "trained at r = 16, million": f"{layers * experts * r * (inner + k) / 1e6:.0f}",
                "dense form, million": f"{layers * experts * k * inner / 1e6:.0f}",
                "directions, a sixth of I, GB": (
                    f"{4 * layers * experts * inner * (inner // 6) / 1e9:.1f}"
                ),
            }
        )
    return rows
