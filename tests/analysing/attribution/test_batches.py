"""Batches: cut by memory, halved when it runs out, nothing lost and nothing done twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.families import tiny
from helpers.prompts import error, prompts, whole

from loki_plugin.analysing.attribution import batches
from loki_plugin.analysing.attribution.batches import attribute_many, auto_batch, plan, runs
from loki_plugin.analysing.attribution.engine import attribute_batch
from loki_plugin.analysing.attribution.measured import peak_bytes
from loki_plugin.analysing.attribution.memory import Memory
from loki_plugin.analysing.attribution.quadrature import Rule, quadrature
from loki_plugin.analysing.attribution.quiet import quiet
from loki_plugin.model.anatomy import find_anatomy


def test_batches_are_the_fewest_of_one_size_and_even():
    assert plan(8, 7) == [(0, 4), (4, 8)]
    assert plan(9, 4) == [(0, 3), (3, 6), (6, 9)]
    assert plan(3, 2) == [(0, 1), (1, 3)]
    assert plan(2, 1) == [(0, 1), (1, 2)]
    assert plan(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert plan(3, 50) == [(0, 3)]


def memory_of(family="llama", **changes):
    model = tiny(family)
    return replace(Memory.of(model, find_anatomy(model)), **changes)


def test_auto_takes_what_the_fullest_device_holds():
    memory = memory_of(places=(0, 0, 1), head=1)
    ample = dict.fromkeys((0, 1), 10**12)
    assert auto_batch(memory, ample, 40, 7, 30) == 30  # never more than there are
    for full in (0, 1):  # the head's device, or the one that only holds layers
        need = [memory.peaks(batch, 40, 7)[full] for batch in (5, 6)]
        room = int(sum(need) / 2 / batches.SHARE)
        assert auto_batch(memory, ample | {full: room}, 40, 7, 30) == 5
    assert auto_batch(memory, ample | {1: 0}, 40, 7, 30) == 1  # one alone may exceed it


def test_quantised_models_take_no_more_prompts_than_pay():
    ample = dict.fromkeys(memory_of().places, 10**15)
    assert auto_batch(memory_of(), ample, 40, 7, 200) == 200
    assert auto_batch(memory_of(matrix=1), ample, 40, 7, 200) == 16


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


def test_what_a_batch_takes_grows_with_all_that_it_depends_on():
    memory, wide = memory_of(), memory_of(itemsize=8)
    plain = memory.peak(2, 100, 7)
    assert memory.peak(3, 100, 7) > plain < memory.peak(2, 200, 7)
    assert memory.peak(2, 100, 14) > plain < wide.peak(2, 100, 7)
    assert sum(memory_of(places=(0, 1, 1), head=1).peaks(2, 100, 7).values()) > plain


def test_routed_experts_count_with_as_many_as_a_token_meets():
    shared, routed, met = 64, 32, 2
    assert memory_of("qwen2_moe").inner == (shared + met * routed,) * 3
    assert memory_of("llama").inner == (80,) * 3
    assert memory_of("glm4_moe").inner == (80, 32 + met * routed, 32 + met * routed)


def test_what_a_computation_holds_is_counted():
    x = torch.ones(1000)
    made = []

    def run():
        made.append(x + 1)  # 4,000 bytes stay
        (x + 2).sum()  # 4,000 more, for a moment
        return x.view(10, 100)  # nothing new

    assert 8000 <= peak_bytes(run) < 8100


def test_recurrent_models_run_as_many_prompts_as_one_was_measured_to_allow(monkeypatch):
    model = tiny("falcon_h1")
    anatomy, rule = find_anatomy(model), quadrature("left", 2)
    some = whole(prompts(lengths=(9,) * 6))
    seen = []

    def kernel(model, anatomy, prompts, rule):
        seen.append(len(prompts))
        return attribute_batch(model, anatomy, prompts, rule)

    with quiet(model):
        one = peak_bytes(lambda: attribute_batch(model, anatomy, some[:1], rule))
        monkeypatch.setattr(batches, "free_bytes", lambda device: int(2.5 * one / batches.SHARE))
        scores = torch.cat(list(attribute_many(model, anatomy, some, rule, kernel=kernel)))
        monkeypatch.undo()
        assert seen == [1, 2, 2, 2]
        at_once = attribute_batch(model, anatomy, some, rule)
    assert error(scores, at_once) <= 1e-5
