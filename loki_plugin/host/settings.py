"""The settings of a run: the `loki:` block as a model, and what the run's other keys become.

A LoKI run travels through Axolotl as a LoRA run whose adapter is constrained.
"""

from __future__ import annotations

import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..args import LokiConfig
from ..choices import ALL, DOWN, LINEAR_RANK
from .base import known_targets
from .options import OVERRIDDEN, WHY, refuse
from .sharding import OVERRIDDEN_WITH_FSDP2, fsdp2_overrides, is_fsdp2
from .telling import Line

LOG = logging.getLogger("loki_plugin")

# Axolotl takes new tokens beside an adapter only if their embeddings are named to be trained. They
# stand in the configuration for its check and are out of it while the adapter is made.
EMBEDDINGS = ["embed_in", "embed_out", "embed_tokens", "embeddings", "lm_head", "word_embeddings"]
WRITTEN = (*OVERRIDDEN, *OVERRIDDEN_WITH_FSDP2, "adapter", "lora_r", "lora_alpha", "loki")
# Rates from here on are LoRA's, ten times those of full fine-tuning, of which the dense form is a
# part (docs/choosing.md).
_RATE_OF_LORA = 5e-5


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
    unnamed = next((key for key in block if not isinstance(key, str)), None)
    if unnamed is not None:
        raise ValueError(
            f"`loki:` has a field {unnamed!r}, which is no name; known fields:"
            f" {', '.join(_fields_at(()))}"
        )
    try:
        return LokiConfig(**block)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            where = ".".join(["loki", *(str(part) for part in fault["loc"])])
            said, hint = fault["msg"].removeprefix("Value error, "), ""
            if fault["type"] == "extra_forbidden":
                known = _fields_at(fault["loc"][:-1])
                near = get_close_matches(str(fault["loc"][-1]), known, 1)
                said = f"there is no such field{f', did you mean {near[0]}?' if near else ''}"
                hint = f"; known fields: {', '.join(known)}"
            elif fault["type"] == "model_type":  # pydantic would name the class
                words = "`auto`, `off`, or " if fault["loc"] == ("protect",) else ""
                said = f"expected {words}a block of {', '.join(_fields_at(fault['loc']))}"
            got = "" if said.startswith("got ") else f" (got {fault['input']!r})"
            lines.append(f"  {where}: {said}{got}{hint}")
        raise ValueError("the `loki:` block is not valid:\n" + "\n".join(lines)) from error


def _fields_at(path: tuple) -> list[str]:
    model: Any = LokiConfig
    for part in path:
        model = model.model_fields[part].annotation
    return sorted(model.model_fields.keys() - {"form"})  # `form` is not for users


def prepare(cfg) -> list[Line]:
    """Check the run and rewrite its keys so that Axolotl builds the LoRA carrier.

    A configuration that went through here before comes out as it went in. `cfg` is changed only
    if all is well with it.

    Returns the lines that say what was set and what was overridden.

    Raises:
        ValueError: a setting that contradicts LoKI, before anything is loaded.
    """
    about: list[Line] = []
    config = parse(_with_protect(_with_targets(cfg), cfg.get("lora_model_dir"), about))
    adapter, rank = _adapter(cfg, config)
    sharding, lines = fsdp2_overrides(cfg) if is_fsdp2(cfg) else ({}, [])
    config = _aim(cfg, config, rank, about)
    refuse({**cfg, **sharding}, config)
    form = "dense" if rank is None else "low-rank"
    if config.form is None:
        given = cfg.get("adapter") or "not set"
        about.append(("adapter", f"'{given}' runs as '{adapter}', in the {form} form"))
        about += _about_rate(cfg, config) if form == "dense" else []
    if is_fsdp2(cfg):
        about.append(("sharding", "FSDP2: has run on CPU ranks only, see docs/ways.md"))
    wanted = {**OVERRIDDEN, "adapter": adapter, "lora_r": rank or 1, "lora_alpha": rank or 1}
    if _adds_tokens(cfg):
        wanted["lora_modules_to_save"] = EMBEDDINGS
    told = {"adapter", "lora_target_modules", "lora_target_linear"}
    if config.targets != DOWN and rank is None and config.linear_rank == _rank(cfg.get("lora_r")):
        told.add("lora_r")  # it is the rank on the other linears
    for key, value in wanted.items():
        given = cfg.get(key)
        if given is not None and given != value and key not in told:
            reason = f"now {value}, for {WHY[key]}" if key in WHY else "set from the rows"
            if key == "lora_modules_to_save":
                reason = WHY[key]
            lines.append(("overrides", f"{key} = {given!r}: {reason}"))
    cfg.update({**sharding, **wanted})
    cfg["loki"] = config.model_dump(mode="json", exclude_none=True) | {"rank": rank, "form": form}
    return about + lines


def _about_rate(cfg, config: LokiConfig) -> list[Line]:
    """A word where the dense form would train at a rate that was meant for something else.

    Dense rows train as in full fine-tuning. Through soft directions they read less, and learn more
    slowly.
    """
    try:
        given = float(cfg.get("learning_rate") or 0)  # YAML takes 1e-4 for text
    except (TypeError, ValueError):
        return []  # Axolotl's to say
    optimizer, scale = str(cfg.get("optimizer") or "adamw"), config.lr_scale
    fast, soft = given * scale >= _RATE_OF_LORA, config.protect.soft
    if config.targets != DOWN or "adam" not in optimizer or not given or fast == soft:
        return []
    kept = f"learning_rate = {given:g}{f' x lr_scale {scale:g}' if scale != 1 else ''} is kept"
    if soft:
        said = (
            f"{kept}, a rate of full fine-tuning; protected rows read less, and learn more slowly:"
            " a small model took 1e-3"
        )
    else:
        said = (
            f"{kept}, a rate of LoRA; dense rows train as in full fine-tuning, and forget more at"
            " higher rates: about 1e-5 is advised"
        )
        said += "; protected, they need a higher one" if config.protect.reads else ""
    return [("rate", f"{said} (docs/choosing.md). Set it, or `loki.lr_scale`")]


def _aim(cfg, config: LokiConfig, rank: int | None, lines: list[Line]) -> LokiConfig:
    """The block with the rank on linears; says where `targets` come from."""
    if config.form is not None:
        return config
    key, found = _lora_targets(cfg)
    if key and "targets" not in (cfg.get("loki") or {}):
        said = f"{key} = {cfg[key]!r} is taken as `loki.targets: {config.targets}`"
        left = [n for n in found if n not in config.targets] if isinstance(found, list) else []
        if left:
            said += f"; of the decoder layers no linear that can train is called {', '.join(left)}"
        lines.append(("targets", said))
    elif key and config.targets != found:
        lines.append(("overrides", f"{key} = {cfg[key]!r}: `loki.targets: {config.targets}`"))
    if key == "lora_target_modules" and cfg.get("lora_target_linear") and config.targets != ALL:
        said = f"not followed, what trains is `loki.targets: {config.targets}`"
        said += f"; for every linear write `loki.targets: {ALL}`"
        lines.append(("overrides", f"lora_target_linear = {cfg['lora_target_linear']!r}: {said}"))
    if config.targets == DOWN:
        return config
    linear_rank = config.linear_rank or rank or _rank(cfg.get("lora_r")) or LINEAR_RANK
    lines.append(("linears", f"besides rows of the down-projections: LoRA of rank {linear_rank}"))
    return config.model_copy(update={"linear_rank": linear_rank})


def _with_targets(cfg) -> Any:
    """The configuration with `targets` in its block, where they stand in LoRA's own keys. PEFT
    passes over names that no module has, and YAMLs of one family are written for several."""
    block, (key, found) = cfg.get("loki"), _lora_targets(cfg)
    block = {} if block is None else block
    if not key or not isinstance(block, dict) or {"targets", "form"} & block.keys():
        return cfg
    if isinstance(found, list):
        found = known_targets(cfg, found)
    return {"loki": {**block, "targets": found}}


def _with_protect(cfg, adapter: str | None, lines: list[Line]) -> Any:
    """The configuration with `protect: off` in its block, where it says nothing and goes on from
    an adapter that was trained without `auto`: the adapter decides, as it does about the rows."""
    block = cfg.get("loki") or {}
    if not adapter or not isinstance(block, dict) or "protect" in block:
        return cfg
    from ..protecting.directions import FILE_NAME, has_default

    if has_default(Path(str(adapter)) / FILE_NAME):
        return cfg
    lines.append(
        (
            "protect",
            f"its directions or none, as '{adapter}' was trained, and no anchor; for one set"
            " `protect: {anchor: 1.0, text: self}`",
        )
    )
    return {**cfg, "loki": {**block, "protect": "off"}}


def _lora_targets(cfg) -> tuple[str | None, str | list[str]]:
    """Which of LoRA's keys says what trains, and what it says."""
    modules = cfg.get("lora_target_modules")
    if modules:
        return "lora_target_modules", ALL if modules == "all-linear" else modules
    return ("lora_target_linear", ALL) if cfg.get("lora_target_linear") else (None, DOWN)


def remember(cfg) -> dict[str, Any]:
    """What `prepare` may change, as it stands now; see `restore`."""
    return {key: cfg[key] for key in WRITTEN if key in cfg}


def restore(cfg, before: dict[str, Any]) -> None:
    """Undo `prepare`."""
    for key in WRITTEN:
        cfg.pop(key, None)
    cfg.update(before)


def _adds_tokens(cfg) -> bool:
    return bool(cfg.get("tokens") or cfg.get("special_tokens"))


def _adapter(cfg, config: LokiConfig) -> tuple[str, int | None]:
    given, rank = cfg.get("adapter"), config.rank
    if given not in (None, "loki", "lora", "qlora"):
        raise ValueError(
            f"adapter: {given} cannot be combined with plugins: [loki]; use `adapter: loki`, or"
            " `lora`/`qlora` with `lora_r` for the low-rank form"
        )
    if given in ("lora", "qlora") and config.form is None:
        r = _rank(cfg.get("lora_r"))
        if rank is not None and r is not None and r != rank:
            raise ValueError(f"lora_r = {r} and loki.rank = {rank} disagree; give one of them")
        rank = rank if r is None else r
        if rank is None:
            raise ValueError(
                f"adapter: {given} with plugins: [loki] is the low-rank form and needs `lora_r`;"
                " for the dense form write `adapter: loki`"
            )
    if given == "qlora":
        return given, rank
    return ("qlora" if cfg.get("load_in_4bit") else "lora"), rank


def _rank(given) -> int | None:
    if given is None:
        return None
    if not str(given).isdecimal() or int(str(given)) < 1:  # "8" is 8, as for Axolotl
        raise ValueError(f"lora_r = {given!r}, expected a whole number of at least 1")
    return int(str(given))
