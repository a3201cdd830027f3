"""An Axolotl plugin that lets 16-bit runs through on a CPU, which Axolotl keeps for GPUs."""

from axolotl.integrations.base import BasePlugin


class OnCpu(BasePlugin):
    def get_training_args(self, cfg):
        return {"use_cpu": True}


class WithoutAutocast(BasePlugin):
    """The model is in bf16, and so is all it computes: Axolotl has no key for that."""

    def get_training_args(self, cfg):
        return {"use_cpu": True, "bf16": False}
