"""To the device without waiting for it, and how a device says that its memory is full."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import nn


def first_device(model: nn.Module) -> torch.device:
    """Where token ids go in, and where scores come out."""
    return model.get_input_embeddings().weight.device


def send(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor on `device`; the host does not wait for the copy."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class Copies:
    """Values that the host knows, copied once to every device (and dtype) that asks for them."""

    def __init__(self, values: Sequence[int] | Sequence[float]):
        self.values = tuple(values)
        self._made: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype = torch.long) -> torch.Tensor:
        """[n] on `device`."""
        if (device, dtype) not in self._made:
            self._made[device, dtype] = send(torch.tensor(self.values, dtype=dtype), device)
        return self._made[device, dtype]


def give_back() -> None:
    """Leave the memory that an analysis held to whatever comes next, as training."""
    gc.collect()  # what an exception's traceback held
    torch.cuda.empty_cache()  # does nothing where CUDA was never used


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a smaller batch may fit: PyTorch's, cuBLAS's, or the driver's."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error)
        for sign in ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
