"""What a computation holds at its peak, counted while it runs, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes of tensors that `run` makes and holds at once, what it returns included."""
    counter = _Counter()
    with counter:
        kept = run()
    del kept
    return counter.peak


class _Counter(TorchDispatchMode):
    """Counts the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _storages((args, kwargs))  # views of weights and inputs are nothing new
        out = func(*args, **kwargs)
        for key, storage in _storages(out).items():
            if key not in given and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, key)
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _storages(tensors: Any) -> dict[int, torch.UntypedStorage]:
    found = [x.untyped_storage() for x in tree_leaves(tensors) if type(x) in _PLAIN]
    return {storage._cdata: storage for storage in found}


_PLAIN = (torch.Tensor, torch.nn.Parameter)
