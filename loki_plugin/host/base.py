"""Can the rows be merged into the base checkpoint? Asked before hours of training, not after."""

from __future__ import annotations

import logging
from pathlib import Path

LOG = logging.getLogger("loki_plugin")


def check_base(cfg, downloaded: bool = False) -> None:
    """Refuse a base checkpoint whose stored weights no rows can be merged into.

    Of a model on the hub only the configuration is looked at until it is `downloaded`.

    Raises:
        ValueError: a base quantised by anything but bitsandbytes; one without safetensors; one
            whose down-projections are not found among its tensors.
    """
    from axolotl.loaders.utils import load_model_config

    quantisation = getattr(load_model_config(cfg), "quantization_config", None) or {}
    if not isinstance(quantisation, dict):
        quantisation = quantisation.to_dict()
    method = quantisation.get("quant_method")
    method = getattr(method, "value", method)
    if quantisation and method != "bitsandbytes":
        raise ValueError(
            f"base_model '{cfg.base_model}' is quantised with '{method}': rows cannot be merged"
            " into it. Train on the 16-bit model that it was made from, with `load_in_4bit: true`"
            " or `load_in_8bit: true` where memory is short"
        )
    if quantisation:
        LOG.warning(
            "loki: '%s' is stored quantised; merging will need the 16-bit model that it was made"
            " from",
            cfg.base_model,
        )
    elif downloaded or Path(cfg.base_model).is_dir():
        check_stored(cfg)


def check_stored(cfg) -> None:
    """The part of `check_base` that needs the checkpoint's files, which must be here by now."""
    from dataclasses import replace

    from ..implanting.checkpoint import Base, open_checkpoint

    folder = _folder(cfg)
    if folder is None:
        return
    try:
        open_checkpoint(replace(Base.of_run(cfg), name=folder))
    except ValueError as error:
        raise ValueError(
            f"rows trained on base_model '{cfg.base_model}' could not be merged into it afterwards:"
            f" {str(error).splitlines()[0]}"
        ) from error


def _folder(cfg) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if Path(cfg.base_model).is_dir():
        return Path(cfg.base_model)
    found = try_to_load_from_cache(cfg.base_model, "config.json", revision=cfg.revision_of_model)
    return Path(found).parent if isinstance(found, str) else None
