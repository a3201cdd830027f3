"""Does a saved adapter fit a base: the model that it was trained on, with the modules it names?

PEFT puts an adapter whose modules a model does not have onto that model all the same. It warns of
missing keys, and the model answers as if there were no adapter.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from torch import nn

from ..model.linears import PREFIX
from ..rows import FILE_NAME, RowSelection
from .adapters import CONFIG
from .checkpoint import Base, open_checkpoint, open_tensors
from .identity import check_base
from .saved import WEIGHTS

LOG = logging.getLogger("loki_plugin")


def changed_modules(adapter: Path) -> set[str]:
    """Names of the base's modules that a saved adapter changes; none without a safetensors file."""
    if not (adapter / WEIGHTS).is_file():
        return set()
    with open_tensors(adapter / WEIGHTS) as stored:
        keys = [key for key in stored.keys() if ".lora_" in key]
    return {k.rpartition(".lora_")[0].removeprefix(PREFIX).replace(".base_layer", "") for k in keys}


def check_fits(model: nn.Module, adapter: Path) -> None:
    """Check that a model, with an adapter around it or without, has all that a saved one changes.

    Raises:
        ValueError: it lacks a module.
    """
    names = {n.removeprefix(PREFIX).replace(".base_layer", "") for n, _ in model.named_modules()}
    missing = sorted(changed_modules(adapter) - names)
    if missing:
        kind = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        told = missing[0] + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise ValueError(
            f"the adapter in '{adapter}' changes {told}, which {kind} does not have, so nothing of"
            " it would be there. It is the adapter of another base, or has the names of"
            " another class of this one: `loki export ADAPTER OUT --names text`, or `--names"
            " wrapper`, renames it"
        )


def base_named_by(adapter: Path) -> tuple[str | None, str | None]:
    """(name, revision) of the base as the configuration of a saved adapter has them."""
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    return config.get("base_model_name_or_path"), config.get("revision")


def check_made_on(base: Base, adapter: Path) -> None:
    """Check that a base is the model that a saved adapter was trained on, by its rows file.

    Where the base's files cannot be read so, or the rows file has no fingerprint, the log says that
    nothing was compared. An adapter without a rows file, of another tool, cannot be compared.

    Raises:
        ValueError: it is another model.
    """
    if not (adapter / FILE_NAME).is_file():
        return
    mark = RowSelection.load(adapter / FILE_NAME).fingerprint
    if mark is None:
        LOG.warning(
            "loki: '%s' does not say on which model it was trained, so '%s' is taken for it",
            adapter,
            base.name,
        )
        return
    try:
        found = open_checkpoint(base, mark)
    except (ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        LOG.warning("loki: the base was not compared with the adapter's: %s", reason)
        return
    check_base(found, mark)
