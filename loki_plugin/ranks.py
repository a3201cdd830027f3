"""Am I the first, how many are we, tell everyone: the one place that asks `torch.distributed`."""

from __future__ import annotations

import os
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


def wait() -> None:
    """Until every rank is here."""
    if count() > 1:
        dist.barrier()
