"""The life of one training run: its rows, its adapter, its trainer, its report."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import ranks
from ..args import LokiConfig
from ..rows import FILE_NAME, RowSelection
from .settings import parse

LOG = logging.getLogger("loki_plugin")


@dataclass
class Run:
    """One training run: its configuration, its rows, and what is reported about it."""

    config: LokiConfig
    selection: RowSelection
    facts: dict[str, Any] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)  # the base's fingerprint before training

    @classmethod
    def start(cls, cfg, model) -> Run:
        """Rows from the adapter to continue, from the rows file, or from the analysis."""
        from ..implanting.adapter import check_adaptable
        from ..model.anatomy import find_anatomy
        from ..pipeline import choose_rows

        config = parse(cfg)
        check_adaptable(find_anatomy(model), model)
        started = time.perf_counter()
        if cfg.lora_model_dir:
            selection = RowSelection.load(Path(cfg.lora_model_dir) / FILE_NAME).check(model)
            source = f"adapter {cfg.lora_model_dir}"
        elif config.rows:
            selection = RowSelection.load(config.rows).check(model)
            source = config.rows
        else:
            from axolotl.loaders import load_tokenizer

            selection = choose_rows(model, load_tokenizer(cfg), config)
            source = "analysis"
        seconds = time.perf_counter() - started
        run = cls(config, selection, {"rows_from": source, "rows_seconds": round(seconds, 3)})
        counts = selection.counts
        LOG.info(
            "loki: %s of %s rows per layer train, in %d layers (rows from %s, %.1f s)",
            counts[0] if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}",
            selection.hidden_size,
            selection.num_layers,
            source,
            seconds,
        )
        return run

    def apply_to(self, cfg, model) -> None:
        """Set the LoRA keys that Axolotl reads when it builds the adapter."""
        from ..implanting.adapter import lora_settings
        from ..model.anatomy import find_anatomy

        settings = lora_settings(
            find_anatomy(model), model, self.selection.counts, self.config.rank
        )
        cfg.lora_r = settings["r"]
        cfg.lora_alpha = settings["lora_alpha"]
        cfg.lora_rank_pattern = settings["rank_pattern"] or None
        cfg.lora_alpha_pattern = settings["alpha_pattern"] or None
        cfg.lora_target_modules = settings["target_modules"]
        cfg.lora_fan_in_fan_out = settings["fan_in_fan_out"]

    def install(self, model, fresh: bool) -> None:
        from ..implanting.adapter import install, trainable_share
        from ..model.fingerprint import fingerprint

        install(model, self.selection, self.config.rank, fresh)
        self.base = fingerprint(model)
        trainable, base = trainable_share(model)
        self.facts.update(trainable_parameters=trainable, base_parameters=base)
        LOG.info(
            "loki: %s form, %s parameters train (%.3f %% of %s)",
            "dense" if self.config.rank is None else f"rank-{self.config.rank}",
            f"{trainable:,}",
            100 * trainable / base,
            f"{base:,}",
        )

    def prepare_trainer(self, cfg, trainer) -> None:
        from ..implanting.training import prepare_trainer

        prepare_trainer(trainer, self.selection, self.config.lr_scale, _resumed_checkpoint(cfg))

    def finish(self, cfg, model) -> None:
        """Verify constraint and base weights, and write `loki_report.json`."""
        from ..implanting.adapter import check
        from ..model.fingerprint import fingerprint
        from ..reporting import write_report

        check(model)
        if any(hasattr(p, "device_mesh") for p in model.parameters()):
            LOG.info("loki: verified the adapter; the sharded base was not checksummed")
        else:
            after = fingerprint(model)
            # Training cannot reach packed weights, but evaluation repacks them on some CPUs.
            exact = self.base["quantisation"].startswith("none")
            if any(after[k] != self.base[k] for k in ("identity", "weights")[: 1 + exact]):
                raise RuntimeError(
                    "weights of the base model have changed during training; the adapter belongs"
                    " to a base that no longer exists, do not use it"
                )
            LOG.info("loki: verified, nothing outside the selected rows has changed")
        if self.config.report and ranks.is_first():
            write_report(Path(cfg.output_dir), self.config, self.selection, self.facts)


def _resumed_checkpoint(cfg) -> str | None:
    from axolotl.utils.train import determine_last_checkpoint

    return determine_last_checkpoint(cfg)
