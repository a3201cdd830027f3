"""How many prompts at once: a budget measured at start, halved when memory runs out."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from ...choices import BATCH_SIZE
from ...model.anatomy import Anatomy
from ..calibration.prompts import Prompt
from .devices import first_device, out_of_memory
from .engine import attribute_batch, shared_prefix
from .measured import peak_bytes
from .memory import Memory, largest_batch
from .quadrature import Rule
from .recurrence import has_recurrences

# Scores [B, L, H] of one batch, on the model's device.
Kernel = Callable[[nn.Module, Anatomy, Sequence[Prompt], Rule], torch.Tensor]
LOG = logging.getLogger("loki_plugin")

# On a CPU more prompts per batch stop paying once the matrices fill the cores' caches.
_CPU_BYTES = 2 << 30
# What a batch may claim of the free memory; the rest is for gaps between its tensors.
SHARE = 0.8
# A quantised weight is made whole once a batch: more prompts than this no longer pay for it less.
_MOST, _MOST_QUANTISED = 256, 16
# Neighbours with this share of their tokens in common (few-shot) run apart from others.
_ALIKE = 0.75


def free_bytes(device: torch.device) -> int:
    """What of `device` is free now; of a CPU's memory, what it pays to use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_CPU_BYTES, pages)


def runs(prompts: Sequence[Prompt]) -> list[tuple[int, int]]:
    """Cut where prompts that begin alike meet others: a batch runs what all of it shares once."""
    alike = [
        shared_prefix([a, b]) >= _ALIKE * min(len(a.ids), len(b.ids))
        for a, b in zip(prompts, prompts[1:], strict=False)
    ]
    sides = [False, *alike, False]
    cuts = [i + 1 for i, same in enumerate(alike) if not same and (sides[i] or sides[i + 2])]
    return list(zip([0, *cuts], [*cuts, len(prompts)], strict=True))


def auto_batch(
    memory: Memory, free: Mapping[torch.device, int], longest: int, steps: int, count: int
) -> int:
    """How many of `count` prompts run at once where every device has so many bytes free."""
    budgets = {place: int(SHARE * room) for place, room in free.items()}
    most = _MOST_QUANTISED if memory.matrix else _MOST
    return largest_batch(memory, budgets, longest, steps, min(most, count))


def plan(count: int, largest: int) -> list[tuple[int, int]]:
    """Cut `count` prompts into the fewest batches of about equal size: [(start, stop), ...]."""
    batches = -(-count // largest)
    cuts = [count * i // batches for i in range(batches + 1)]
    return list(zip(cuts, cuts[1:], strict=False))


def attribute_many(
    model: nn.Module,
    anatomy: Anatomy,
    prompts: Sequence[Prompt],
    rule: Rule,
    batch_size: int | str = BATCH_SIZE,
    kernel: Kernel = attribute_batch,
) -> Iterator[torch.Tensor]:
    """Scores of many prompts, in their order, batch by batch: tensors [b, L, H] on the CPU.

    `model` must be inside `quiet(model)`. Neighbours share a batch: sort prompts by length, or by
    their ids where many begin alike.
    A batch that does not fit is halved and done again; what is done stays done.

    Raises:
        RuntimeError: one prompt alone does not fit.
    """
    device = first_device(model)
    memory = Memory.of(model, anatomy)
    free = {place: free_bytes(place) for place in {*memory.places, memory.head}}
    one = 0
    if batch_size == BATCH_SIZE and has_recurrences(anatomy):
        # The formula does not know what their code holds.
        longest = max(prompts, key=lambda p: len(p.ids))
        try:
            one = peak_bytes(lambda: kernel(model, anatomy, [longest], rule))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            one = sum(free.values())  # it is told below, if it happens again

    def largest(some: Sequence[Prompt]) -> int:
        if isinstance(batch_size, int):
            return batch_size
        longest = max(len(p.ids) for p in some)
        fitting = auto_batch(memory, free, longest, rule.steps, len(some))
        return max(1, min(fitting, int(SHARE * min(free.values())) // one)) if one else fitting

    todo = [
        (start + first, start + last)
        for start, stop in runs(prompts)
        for first, last in plan(stop - start, largest(prompts[start:stop]))
    ][::-1]
    waiting = None  # one batch's scores travel to the CPU while the next one runs
    while todo:
        start, stop = todo.pop()
        try:
            scores = kernel(model, anatomy, prompts[start:stop], rule)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if stop - start == 1:
                raise RuntimeError(
                    f"one calibration prompt of {len(prompts[start].ids)} tokens does not fit into"
                    " memory; lower `calibration.max_tokens` or `attribution.steps`"
                ) from error
            scores = None
        if scores is None:  # outside the handler, whose traceback keeps the batch's tensors alive
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            middle = (start + stop) // 2
            # Every later batch is cut as small: the one that failed was planned like them.
            todo = [piece for batch in todo for piece in _cut(batch, middle - start)]
            todo += [(middle, stop), (start, middle)]
            LOG.info("loki: out of memory, going on with %d prompts at once", middle - start)
            continue
        if waiting is not None:
            yield waiting()
        waiting = _to_cpu(scores)
    if waiting is not None:
        yield waiting()


def _to_cpu(scores: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start the copy; the returned call waits for it."""
    if scores.device.type != "cuda":
        return scores.cpu
    host = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
    host.copy_(scores, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(scores.device))

    def wait() -> torch.Tensor:
        done.synchronize()
        return host

    return wait


def _cut(batch: tuple[int, int], size: int) -> list[tuple[int, int]]:
    """Pieces of at most `size` prompts, last first."""
    start, stop = batch
    return [(i, min(i + size, stop)) for i in range(start, stop, size)][::-1]
