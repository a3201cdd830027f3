"""The hooks: when Axolotl does what. No arithmetic here; the stages do the work."""

from __future__ import annotations

from axolotl.integrations.base import AdapterCapabilities, BasePlugin, PluginManager

from .host import patches, settings
from .host.run import Run


class LokiPlugin(BasePlugin):
    """LoKI in Axolotl: analyses after model load, constrains after adapter load."""

    def __init__(self):
        super().__init__()
        self._run: Run | None = None

    def register(self, cfg):
        """Before validation: check the `loki:` block and rewrite the carrier keys."""
        if not self._acts_on(cfg):
            return
        patches.show_log()
        settings.LOG.info("\n".join(settings.prepare(cfg)))
        if cfg.get("merge_lora"):
            patches.take_over_merge()

    def _acts_on(self, cfg) -> bool:
        """Axolotl's plugin manager outlives a run and calls every plugin it ever loaded.

        Act only for configurations that list us, and once if they do under two names.
        """
        known = PluginManager.get_instance().plugins.items()
        listed = [p for n, p in known if n in (cfg.get("plugins") or [])]
        return next((p for p in listed if isinstance(p, LokiPlugin)), None) is self

    def get_input_args(self):
        # Axolotl makes one class of all plugins' arguments; a base must not stand there twice.
        known = PluginManager.get_instance().plugins.values()
        first = next(p for p in known if isinstance(p, LokiPlugin))
        return "loki_plugin.args.LokiArgs" if first is self else None

    def get_adapter_capabilities(self):
        return [AdapterCapabilities(name="loki", lora_like=True)]

    def load_datasets(self, cfg, preprocess=False):
        """The first hook after validation; Axolotl puts CPU rank r on a device called `r`."""
        if self._acts_on(cfg) and str(cfg.device) == "cpu":
            cfg.device_map = {"": "cpu"}

    def post_model_build(self, cfg, model):
        """The base model is in memory, maybe quantised, before adapters: find the rows."""
        if not self._acts_on(cfg):
            return
        self._run = Run.start(cfg, model)
        self._run.apply_to(cfg, model)

    def post_lora_load(self, cfg, model):
        if self._acts_on(cfg):
            self._run.install(model, fresh=not cfg.lora_model_dir)

    def post_trainer_create(self, cfg, trainer):
        """The optimizer phase."""
        if self._acts_on(cfg):
            self._run.prepare_trainer(cfg, trainer)

    def post_train(self, cfg, model):
        """Fires twice in 0.19: before Axolotl saves the adapter, and after it."""
        if self._acts_on(cfg):
            self._run.finish(cfg, model)
