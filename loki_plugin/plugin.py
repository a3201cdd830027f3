"""The hooks: when Axolotl does what. No arithmetic here; the stages do the work."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin, PluginManager

from .host import base, patches, settings
from .host.files import Files
from .host.listed import wanted
from .host.proof import Proof
from .host.run import Run, leave_alone
from .host.telling import block


class LokiPlugin(BasePlugin):
    """LoKI in Axolotl: analyses after model load, constrains after adapter load."""

    def __init__(self):
        super().__init__()
        self._before: dict[str, Any] = {}  # the keys of the configuration that we changed
        self._only_reads = False  # inference or merging: no rows are chosen, nothing trains
        self._took_over = False
        self._embeddings: list[str] | None = None
        self.files: Any = None  # Files, from `load_datasets` until they are used
        self.run: Any = None  # a Run, from `post_model_build` on
        self.proof: Any = None  # its Proof

    def register(self, cfg):
        """Before validation: check the `loki:` block and rewrite the carrier keys."""
        if not self._acts_on(cfg):
            return
        patches.show_log()
        # Validation drops the key `inference`.
        self._only_reads = bool(cfg.get("inference") or cfg.get("merge_lora"))
        self._before = settings.remember(cfg)
        lines = settings.prepare(cfg)
        if not self._only_reads:
            try:
                base.check_registered(cfg)
            except ValueError:
                settings.restore(cfg, self._before)
                raise
        if lines:
            settings.LOG.info(block("settings", lines))
        patches.mark_evaluation()
        self._took_over = bool(cfg.get("merge_lora")) and patches.take_over_merge()

    def on_config_validation_error(self, cfg):
        """Undo `register`: a rejected configuration is the caller's again."""
        if self._acts_on(cfg):
            settings.restore(cfg, self._before)
            if self._took_over:
                patches.give_back_merge()

    def _acts_on(self, cfg) -> bool:
        """Axolotl's plugin manager outlives a run and calls every plugin it ever loaded.

        Act only for configurations that list us, and once if they do under two names.
        """
        return self.of(cfg) is self

    @staticmethod
    def of(cfg) -> LokiPlugin | None:
        """The plugin that acts for a configuration; None where it does not ask for us."""
        known = PluginManager.get_instance().plugins
        names = wanted(cfg)
        found = [p for n, p in known.items() if n in names and isinstance(p, LokiPlugin)]
        return next(iter(found), None)

    def get_input_args(self):
        # Axolotl makes one class of all plugins' arguments; a base must not stand there twice.
        known = PluginManager.get_instance().plugins.values()
        first = next(p for p in known if isinstance(p, LokiPlugin))
        return "loki_plugin.args.LokiArgs" if first is self else None

    def get_adapter_capabilities(self):
        return [AdapterCapabilities(name="loki", lora_like=True)]

    def load_datasets(self, cfg, preprocess=False):
        """The first hook of `train` and `preprocess`, and of no other command."""
        if not self._acts_on(cfg):
            return
        if str(cfg.device) == "cpu":
            cfg.device_map = {"": "cpu"}  # Axolotl puts CPU rank r on a device called `r`
        if not preprocess:
            self._only_reads = False
            self.files = Files.read(cfg)

    def pre_model_load(self, cfg):
        """Faults in files show here at the latest (callers of `axolotl.train.train`)."""
        if not self._acts_on(cfg):
            return
        self.run = self.proof = None
        if self._trains() and self.files is None:
            self.files = Files.read(cfg)

    def _trains(self) -> bool:
        return not (self._only_reads or patches.evaluating())

    def post_model_build(self, cfg, model):
        """The base model is in memory, maybe quantised, before adapters: find the rows."""
        if not self._acts_on(cfg):
            return
        patches.mend_attention(model)
        if not self._trains():
            leave_alone(cfg, model)
            return
        self.run, self.files = Run.start(cfg, model, self.files), None
        self.proof = Proof(self.run)
        self.run.apply_to(cfg, model)

    def get_training_args(self, cfg):
        """Axolotl asks for these where it makes a trainer: to train, or to evaluate."""
        if self._acts_on(cfg) and self.run is None and not patches.evaluating():
            raise RuntimeError(
                "this configuration was loaded for inference or merging, but a trainer is made for"
                " it, so its rows were not chosen; load it with `load_cfg` again"
            )

    def pre_lora_load(self, cfg, model):
        """Axolotl's check of new tokens has passed; what it asked for must not be made."""
        if self._acts_on(cfg):
            self._embeddings, cfg.lora_modules_to_save = cfg.lora_modules_to_save, None

    def post_lora_load(self, cfg, model):
        if not self._acts_on(cfg):
            return
        cfg.lora_modules_to_save = self._embeddings  # the tokenizer may be loaded again
        if self.run is not None and not cfg.rl:  # with `rl:` the trainer is still to wrap it
            self.run.install(cfg, model)

    def post_model_load(self, cfg, model):
        """Since 0.20 Axolotl draws every lora_A again after `post_lora_load`."""
        if self._acts_on(cfg) and self.run is not None and not cfg.rl:
            self.run.start_at_zero(cfg, model)

    def post_trainer_create(self, cfg, trainer):
        """The optimizer phase."""
        if self._acts_on(cfg):
            self.run.prepare_trainer(cfg, trainer)

    def post_train(self, cfg, model):
        """Fires twice since 0.19: before Axolotl saves the adapter, and after it."""
        if self._acts_on(cfg):
            self.proof.finish(cfg, model)
