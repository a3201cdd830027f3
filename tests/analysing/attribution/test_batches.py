"""Batches: cut by memory, halved when it runs out, nothing lost and nothing done twice."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny
from helpers.prompts import whole

from loki_plugin.analysing.attribution import batches
from loki_plugin.analysing.attribution.batches import attribute_many, plan, runs
from loki_plugin.analysing.attribution.quadrature import Rule
from loki_plugin.model.anatomy import find_anatomy


def test_batches_fit_the_budget_and_are_even():
    assert plan("auto", [10] * 8, 75) == [(0, 4), (4, 8)]
    assert plan("auto", [10] * 9, 45) == [(0, 3), (3, 6), (6, 9)]
    assert plan("auto", [1, 2, 30], 60) == [(0, 1), (1, 3)]
    assert plan("auto", [100, 100], 60) == [(0, 1), (1, 2)]  # one alone may exceed it
    assert plan(3, [10] * 7, 0) == [(0, 2), (2, 4), (4, 7)]
    assert plan(50, [10] * 3, 0) == [(0, 3)]


def test_prompts_that_begin_alike_share_batches_with_no_others():
    head, other = torch.arange(100, 160), torch.arange(200, 260)

    def ask(head, *ends):
        return [torch.cat([head, torch.tensor([end, 1, 2])]) for end in ends]

    alone = [torch.arange(i, i + 30) for i in (1, 2, 3)]
    prompts = [*alone, *ask(head, 5, 6, 7), *ask(other, 5, 6), *alone]
    assert runs(whole(prompts)) == [(0, 3), (3, 6), (6, 8), (8, 11)]
    assert runs(whole(alone)) == [(0, 3)] and runs(whole(alone[:1])) == [(0, 1)]
    half = [torch.cat([head[:20], torch.arange(i, i + 20)]) for i in (1, 2)]
    assert runs(whole(half)) == [(0, 2)]  # the half in common is not worth smaller batches


def run(limit, error, prompts=11, batch_size=8):
    """A kernel that fails above `limit` prompts; returns results and the sizes that ran."""
    sizes = []

    def kernel(model, anatomy, prompts, rule):
        if len(prompts) > limit:
            raise error
        sizes.append(len(prompts))
        return torch.tensor([p.ids for p in prompts], dtype=torch.float)[:, :, None]

    model = tiny("llama")
    ids = [torch.tensor([i, i]) for i in range(prompts)]
    anatomy, rule = find_anatomy(model), Rule((0.0,), (1.0,))
    parts = attribute_many(model, anatomy, whole(ids), rule, batch_size, kernel)
    return torch.cat(list(parts)), sizes


@pytest.mark.parametrize("limit", [1, 2, 3, 20])
def test_out_of_memory_halves_and_goes_on(limit):
    scores, sizes = run(limit, torch.OutOfMemoryError("no"))
    assert scores[:, 0, 0].tolist() == list(range(11))
    assert sum(sizes) == 11 and max(sizes) <= limit


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["pytorch", "driver", "cublas", "cpu"],
)
def test_every_way_to_say_out_of_memory_is_understood(error):
    scores, sizes = run(2, error)
    assert scores[:, 0, 0].tolist() == list(range(11)) and max(sizes) <= 2


def test_one_prompt_that_does_not_fit_is_an_error():
    with pytest.raises(RuntimeError, match="one calibration prompt of 2 tokens does not fit"):
        run(0, torch.OutOfMemoryError("no"))


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="^shape mismatch$"):
        run(1, RuntimeError("shape mismatch"))
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        run(1, torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))


def test_the_estimate_grows_with_length_steps_and_layers():
    anatomy = find_anatomy(tiny("llama"))
    plain = batches.prompt_bytes(anatomy, 100, 7, 4)
    assert batches.prompt_bytes(anatomy, 200, 7, 4) > plain
    assert batches.prompt_bytes(anatomy, 100, 14, 4) > plain
    assert batches.prompt_bytes(anatomy, 100, 7, 2) * 2 == plain
