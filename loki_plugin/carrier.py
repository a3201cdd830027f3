"""How a LoKI run travels through Axolotl: as a LoRA run whose adapter is constrained.

Imports Axolotl only inside functions that need it, and knows nothing of tensors.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .analysing.sources import check_source
from .args import LokiConfig
from .rows import FILE_NAME, RowSelection

LOG = logging.getLogger("loki_plugin")

# Keys that would train, move or scale something else than the selected rows.
REFUSED = {
    "rl": "preference training is not supported yet; use supervised data sets",
    "reward_model": "reward models are not supported yet",
    "process_reward_model": "reward models are not supported yet",
    "relora": "ReLoRA merges and restarts the adapter; LoKI keeps one",
    "peft_use_dora": "DoRA rescales every row of the weight, frozen ones too",
    "peft_use_rslora": "LoKI's scaling is always 1",
    "peft_init_lora_weights": "LoKI's update starts at zero",
    "peft_layers_to_transform": "use `loki.exclude` or a rows file to leave layers out",
    "peft_layers_pattern": "use `loki.exclude` or a rows file to leave layers out",
    "peft_layer_replication": "replicated layers have no rows of their own",
    "peft_trainable_token_indices": "it trains embeddings",
    "lora_modules_to_save": "it trains whole modules",
    "lora_rank_pattern": "LoKI sets the ranks from the rows",
    "lora_alpha_pattern": "LoKI sets the ranks from the rows",
    "loraplus_lr_ratio": "use `loki.lr_scale`",
    "unfrozen_parameters": "it trains parameters of the base model",
    "fix_untrained_tokens": "it changes embeddings of the base model",
    "gptq": "only 16/32-bit and bitsandbytes 8-bit or 4-bit bases are supported",
}
OVERRIDDEN = {
    "lora_target_modules": ["down_proj"],
    "lora_target_linear": None,
    "lora_target_parameters": None,
    "lora_dropout": 0.0,
    # The kernels read lora_B.weight past the module's forward, and so past the constraint.
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "lora_embedding_kernel": False,
}


class _ToAxolotl(logging.Handler):
    """Axolotl silences INFO of every logger that is not its own; ours speak through its."""

    def emit(self, record):
        record.name = "axolotl.loki"
        logging.getLogger("axolotl").handle(record)


def show_log() -> None:
    LOG.filters.clear()  # Axolotl's logger class adds its name filter to loggers made after it
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    if not any(isinstance(h, _ToAxolotl) for h in LOG.handlers):
        LOG.addHandler(_ToAxolotl())


def parse(cfg) -> LokiConfig:
    """The `loki:` block as a checked model.

    Raises:
        ValueError: all faults of the block at once.
    """
    block = cfg.get("loki")
    if block is None:
        block = {}
    if not isinstance(block, dict):
        raise ValueError(f"`loki:` must be a block of settings, got {block!r}")
    block = block.to_dict() if hasattr(block, "to_dict") else block
    try:
        return LokiConfig(**block)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            where = ".".join(["loki", *(str(part) for part in fault["loc"])])
            hint = ""
            if fault["type"] == "extra_forbidden":
                hint = f"; known fields: {', '.join(_fields_at(fault['loc'][:-1]))}"
            lines.append(f"  {where}: {fault['msg']} (got {fault['input']!r}){hint}")
        raise ValueError("the `loki:` block is not valid:\n" + "\n".join(lines)) from error


def _fields_at(path: tuple) -> list[str]:
    model: Any = LokiConfig
    for part in path:
        model = model.model_fields[part].annotation
    return sorted(model.model_fields)


def prepare(cfg) -> list[str]:
    """Check the run and rewrite its keys so that Axolotl builds the LoRA carrier.

    Returns the lines that say what was set and what was overridden.

    Raises:
        ValueError: a setting that contradicts LoKI, before anything is loaded.
    """
    config = parse(cfg)
    _refuse(cfg)
    adapter, rank = _adapter(cfg, config)
    lines = [f"loki: adapter '{cfg.get('adapter') or 'not set'}' runs as '{adapter}'"]
    wanted = {**OVERRIDDEN, "adapter": adapter, "lora_r": rank or 1, "lora_alpha": rank or 1}
    for key, value in wanted.items():
        given = cfg.get(key)
        if given is not None and given != value and key != "adapter":
            reason = "set from the rows" if key in ("lora_r", "lora_alpha") else f"now {value}"
            lines.append(f"loki: overrides {key} = {given!r}: {reason}")
        cfg[key] = value
    cfg["loki"] = config.model_dump(mode="json", exclude_none=True) | {"rank": rank}
    if config.rows and config.exclude:
        raise ValueError(
            "loki.rows and loki.exclude disagree: rows from a file are used as they are; give one"
        )
    if config.rows:
        RowSelection.load(config.rows)  # a bad file must fail now, not after the model is loaded
    else:
        check_source(config.calibration.source, config.calibration.columns)
    for path in config.exclude:
        RowSelection.load(path)
    return lines


def _refuse(cfg) -> None:
    faults = [f"  {key}: {why}" for key, why in REFUSED.items() if cfg.get(key)]
    if (cfg.get("peft") or {}).get("loftq_config"):
        faults.append("  peft.loftq_config: LoKI's update starts at zero")
    if faults:
        raise ValueError(
            "these settings cannot be used with loki; remove them:\n" + "\n".join(faults)
        )


def _adapter(cfg, config: LokiConfig) -> tuple[str, int | None]:
    given, rank = cfg.get("adapter"), config.rank
    if given not in (None, "loki", "lora", "qlora"):
        raise ValueError(
            f"adapter: {given} cannot be combined with plugins: [loki]; use `adapter: loki`, or"
            " `lora`/`qlora` with `lora_r` for the low-rank form"
        )
    if given in ("lora", "qlora"):
        r = cfg.get("lora_r")
        if rank is not None and r is not None and r != rank:
            raise ValueError(f"lora_r = {r} and loki.rank = {rank} disagree; give one of them")
        rank = rank if r is None else int(r)
        if rank is None:
            raise ValueError(
                f"adapter: {given} with plugins: [loki] is the low-rank form and needs `lora_r`;"
                " for the dense form write `adapter: loki`"
            )
        if given == "qlora":
            return given, rank
    return ("qlora" if cfg.get("load_in_4bit") else "lora"), rank


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
        from .anatomy import find_anatomy
        from .implanting.adapter import check_adaptable
        from .pipeline import choose_rows

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
        from .anatomy import find_anatomy
        from .implanting.adapter import lora_settings

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
        from .fingerprint import fingerprint
        from .implanting.adapter import install, trainable_share

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
        from .implanting.training import prepare_trainer

        prepare_trainer(trainer, self.selection, self.config.lr_scale, _resumed_checkpoint(cfg))

    def finish(self, cfg, model) -> None:
        """Verify constraint and base weights, and write `loki_report.json`."""
        from .fingerprint import fingerprint
        from .implanting.adapter import check
        from .reporting import write_report

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
        if self.config.report and int(os.environ.get("RANK", "0")) == 0:
            write_report(Path(cfg.output_dir), self.config, self.selection, self.facts)


def _resumed_checkpoint(cfg) -> str | None:
    from axolotl.utils.train import determine_last_checkpoint

    return determine_last_checkpoint(cfg)


def take_over_merge() -> None:
    """`axolotl merge-lora` on a LoKI run uses our merge.

    Axolotl's default method round-trips every matrix of a 4-bit run through NF4, and its legacy
    method rounds the whole base to `torch_dtype`: both change frozen rows.
    """
    from axolotl.cli import merge_lora

    original = merge_lora.do_merge_lora
    if getattr(original, "merges_loki", False):
        return

    def do_merge_lora(*, cfg):
        if cfg.loki is None:
            return original(cfg=cfg)
        from .implanting.merge import merge_adapter

        adapter = Path(cfg.lora_model_dir)
        LOG.info("loki: merging %s shard by shard; frozen rows keep their bytes", adapter)
        merge_adapter(
            cfg.base_model,
            adapter,
            Path(cfg.output_dir) / "merged",
            RowSelection.load(adapter / FILE_NAME),
        )

    do_merge_lora.merges_loki = True
    merge_lora.do_merge_lora = do_merge_lora
