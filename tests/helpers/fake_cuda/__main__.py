"""Dry runs of the attribution engine; started by `dry_run`."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from contextlib import nullcontext
from typing import Any

import torch
import transformers.masking_utils as masking
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from helpers.fake_cuda import LIBRARY
from helpers.fake_cuda.meter import Meter
from helpers.families import FAMILIES

ctypes.CDLL(os.environ[LIBRARY]).install()


# `scaled_dot_product_attention` would take its CPU form on a fake tensor; on CUDA it is one kernel.
torch.library.define("fake_cuda::attend", "(Tensor q, Tensor k, Tensor v, Tensor? mask) -> Tensor")


@torch.library.register_fake("fake_cuda::attend")
def _(q, k, v, mask):
    return torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)


class Attend(TorchFunctionMode):
    """`scaled_dot_product_attention` as one kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        if not kwargs.get("enable_gqa") and k.shape[1] not in (1, q.shape[1]):
            raise ValueError(f"{q.shape[1]} query heads on {k.shape[1]} key heads")
        return torch.ops.fake_cuda.attend(q, k, v, attn_mask)


def _never_runs(*args, **kwargs):
    raise AssertionError("a fake tensor needs no kernel")


# Without a CUDA kernel of its own, autograd would take an operation apart as CUDA never does.
_kernels = torch.library.Library("aten", "IMPL", "CUDA")
for name in ("silu_backward", "_fused_rms_norm", "_fused_rms_norm_backward"):
    _kernels.impl(name, _never_runs)


def pretend() -> None:
    """Let PyTorch and transformers take the branches that they take on a GPU."""
    masking.is_tracing = lambda *_: False
    torch.cuda.get_device_capability = lambda *_: (9, 0)

    def pin_memory(tensor):
        tensor.pinned = True
        return tensor

    torch.Tensor.pin_memory = pin_memory


def llama(layers, hidden, intermediate, kv_heads, head_size, vocabulary):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head_size,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM._from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()


def quantise(model: nn.Module) -> None:
    """The layers' linears as bitsandbytes keeps them in NF4 with nested scales."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState
    from torch.utils._python_dispatch import _disable_current_modes

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="cuda:0")

    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if not isinstance(linear, nn.Linear):
                continue
            outputs, inputs = linear.weight.shape
            count = outputs * inputs
            with _disable_current_modes():  # bitsandbytes' own parameter class cannot be fake
                small = bnb.nn.Linear4bit(64, 64, False, torch.bfloat16, quant_type="nf4")
            small.in_features, small.out_features = inputs, outputs
            nested = QuantState(
                absmax=empty(count // 64 // 256), code=empty(256), blocksize=256,
                dtype=torch.float32,
            )  # fmt: skip
            weight = nn.Parameter(empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
            weight.quant_state = QuantState(
                absmax=empty(count // 64, dtype=torch.uint8), shape=torch.Size((outputs, inputs)),
                code=empty(16), blocksize=64, quant_type="nf4", dtype=torch.bfloat16,
                offset=empty(()), state2=nested,
            )  # fmt: skip
            del small._parameters["weight"]
            small.register_parameter("weight", weight)
            layer.set_submodule(name, small)


def split(model: nn.Module) -> nn.Module:
    """The upper half of the layers and the head on a second device, by accelerate, as users do."""
    from accelerate import dispatch_model

    half = len(model.model.layers) // 2
    place = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    place |= {f"model.layers.{i}": int(i >= half) for i in range(len(model.model.layers))}
    for name, device in place.items():
        for module in model.get_submodule(name).modules():
            for key, value in module._parameters.items():
                if value is not None:
                    there = torch.empty_like(value, device=f"cuda:{device}")
                    module._parameters[key] = nn.Parameter(there, requires_grad=False)
            for key, value in module._buffers.items():
                if value is not None:
                    module._buffers[key] = torch.empty_like(value, device=f"cuda:{device}")
    return dispatch_model(model, place, main_device=0, force_hooks=True)


def resident(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and what quantised weights keep beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            nested = state.state2
            tensors += [state.absmax, state.code, state.offset, nested.absmax, nested.code]
    return tensors


def some_prompts(batch: int, length: int, ragged: bool, shared: int, vocabulary: int):
    from loki_plugin.analysing.calibration.prompts import Prompt

    head = tuple(t % vocabulary for t in range(shared))
    lengths = [length - (3 * b % 40 if ragged else 0) for b in range(batch)]
    return [Prompt((*head, *((b + 1) % vocabulary,) * (n - shared))) for b, n in enumerate(lengths)]


def measured(
    model: nn.Module,
    steps: int,
    batch: int,
    length: int,
    ragged: bool = False,
    shared: int = 0,
    check: bool = False,
) -> dict[str, Any]:
    """One batch under the meter; with `check`, what runs beside the batches too, uncounted."""
    from loki_plugin.analysing.analysis import convergence
    from loki_plugin.analysing.attribution import engine, quiet
    from loki_plugin.analysing.attribution.checking import check_reproduces
    from loki_plugin.analysing.attribution.quadrature import quadrature
    from loki_plugin.analysing.attribution.sequence import attribute_sequences
    from loki_plugin.model.anatomy import find_anatomy

    anatomy = find_anatomy(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = some_prompts(batch, length, ragged, shared, vocabulary)
    rule, meter = quadrature("left", steps), METERS[-1]
    if check:
        with quiet.quiet(model) as own_attention:
            check_reproduces(model, anatomy, prompts[0], own_attention)
            attribute_sequences(model, anatomy, prompts[:1], rule)
        convergence(model, anatomy, prompts[:1], rule)
    with quiet.quiet(model), meter.counting(resident(model)), meter.phase("stack"):
        scores, p = engine.integrate(model, anatomy, prompts, rule)
    return {
        "kernels": dict(meter.kernels),
        "TFLOP": sum(meter.flops.values()) / 1e12,
        "moved_GB": sum(meter.moved.values()) / 1e9,
        "peak_bytes": meter.peak,
        "operations": dict(meter.operations.most_common()),
        "waits": dict(meter.waits),
        "scores": [list(scores.shape), str(scores.dtype), str(scores.device)],
        "p": [list(p.shape), str(p.device)],
    }


def name_phases() -> None:
    """Count the parts of the engine apart, until the process ends."""
    from loki_plugin.analysing.attribution import engine, stack

    for owner, name, phase in (
        (engine, "run_prefix", "prefix"),
        (stack, "replay", "replay"),
        (engine, "resolve_targets", "head"),
        (engine, "head_gradient", "head"),
        (torch.autograd, "grad", "backward"),
    ):
        setattr(owner, name, _as_phase(getattr(owner, name), phase))


def _as_phase(function, phase: str):
    def wrapped(*args, **kwargs):
        # The head's small backwards stay the head's.
        with nullcontext() if METERS[-1].within("head") else METERS[-1].phase(phase):
            return function(*args, **kwargs)

    return wrapped


def run_family(case: dict[str, Any]) -> dict[str, Any]:
    """A tiny model of a family: {family, ...of `measured`}."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = FAMILIES[case.pop("family")]
    config = AutoConfig.for_model(model_type, **settings)
    with torch.device("cuda:0"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    model.eval().requires_grad_(False)
    return measured(model, steps=3, **case)


def run_llama(case: dict[str, Any]) -> dict[str, Any]:
    """A Llama of given shapes: {shape: [...], nf4, devices, ...of `measured`}."""
    with torch.device("cuda:0"):
        model = llama(*case.pop("shape")).requires_grad_(False)
    if case.pop("nf4", False):
        quantise(model)
    if case.pop("devices", 1) == 2:
        model = split(model)
    return measured(model, steps=7, **case)


RUNS = {"family": run_family, "llama": run_llama}
METERS: list[Meter] = []  # one for each case; the last one is counting


def main() -> None:
    pretend()
    name_phases()
    results = []
    for case in json.load(sys.stdin):
        METERS.append(Meter())
        with Attend(), FakeTensorMode(allow_non_fake_inputs=True), METERS[-1]:
            try:
                results.append(RUNS[sys.argv[1]](case))
            except Exception as error:  # told to the test, which says what it expected
                results.append({"error": f"{type(error).__name__}: {error}"})
                traceback.print_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
