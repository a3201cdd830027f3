"""FSDP2 through Axolotl on CPU ranks: only the device is another one, the sharding is real.

Axolotl asks for a mesh of "cuda" and puts what is not sharded on "cuda"; accelerate reads
ACCELERATE_USE_FSDP only where ranks have accelerators. Import this before Axolotl.
"""

from __future__ import annotations

import functools
import os

import torch
from accelerate import DistributedType
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState


class _Torch:
    """The module torch, but "cuda" is the CPU."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def device(*given):
        return torch.device("cpu") if given == ("cuda",) else torch.device(*given)


def install() -> None:
    build, start = ParallelismConfig.build_device_mesh, AcceleratorState.__init__

    @functools.wraps(start)
    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            # As for a GPU, see accelerate/state.py.
            self.distributed_type = DistributedType.FSDP
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    ParallelismConfig.build_device_mesh = lambda self, device: build(self, "cpu")
    AcceleratorState.__init__ = __init__
    from axolotl.monkeypatch.accelerate import fsdp2

    fsdp2.torch = _Torch()


if os.environ.get("ACCELERATE_USE_CPU") == "true":
    install()
