"""Am I the first, how many are we, tell everyone: the one place that asks `torch.distributed`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


def current() -> int:
    """This process's rank: 0 where it is alone."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))  # launched, but the process group is still to come


def count() -> int:
    """How many processes run together; 1 until the process group stands."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes what is to be written once."""
    return current() == 0


def gather(value: Any) -> list:
    """The value of every rank, in order of rank, on every rank."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any, source: int = 0) -> Any:
    """`value` of the rank `source`, on every rank."""
    if count() == 1:
        return value
    message = [value]
    dist.broadcast_object_list(message, src=source)
    return message[0]


@contextmanager
def together() -> Iterator[None]:
    """Run a block on every rank; an error on one of them ends all, none is left waiting.

    The block holds no exchange of its own, or only such that every rank leaves with the same
    outcome. It ends when every rank is through.

    Raises:
        RuntimeError: on the ranks that went through, naming the rank that did not and its error.
    """
    mine = None
    try:
        yield
    except Exception as error:  # raised again below, when the others know
        mine = error
    faults = gather(None if mine is None else f"{type(mine).__name__}: {mine}")
    if mine is not None:
        raise mine
    for rank, fault in enumerate(faults):
        if fault is not None:
            raise RuntimeError(f"rank {rank} ended with {fault}")
