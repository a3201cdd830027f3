"""The adapter as it lies on disk: its rows file beside it, and the proof that it obeys it."""

from __future__ import annotations

import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from .. import ranks
from ..model.linears import PREFIX
from ..model.loading import whole
from ..model.writing import write_text
from ..protecting.directions import FILE_NAME as DIRECTIONS_NAME
from ..protecting.directions import Directions
from ..protecting.reading import LEAKAGE, leakage
from ..rows import FILE_NAME, RowSelection
from . import card
from .checkpoint import open_tensors
from .selected import RowFactor, RowSelector

LOG = logging.getLogger("loki_plugin")
WEIGHTS = "adapter_model.safetensors"
FAILED_NAME = "LOKI_FAILED.txt"  # stands beside an adapter that must not be used
REPORT_NAME = "loki_report.json"
PAGE_NAME, FIGURES_NAME = "loki_report.html", "loki_figures.json"
PICTURE_NAME = "loki_forgetting.svg"  # beside the model card, which shows it
_BEGUN = (
    "A new run began in this folder and has not saved its adapter yet. The weights here are those"
    " of an earlier run, and what Axolotl wrote beside them before training is the new run's.\n"
)
REFERENCE = "ref"  # what TRL calls the frozen copy of the adapter that it compares with


def save_rows_with(model: PeftModel, selection: RowSelection) -> None:
    """From now on `model.save_pretrained` writes the rows file beside the adapter.

    So an older adapter keeps its own rows until it is overwritten itself. The same holds for the
    directions of a protected adapter. A report that verified the older one goes. TRL's reference
    is not saved (`is_reference`), nor loaded in place of the adapter.
    """
    model._loki_selection = selection
    model._loki_directions = None  # `protect_inputs` sets it
    model._loki_copies = set()  # `add_adapter` notes them
    # Bound methods, not closures: a deep copy of the model binds them to the copy.
    model.save_pretrained = types.MethodType(_save_pretrained, model)
    model.load_adapter = types.MethodType(_load_adapter, model)


def is_reference(model: PeftModel, adapter_name: str) -> bool:
    """Whether an adapter is the copy that TRL's trainers (DPO, KTO, GRPO, RLOO) compare with.

    It is named `ref`, was added with the very configuration of the adapter that trains, and is not
    active. TRL makes it anew from the model that it is given. Saved, it would stand in a folder of
    its own, and transformers, which resumes from such folders and from nothing else where there are
    any, would leave out the adapter that trained.
    """
    is_copy = adapter_name == REFERENCE and adapter_name in model._loki_copies
    return is_copy and adapter_name not in model.active_adapters


def save_sharded(model: PeftModel, write: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Bring together an adapter that FSDP2 has spread over the ranks; the first one writes it.

    Every rank must call this.

    Args:
        write: gets the adapter's part of an ordinary state dict, on the CPU.

    Raises:
        RuntimeError: on the other ranks, if the first cannot write it.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            complete = whole(tensor)
            if ranks.is_first():
                state[name] = complete.cpu()
    with ranks.together():
        if ranks.is_first():
            write(state)


def _is_spread(model: PeftModel) -> bool:
    """Whether FSDP2 has spread the adapter over the ranks."""
    return any(isinstance(p, DTensor) for n, p in model.named_parameters() if ".lora_" in n)


def _load_adapter(self: PeftModel, model_id, adapter_name: str, *args, **kwargs):
    beside = Path(model_id).parent
    if is_reference(self, adapter_name) and (beside / WEIGHTS).is_file():
        raise ValueError(
            f"'{model_id}' holds a reference that is not needed, and resuming would load it in"
            f" place of the adapter in '{beside}'; remove the folder '{model_id}' and resume again"
        )
    return type(self).load_adapter(self, model_id, adapter_name, *args, **kwargs)


def _save_pretrained(
    self: PeftModel,
    save_directory,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    *args,
    **kwargs,
):
    folder = Path(save_directory)
    if selected_adapters is None:
        selected_adapters = [name for name in self.peft_config if not is_reference(self, name)]
    if kwargs.get("state_dict") is None and _is_spread(self):
        raise RuntimeError(
            f"the adapter was not saved to '{folder}': each rank holds a part of it only, and"
            " one of them cannot save it alone. Use the last checkpoint, or `save_sharded` on all"
        )
    first = kwargs.get("is_main_process", True)
    if first and ranks.is_first():  # several machines may each save to one folder
        _withdraw_report(folder)
    if kwargs.get("save_embedding_layers", "auto") == "auto" and embeddings_grew(self):
        kwargs["save_embedding_layers"] = True
    try:
        saved = type(self).save_pretrained(
            self, save_directory, safe_serialization, selected_adapters, *args, **kwargs
        )
        if first:
            accompany(self, folder)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"the adapter could not be saved to '{folder}' ({error}); what lies there may not be"
            " whole. If that disk is full, make room, and resume from the last checkpoint"
        ) from error
    return saved


def announce(folder: Path) -> None:
    """Mark the adapter of an earlier run in `folder`, in which a new run begins.

    Axolotl writes the new run's `adapter_config.json` before training and its weights at the end.
    Until then the two do not belong together, and no report vouches for them.
    """
    if not (folder / WEIGHTS).is_file():
        return
    _withdraw_report(folder)
    if not (folder / FAILED_NAME).exists():
        write_text(folder / FAILED_NAME, _BEGUN)
    LOG.warning(
        "loki: '%s' holds the adapter of an earlier run, which this one overwrites; until it has,"
        " %s stands there",
        folder,
        FAILED_NAME,
    )


def accompany(model: PeftModel, folder: Path) -> None:
    """Put rows and directions of `model` beside its adapter in `folder`, and take away what speaks
    of an earlier one: the mark of `announce`, and its directions."""
    mark = folder / FAILED_NAME
    if mark.is_file() and mark.read_text(encoding="utf-8") == _BEGUN:
        mark.unlink()
    model._loki_selection.save(folder / FILE_NAME)
    if model._loki_directions is not None:
        model._loki_directions.save(folder / DIRECTIONS_NAME)
    else:
        (folder / DIRECTIONS_NAME).unlink(missing_ok=True)


def embeddings_grew(model: PeftModel) -> bool:
    """Whether tokens were added to the base since it was loaded; PEFT finds out online only."""
    config = model.get_base_model().config
    name = getattr(config, "_name_or_path", None)
    if not name:
        return False
    revision = getattr(config, "_commit_hash", None)
    try:
        stored = type(config).from_pretrained(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):  # no such folder, nothing in the cache: built in memory
        return False
    return config.get_text_config().vocab_size > stored.get_text_config().vocab_size


def _withdraw_report(folder: Path) -> None:
    """The report of an adapter that is overwritten now must not vouch for the new one, nor its
    page and pictures and the figures that they were drawn from."""
    for name in (PAGE_NAME, FIGURES_NAME, PICTURE_NAME):
        (folder / name).unlink(missing_ok=True)
    card.withdraw(folder)
    report = folder / REPORT_NAME
    if report.is_file() and b'"verified": true' in report.read_bytes():
        report.unlink()


def check_saved(
    folder: Path,
    names: list[str],
    selection: RowSelection,
    rank: int | None,
    grown: bool = False,
) -> None:
    """Read a saved adapter back and check it against the rows file beside it.

    Args:
        names: of the L down-projections, as the base model or the `PeftModel` calls them.
        selection: the rows that trained.
        rank: None for the dense form.
        grown: whether the embeddings have new tokens, which must be saved too.

    Raises:
        ValueError: other rows beside it, a layer that is missing or not selected, NaN or Inf,
            a B that is not confined to its rows, or no embeddings although they have grown.
    """
    if RowSelection.load(folder / FILE_NAME) != selection:
        raise ValueError(f"'{folder / FILE_NAME}' holds other rows than those that trained")
    with open_tensors(folder / WEIGHTS) as stored:
        left = {k for k in stored.keys() if ".lora_" in k}
        if grown and len(left) == len(stored.keys()):
            raise ValueError("the saved adapter lacks the embeddings of the tokens that were added")
        for i, (name, rows) in enumerate(zip(names, selection.rows, strict=True)):
            if not len(rows):
                continue
            name = name.removeprefix(PREFIX)
            keys = [f"{PREFIX}{name}.lora_{x}.weight" for x in "AB"]
            missing = [k for k in keys if k not in left]
            if missing:
                raise ValueError(f"layer {i}: the saved adapter lacks {missing[0]}")
            left -= set(keys)
            a, b = (stored.get_tensor(k) for k in keys)
            if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
                raise ValueError(f"layer {i}: the saved adapter holds NaN or Inf")
            kind: Any = RowSelector if rank is None else RowFactor
            try:
                kind(rows, torch.empty(selection.hidden_size, rank or len(rows))).compact(b)
            except ValueError as error:
                raise ValueError(f"layer {i}: the saved {error}") from error
        for name in selection.linears:
            keys = [f"{PREFIX}{name}.lora_{x}.weight" for x in "AB"]
            missing = [k for k in keys if k not in left]
            if missing:
                raise ValueError(f"{name}: the saved adapter lacks {missing[0]}")
            left -= set(keys)
            if not all(torch.isfinite(stored.get_tensor(k)).all() for k in keys):
                raise ValueError(f"{name}: the saved adapter holds NaN or Inf")
    if left:
        raise ValueError(f"the saved adapter holds {sorted(left)[0]}, which no row selects")


def check_saved_protection(folder: Path, names: list[str], directions: Directions) -> list[float]:
    """Read a saved adapter back: `leakage` of its update per site, 0 where it has none.

    Raises:
        ValueError: other directions beside it, or a site that reads its own by more than rounding
            (soft ones are read, so that only their share is told).
    """
    if Directions.load(folder / DIRECTIONS_NAME) != directions:
        raise ValueError(f"'{folder / DIRECTIONS_NAME}' holds other directions than those in use")
    shares = adapter_leakage(folder, names, directions)
    worst = max(range(len(shares)), key=shares.__getitem__)
    if shares[worst] > LEAKAGE and not directions.soft:
        where = f"layer {worst}" if directions.sites is None else directions.sites[worst][0]
        raise ValueError(
            f"{where}: {100 * shares[worst]:.2g} % of the saved update reads protected directions"
        )
    return shares


def adapter_leakage(folder: Path, names: list[str], directions: Directions) -> list[float]:
    """The largest `leakage` of the modules of each site of a saved adapter, 0 without an update."""
    down = [name.removeprefix(PREFIX) for name in names]
    sites = directions.sites or [[name] for name in down]
    with open_tensors(folder / WEIGHTS) as stored:
        known = set(stored.keys())

        def one(name: str, u: torch.Tensor) -> float:
            keys = [f"{PREFIX}{name}.lora_{x}.weight" for x in "AB"]
            if keys[0] not in known or not u.shape[1]:
                return 0.0
            a, b = (stored.get_tensor(key).double() for key in keys)
            return leakage(b[(b != 0).any(1)] @ a, u)

        pairs = zip(sites, directions.basis, strict=True)
        return [max(one(name, u) for name in site) for site, u in pairs]
