"""One step of training an implanted model, as Axolotl runs it: checkpoints, autocast, AdamW."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

PREFIX = "base_model.model."  # PEFT's

# `attend` trains as one kernel each way, which keeps its inputs and its answer.
torch.library.define(
    "fake_cuda::attend_back", "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor o) -> Tensor[]"
)


@torch.library.register_fake("fake_cuda::attend_back")
def _(g, q, k, v, o):
    return [torch.empty_like(x) for x in (q, k, v)]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output)


def _back(ctx, grad):
    return *torch.ops.fake_cuda.attend_back(grad, *ctx.saved_tensors), None


@contextmanager
def one_kernel_attention():
    """Attention as `attend` in the device's own thread too, which knows no function modes."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        return torch.ops.fake_cuda.attend(q, k, v, attn_mask)

    torch.nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain


def pretend_training() -> None:
    """Let mixed precision and bitsandbytes' optimizers believe in the GPU."""
    torch.library.register_autograd("fake_cuda::attend", _back, setup_context=_keep)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.synchronize = lambda *_: None


def implanted(
    model: nn.Module,
    empty: nn.Module,
    quota: int,
    rank: int | None,
    dtype: str,
    protect: dict[str, Any],
    targets: str,
):
    """`implant`, with the adapter in `dtype` and as many directions as `protect` asks for."""
    from loki_plugin import RowSelection, implant
    from loki_plugin.blocks import ProtectArgs
    from loki_plugin.estimating.reading import direction_counts, reads
    from loki_plugin.implanting.adapter import constrained_modules
    from loki_plugin.model.anatomy import find_anatomy
    from loki_plugin.model.linears import chosen
    from loki_plugin.protecting.fixing import FixedA, low_rank
    from loki_plugin.protecting.installing import protected_modules
    from loki_plugin.protecting.packed import BYTES, WIDE
    from loki_plugin.protecting.reading import ProtectedA

    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    with _disable_current_modes():  # rows are read on the host
        rows = [torch.arange(hidden * quota // 100) for _ in range(layers)]
        linears = chosen(empty, find_anatomy(empty), targets)
        selection = RowSelection(rows, hidden, linears=linears)
        inputs = reads(empty, find_anatomy(empty), targets)
    model.enable_input_require_grads()
    # Made on the device at once: PyTorch does not move fake parameters that somebody looks at.
    stays = mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with torch.device("cuda:0"), stays:
        tuned = implant(model, selection, rank)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    asked = ProtectArgs(**protect)
    still = low_rank(tuned) if asked.freeze_a else {}
    for module in still.values():
        module.lora_A["default"] = FixedA(module.lora_A["default"].weight.detach())
    inputs = [each for each in inputs if each.linears[0][0] not in still]
    counts, itemsize = direction_counts(
        asked, [each.size for each in inputs], int(1e9 * (asked.memory or 1))
    )
    kind = torch.float32 if itemsize == 4 else torch.bfloat16
    with _disable_current_modes():  # `protect_inputs` looks at values
        for each, count in zip(inputs, counts, strict=True) if protect else []:
            basis = torch.zeros(each.size, count, dtype=kind)
            if itemsize == BYTES:  # the first columns are no numbers of 8 bits
                basis[0, : count // WIDE], basis[1, : count // WIDE] = 0.5, 0.0005
            for name, _ in each.linears:
                module = tuned.get_submodule(f"{PREFIX}{name}")
                module.lora_A["default"] = ProtectedA(module.lora_A["default"].weight, basis)
    # What a first step brings to the device, once.
    for _, module in constrained_modules(tuned):
        module.placed(torch.device("cuda:0"))
    for _, module in protected_modules(tuned):
        module.placed(torch.device("cuda:0"))
    return tuned


def optimizer_of(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """AdamW with its states made, as they are from the second step on."""
    ours = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw_torch":
        # Its steps stay on the device, where a fake tensor need not be read.
        optimizer = torch.optim.AdamW(ours, foreach=True, capturable=True)
        for p in ours:
            state = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.ones((), device="cuda:0"), **state}
        return optimizer
    import bitsandbytes as bnb

    optimizer = bnb.optim.AdamW8bit(ours)
    for i, p in enumerate(ours):
        optimizer.init_state(optimizer.param_groups[0], p, 0, i)
    return optimizer


def states_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Without counters, and without bitsandbytes' tables, which all of them share."""
    tensors = [
        x
        for s in optimizer.state.values()
        for key, x in s.items()
        if key != "step" and "qmap" not in key
    ]
    return [x for x in tensors if isinstance(x, torch.Tensor) and x.device.type == "cuda"]


def train_step(
    model: nn.Module,
    empty: nn.Module,
    meter,
    resident: list[torch.Tensor],
    length: int,
    quota: int = 10,
    rank: int | None = None,
    dtype: str = "bfloat16",
    optimizer: str = "adamw_bnb_8bit",
    protect: dict[str, Any] | None = None,
    targets: str = "down",
    batch: int = 1,
    checkpointing: bool = True,
    anchor: int = 0,
    known: bool = False,
) -> dict[str, Any]:
    """Forward, backward and optimizer step on [batch, length] tokens, under the meter.

    `anchor`: tokens of each of two anchor texts; `known`: whether the base was asked about them.
    `resident`: what the model holds before it is implanted; `empty`: the same model on the meta
    device, for the estimate.
    """
    from loki_plugin.estimating.base import Stored
    from loki_plugin.estimating.planned import Planned
    from loki_plugin.protecting.anchor import Anchor
    from loki_plugin.protecting.packed import Packed

    base, bits = _bytes(resident), 4 if "4bit" in _first_linear(model) else 0
    run = Planned(
        Stored(torch.bfloat16, bits), batch, length, 1, checkpointing, optimizer,
        getattr(torch, dtype),
    )  # fmt: skip
    with _disable_current_modes():
        predicted = estimated(empty, run, quota, rank, protect or {}, targets, anchor, known)
    tuned = implanted(model, empty, quota, rank, dtype, protect or {}, targets)
    if checkpointing:
        options = {"use_reentrant": True, "preserve_rng_state": False}  # nothing is random here
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    tuned.train()
    steps = optimizer_of(tuned, optimizer)
    ours = [p for p in tuned.parameters() if p.requires_grad]
    states = states_of(steps)
    ids = torch.zeros(batch, length, dtype=torch.long, device="cuda:0")
    anchored = Anchor([[1] * anchor] * 2, 1.0, 2) if anchor else None
    directions = [m.directions for m in tuned.modules() if hasattr(m, "directions")]
    directions_held = [
        t for v in directions for t in (vars(v).values() if isinstance(v, Packed) else [v])
    ]
    if anchored is not None and known:
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            anchored.divergence(tuned, [0, 1])
    adapter = [p for name, p in tuned.named_parameters() if ".lora_" in name]
    held = [*resident, *tuned.buffers(), *adapter, *states, *directions_held, ids]
    with one_kernel_attention(), meter.counting(held):
        with meter.phase("forward"), torch.autocast("cuda", dtype=torch.bfloat16):
            output = tuned(input_ids=ids, labels=ids, use_cache=False)
            loss = output.loss
        with meter.phase("outputs"):  # accelerate hands them out in float32
            logits = output.logits.float()
        del output, logits
        if anchored is not None:
            with meter.phase("anchor"), torch.autocast("cuda", dtype=torch.bfloat16):
                loss = loss + anchored.divergence(tuned, [0, 1])
        with meter.phase("backward"):
            loss.backward()
        with meter.phase("step"):
            nn.utils.clip_grad_norm_(ours, 1.0)
            steps.step()
            steps.zero_grad()
    return {
        "kernels": dict(meter.kernels),
        "TFLOP": sum(meter.flops.values()) / 1e12,
        "peak_bytes": meter.peak,
        "peaks": dict(meter.peaks),
        "waits": dict(meter.waits),
        "base_bytes": base,
        "adapter_bytes": _bytes(adapter),
        "trained": sum(p.numel() for p in ours),
        "state_bytes": _bytes(states),
        "directions_bytes": _bytes(directions_held),
        "predicted": predicted,
    }


def estimated(
    empty: nn.Module,
    run,
    quota: int,
    rank: int | None,
    protect: dict[str, Any],
    targets: str,
    anchor: int = 0,
    known: bool = False,
):
    """What `loki estimate` says of the step."""
    from loki_plugin.args import LokiConfig
    from loki_plugin.estimating.estimate import Estimator
    from loki_plugin.estimating.work import Work
    from loki_plugin.model.anatomy import find_anatomy

    anatomy = find_anatomy(empty)
    counts = [anatomy.hidden_size * quota // 100] * anatomy.num_layers
    protect = protect | ({"anchor": 1.0, "anchor_batch": 2} if anchor else {})
    config = LokiConfig(quota=quota, rank=rank, targets=targets, protect=protect or "off")
    said = Estimator(empty, anatomy, config, counts, [anchor or 1], analysed=False)
    trained, _ = said.parameters()
    work = Work.of(empty, anatomy)
    step = said.training(run)
    fixed = step["adapter_bytes"] // run.adapter_dtype.itemsize - trained
    flops = work.training(run.tokens, run.length, trained, run.checkpointing, fixed)
    flops += said.protection_flops(run, 24) + work.anchor(2 * anchor, new=not known)
    return step | {"TFLOP": flops / 1e12}


def _first_linear(model: nn.Module) -> str:
    return type(model.model.layers[0].mlp.down_proj).__name__


def _bytes(tensors: list[torch.Tensor]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
