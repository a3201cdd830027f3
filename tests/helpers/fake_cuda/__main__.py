"""Dry runs of the attribution engine; started by `dry_run`."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from contextlib import nullcontext, suppress
from typing import Any

import torch
import transformers.masking_utils as masking
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from helpers.fake_cuda import LIBRARY
from helpers.fake_cuda.meter import Meter
from helpers.fake_cuda.models import llama, quantise, resident, split
from helpers.fake_cuda.training import pretend_training, train_step
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
    from loki_plugin.analysing.attribution.devices import first_device
    from loki_plugin.analysing.attribution.memory import Memory
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
    apart = engine.worth_sharing(prompts, engine.least_saving(model, first_device(model)))
    with quiet.quiet(model), meter.counting(resident(model)), meter.phase("stack"):
        scores, p = engine.integrate(model, anatomy, prompts, rule)
    return {
        "kernels": dict(meter.kernels),
        "TFLOP": sum(meter.flops.values()) / 1e12,
        "moved_GB": sum(meter.moved.values()) / 1e9,
        "peak_bytes": meter.peak,
        "peaks": dict(meter.peaks),
        "predicted": Memory.of(model, anatomy).peak(batch, length, steps, apart),
        "costs": [[*cost, often] for cost, often in meter.costs.items()],
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
    """A tiny model of a family: {family, settings, ...of `measured`}."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = FAMILIES[case.pop("family")]
    config = AutoConfig.for_model(model_type, **settings | case.pop("settings", {}))
    with torch.device("cuda:0"):
        # In sdpa where a family has it; transformers 5.24 has none for Gemma 2.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval().requires_grad_(False)
    return measured(model, steps=3, **case)


def run_llama(case: dict[str, Any]) -> dict[str, Any]:
    """A Llama of given shapes: {shape, heads, tied, dtype, nf4, devices, ...of `measured`}."""
    more = {key: case.pop(key) for key in ("heads", "tied", "dtype") if key in case}
    with torch.device("cuda:0"):
        model = llama(*case.pop("shape"), **more).requires_grad_(False)
    if case.pop("nf4", False):
        quantise(model)
    if case.pop("devices", 1) == 2:
        model = split(model)
    return measured(model, case.pop("steps", 7), **case)


def run_training(case: dict[str, Any]) -> dict[str, Any]:
    """A training step of an implanted Llama: {shape, heads, tied, nf4, ...of `train_step`}."""
    more = {key: case.pop(key) for key in ("heads", "tied") if key in case}
    shape = case.pop("shape")
    with _disable_current_modes(), torch.device("meta"):
        empty = llama(*shape, **more)
    with torch.device("cuda:0"):
        model = llama(*shape, **more).requires_grad_(False)
    if case.pop("nf4", False):
        quantise(model)
    return train_step(model, empty, METERS[-1], resident(model), **case)


class Reached(Exception):
    """The first batch was planned, and has run."""


def run_auto(case: dict[str, Any]) -> dict[str, Any]:
    """The first batch of `batch_size: auto` on a card: {shape, length, gigabytes}, in NF4."""
    from loki_plugin.analysing.attribution import batches, quiet
    from loki_plugin.analysing.attribution.quadrature import quadrature
    from loki_plugin.estimating.estimate import CONTEXT
    from loki_plugin.model.anatomy import find_anatomy

    with torch.device("cuda:0"):
        model = llama(*case["shape"]).requires_grad_(False)
    quantise(model)
    weights = resident(model)
    held = sum({t.untyped_storage()._cdata: t.nbytes for t in weights}.values())
    size = int(1e9 * case["gigabytes"])
    torch.cuda.mem_get_info = lambda *_: (size - held - CONTEXT, size)
    torch.cuda.memory_reserved = torch.cuda.memory_allocated = lambda *_: 0
    prompts = some_prompts(64, case["length"], False, 0, case["shape"][-1])
    found: dict[str, Any] = {"resident_bytes": held + CONTEXT}

    def kernel(model, anatomy, some, rule):
        with METERS[-1].counting(weights):
            batches.attribute_batch(model, anatomy, some, rule)
        found.update(batch=len(some), peak_bytes=METERS[-1].peak)
        raise Reached

    with quiet.quiet(model), suppress(Reached):
        rule = quadrature("left", 7)
        list(batches.attribute_many(model, find_anatomy(model), prompts, rule, kernel=kernel))
    return found


def run_any(case: dict[str, Any]) -> dict[str, Any]:
    """One of the others: {what, ...of it}; several kinds share a process."""
    return RUNS[case.pop("what")](case)


RUNS = {
    "any": run_any,
    "auto": run_auto,
    "family": run_family,
    "llama": run_llama,
    "training": run_training,
}
METERS: list[Meter] = []  # one for each case; the last one is counting


def main() -> None:
    pretend()
    pretend_training()
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
