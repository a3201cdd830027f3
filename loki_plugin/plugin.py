"""The hooks: when Axolotl does what. No arithmetic here; the stages do the work."""

from __future__ import annotations

from pathlib import Path

from axolotl.integrations.base import AdapterCapabilities, BasePlugin

from . import carrier
from .rows import FILE_NAME


class LokiPlugin(BasePlugin):
    """LoKI in Axolotl: analyses after model load, constrains after adapter load."""

    def __init__(self):
        super().__init__()
        self._run: carrier.Run | None = None

    def register(self, cfg):
        """Before validation: check the `loki:` block and rewrite the carrier keys."""
        if not carrier.is_ours(cfg):
            return
        carrier.show_log()
        carrier.LOG.info("\n".join(carrier.prepare(cfg)))
        if cfg.get("merge_lora"):
            carrier.take_over_merge()

    def get_input_args(self):
        return "loki_plugin.args.LokiArgs"

    def get_adapter_capabilities(self):
        return [AdapterCapabilities(name="loki", lora_like=True)]

    def load_datasets(self, cfg, preprocess=False):
        """The first hook after validation; Axolotl puts CPU rank r on a device called `r`."""
        if carrier.is_ours(cfg) and str(cfg.device) == "cpu":
            cfg.device_map = {"": "cpu"}

    def post_model_build(self, cfg, model):
        """The base model is in memory, maybe quantised, before adapters: find the rows."""
        if not carrier.is_ours(cfg):
            return
        self._run = carrier.Run.start(cfg, model)
        self._run.apply_to(cfg, model)

    def post_lora_load(self, cfg, model):
        if carrier.is_ours(cfg):
            self._run.install(model, fresh=not cfg.lora_model_dir)

    def post_trainer_create(self, cfg, trainer):
        """The optimizer phase."""
        if not carrier.is_ours(cfg):
            return
        self._run.prepare_trainer(cfg, trainer)
        if trainer.is_world_process_zero():
            self._run.selection.save(Path(cfg.output_dir) / FILE_NAME)

    def post_train(self, cfg, model):
        """Fires twice in 0.19; verifying and writing the report again does no harm."""
        if carrier.is_ours(cfg):
            self._run.finish(cfg, model)
