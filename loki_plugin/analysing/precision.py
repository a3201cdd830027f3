"""Whether products of float32 are float32: PyTorch may be told to round them to TF32 or bfloat16.

`torch.get_float32_matmul_precision` raises once the newer setting, one for each backend, has been
used (`TrainingArguments(tf32=True)` does), so each backend is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
_CONVOLUTIONS = (torch.backends.cudnn.conv, torch.backends.mkldnn.conv)
_FULL = ("ieee", "none")  # "none": not set, which is full


def products_are_exact() -> bool:
    """Whether a product of float32 matrices is rounded to float32 only, on GPU and CPU."""
    return all(backend.fp32_precision in _FULL for backend in _PRODUCTS)


@contextmanager
def exact_products() -> Iterator[None]:
    """For the duration, products and convolutions of float32 in float32."""
    backends = (*_PRODUCTS, *_CONVOLUTIONS)
    found = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, found, strict=True):
            backend.fp32_precision = precision
