"""After the training: numbers, page and trackers, none of which may cost the training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..implanting.saved import FIGURES_NAME, PAGE_NAME
from ..rows import RowSelection

if TYPE_CHECKING:
    from transformers import Trainer

    from .pictures import Picture

LOG = logging.getLogger("loki_plugin")


def show(
    folder: Path, selection: RowSelection, cache: Path, trainer: Trainer | None
) -> dict[str, Any]:
    """Draw the finished run in `folder`; returns what to say of it in its report.

    Whatever goes wrong here is said loudly and raises nothing: the adapter is saved by now, and
    `loki report` can draw it again.
    """
    page = folder / PAGE_NAME
    try:
        # An earlier run's must not be taken for this one's.
        for name in (PAGE_NAME, FIGURES_NAME):
            (folder / name).unlink(missing_ok=True)
        drawn, left_out = _draw(folder, selection, cache, trainer)
    except Exception as error:  # a picture must not cost the training, whatever is wrong with it
        LOG.exception(
            "loki: %s COULD NOT BE DRAWN. The training is saved and not affected; `loki report %s`"
            " tries again",
            page,
            folder,
        )
        return {"not_drawn": repr(error)}
    if trainer:
        _tell(trainer, drawn, folder)
    from .numbers import NOT_ANALYSED

    for why in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name, other in left_out.items() if other == why)
        # Rows that were not chosen by scores are no fault.
        level = logging.INFO if why == NOT_ANALYSED else logging.WARNING
        LOG.log(level, "loki: the report does not show %s: %s", names, why)
    return {"file": PAGE_NAME, "left_out": left_out}


def _tell(trainer: Trainer, drawn: list[Picture], folder: Path) -> None:
    from .page import read_report
    from .trackers import track

    track(trainer, drawn, read_report(folder))


def _draw(
    folder: Path, selection: RowSelection, cache: Path, trainer: Trainer | None
) -> tuple[list[Picture], dict[str, str]]:
    from . import numbers
    from .page import write_page

    history = trainer.state.log_history if trainer else None
    found = numbers.gather(selection, cache, history)
    numbers.save(found, folder)
    _, drawn, left_out = write_page(folder, found)
    return drawn, left_out
