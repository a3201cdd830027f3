"""An Axolotl plugin that lets 16-bit runs through on a CPU, which Axolotl keeps for GPUs.

Where there is a GPU, they run on it.
"""

import torch
from axolotl.integrations.base import BasePlugin


class OnCpu(BasePlugin):
    def get_training_args(self, cfg):
        return {"use_cpu": not torch.cuda.is_available()}


class WithoutAutocast(BasePlugin):
    """The model is in bf16, and so is all it computes: Axolotl has no key for that."""

    def get_training_args(self, cfg):
        return {"use_cpu": not torch.cuda.is_available(), "bf16": False}
