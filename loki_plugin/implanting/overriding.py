"""`overrides_of_model_config`: a merged model must say what trained, and be read as that."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..model.fingerprint import stable
from .checkpoint import Base


def write_overrides(folder: Path, base: Base) -> list[str]:
    """Let config.json in `folder` say what a run was trained under; returns lines that tell it.

    Axolotl sets the values on a configuration that was read already. A file that has them beside
    the others may be read as another one: transformers makes `rope_parameters` of `rope_theta`,
    and `layer_types` of `use_sliding_window`, when it reads, and at no other time. So what is
    written is read again, and has to be what trained.

    Raises:
        ValueError: no file that could be written is read as what trained.
    """
    if not base.overrides:
        return []
    path = folder / "config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    known, trained = base.read(folder), base.configuration(folder)
    idle = idle_overrides(known, base.overrides)
    wanted = what_counts(trained, idle)
    names = ", ".join(base.overrides)
    whole = json.loads(trained.to_json_string(use_diff=False))
    some = {key: value for key, value in whole.items() if key not in idle}
    for config in (said | base.overrides, some):
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if what_counts(base.read(folder), idle) == wanted:
            lines = [f"config.json: has the run's overrides_of_model_config ({names})"]
            if config is some and idle:
                lost = ", ".join(idle)
                lines.append(
                    f"config.json: without {lost}, which changed nothing in the run: it is no"
                    " setting of this model as this transformers reads it"
                )
            return lines
    raise ValueError(
        f"overrides_of_model_config ({names}): with them in config.json the model is read as"
        " another than the one that trained. Set what they stand for in the base's own config.json,"
        " and train on that"
    )


def idle_overrides(known: Any, overrides: Mapping[str, Any]) -> list[str]:
    """Overrides that change nothing but that they stand there: they name no setting of the model.

    Args:
        known: the base's configuration as it is read.
    """
    settings, found = known.to_dict(), []
    before = stable(settings)
    for key, value in overrides.items():
        config = copy.deepcopy(known)
        setattr(config, key, value)
        after = stable(config.to_dict())
        if key not in settings and {k: v for k, v in after.items() if k != key} == before:
            found.append(key)
    return found


def what_counts(config: Any, idle: list[str]) -> dict[str, Any]:
    """A configuration as plain JSON, without the overrides that change nothing."""
    return {key: value for key, value in stable(config.to_dict()).items() if key not in idle}
