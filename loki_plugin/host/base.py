"""Can rows of this base train, and be merged into it? Asked before anything is downloaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..choices import ALL, DOWN

LOG = logging.getLogger("loki_plugin")


class Unreadable(ValueError):
    """The configuration of a base cannot be read here."""


def check_base(cfg, downloaded: bool = False) -> None:
    """Refuse a base whose rows cannot train, or whose stored weights no rows can be merged into.

    Of a model on the hub only the configuration is looked at until it is `downloaded`.

    Raises:
        ValueError: as `look_at`; a base without safetensors; one whose down-projections are not
            found among its tensors.
    """
    look_at(cfg)
    if not downloaded:
        _tell_of_overrides(cfg)
    if quantisation_of(read_config(cfg)):
        LOG.warning(
            "loki: '%s' is stored quantised; merging will need the 16-bit model that it was made"
            " from",
            cfg.base_model,
        )
    elif downloaded or Path(cfg.base_model).is_dir():
        check_stored(cfg)


def _tell_of_overrides(cfg) -> None:
    """Axolotl sets them on a configuration that was read, and most names are looked at in reading
    alone."""
    from ..implanting.overriding import idle_overrides

    overrides = cfg.get("overrides_of_model_config")
    if not overrides:
        return
    idle = idle_overrides(read_config({**cfg, "overrides_of_model_config": None}), overrides)
    if idle:
        LOG.warning(
            "loki: overrides_of_model_config: %s is no setting of base_model '%s' as this"
            " transformers reads it, so that it most likely changes nothing. Its configuration"
            " may have another name for it (rope_theta is part of rope_parameters)",
            ", ".join(idle),
            cfg["base_model"],
        )


def check_registered(cfg) -> None:
    """The same as soon as the YAML is read.

    What cannot be read yet is Axolotl's to say.

    Raises:
        ValueError: as `check_base`; a quota that is no row of this base, or a rank that is no less
            than its rows.
    """
    try:
        _, anatomy = look_at(cfg)
    except Unreadable:
        return
    _check_quota(cfg, anatomy)
    if Path(cfg["base_model"]).is_dir() and not quantisation_of(read_config(cfg)):
        check_stored(cfg)


def _check_quota(cfg, anatomy) -> None:
    from ..implanting.carrier import check_rank
    from ..model.linears import chosen_down
    from ..selecting.select import quota_to_count

    settings = cfg["loki"]
    if settings.get("rows") or cfg.get("lora_model_dir"):
        return  # they decide
    if chosen_down(anatomy, settings["targets"]):
        count = quota_to_count(settings["quota"], anatomy.hidden_size)
        if not settings["strategy"].startswith("global"):  # some layers may train more
            check_rank(settings.get("rank"), count)


def look_at(run: Mapping[str, Any]) -> tuple[Any, Any]:
    """The base of a run without memory for its weights, and its anatomy: rows of it can train.

    Args:
        run: the keys of an Axolotl YAML; of its `loki:` block `targets` count.

    Raises:
        Unreadable: its configuration is not at hand.
        ValueError: quantised by anything but bitsandbytes; a class that cannot be built; no
            down-projections; a family whose rows no standard adapter can hold; `targets` that it
            does not have.
    """
    from ..implanting.carrier import check_adaptable
    from ..model.anatomy import find_anatomy
    from ..model.building import build_empty
    from ..model.linears import chosen, chosen_down

    name, shape = run["base_model"], read_config(run)
    method = quantisation_of(shape)
    foreign = method not in (None, "bitsandbytes")
    if hasattr(shape, "quantization_config"):
        del shape.quantization_config  # the shapes are those of the whole weights
    try:
        model = build_empty(shape, run.get("model_type"), bool(run.get("trust_remote_code")))
        anatomy = find_anatomy(model)
        targets = _targets(run)
        chosen_down(anatomy, targets)
        check_adaptable(anatomy, model, chosen(model, anatomy, targets))
    except ValueError as error:
        said = f"rows of base_model '{name}' cannot be trained"
        if foreign:
            said += f", which is quantised with '{method}', stored as 16 bits neither"
        raise ValueError(f"{said}: {error}") from error
    if foreign:
        raise ValueError(
            f"base_model '{name}' is quantised with '{method}': rows cannot be merged"
            " into it. Train on the 16-bit model that it was made from, with `load_in_4bit: true`"
            " or `load_in_8bit: true` where memory is short"
        )
    return model.eval().requires_grad_(False), anatomy


def known_targets(run: Mapping[str, Any], names: list[str]) -> list[str]:
    """Those of LoRA's target names that a linear of the base's decoder layers has.

    All of them where none has, or where the base cannot be looked at: `look_at` says why.
    """
    from ..model.linears import chosen, chosen_down

    if not run.get("base_model"):
        return names
    try:
        model, anatomy = look_at({**run, "loki": {"targets": ALL}})
    except ValueError:
        return names

    def is_there(name: str) -> bool:
        try:
            return bool(chosen_down(anatomy, [name]) or chosen(model, anatomy, [name]))
        except ValueError:
            return False

    return [name for name in names if is_there(name)] or names


def read_config(run: Mapping[str, Any]) -> Any:
    """The base's configuration as the run changes it.

    Raises:
        Unreadable: neither in a folder nor on the hub, or of a type that transformers lacks.
    """
    from transformers import AutoConfig

    name = run.get("base_model_config") or run["base_model"]
    try:
        config = AutoConfig.from_pretrained(
            name,
            revision=run.get("revision_of_model") or None,
            trust_remote_code=bool(run.get("trust_remote_code")),
        )
    except (OSError, ValueError) as error:
        raise Unreadable(
            f"the configuration of base_model '{name}' cannot be read: {error}. Give a folder with"
            " a config.json, or download the model's config.json once"
        ) from error
    for key, value in (run.get("overrides_of_model_config") or {}).items():
        setattr(config, key, value)
    return config


def _targets(run: Mapping[str, Any]) -> str | Sequence[str]:
    return (run.get("loki") or {}).get("targets") or DOWN


def quantisation_of(config: Any) -> str | None:
    """How a checkpoint is stored quantised; None = it is not."""
    quantisation = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantisation, dict):
        quantisation = quantisation.to_dict()
    if not quantisation:
        return None
    method = quantisation.get("quant_method")
    return str(getattr(method, "value", method))


def check_stored(cfg) -> None:
    """The part of `check_base` that needs the checkpoint's files, which must be here by now."""
    from dataclasses import replace

    from ..implanting.checkpoint import Base, open_checkpoint
    from ..model.linears import chosen

    folder = _folder(cfg)
    if folder is None:
        return
    try:
        found = open_checkpoint(replace(Base.of_run(cfg), name=folder))
        for name in chosen(found.model, found.anatomy, _targets(cfg)):
            found.linear(name)
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
