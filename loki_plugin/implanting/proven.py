"""A merge and its proof, as `loki merge` and `axolotl merge-lora` make them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..rows import RowSelection, union
from .adapters import Adapter
from .checkpoint import Base
from .dequantised import write_dequantised
from .merge import MergeReport, merge_adapters
from .output import check_output, removing
from .rounded import DEQUANTISED, ORIGINAL, Advice, advise
from .verify import VerifyReport, verify

LOG = logging.getLogger("loki_plugin")
ONTO = (ORIGINAL, DEQUANTISED)


class NotProven(RuntimeError):
    """A merged model differs from its base in more than the selected rows."""


def merge_run(
    run: Mapping[str, Any],
    adapters: Sequence[Path],
    output: Path,
    sum_overlaps: bool = False,
    onto: str = ORIGINAL,
) -> tuple[MergeReport, VerifyReport]:
    """Merge adapters into the base of a run, and prove what was written.

    Args:
        run: the keys of an Axolotl YAML.
        adapters: folders of adapters, each with its rows file.
        output: where the merged model is to stand.
        sum_overlaps: as in `merge_adapters`.
        onto: the original base; or the dequantised one that the rows were learned beside, which is
            written to `output`-base and stands for the base in the proof.

    Raises:
        ValueError: what cannot be merged; nothing stands at `output` or beside it then.
        NotProven: the merged model is not to be used.
    """
    base, parts = Base.of_run(run), [Adapter.load(folder) for folder in adapters]
    original = base
    with ExitStack() as unless_merged:
        if onto == DEQUANTISED:
            check_output(output, base)  # before the long way to what would be merged into it
            base = _dequantised(base, [p.selection for p in parts], output)
            unless_merged.enter_context(removing(Path(base.name)))
        LOG.info(
            "loki: merging %s shard by shard; frozen rows keep their bytes",
            " and ".join(str(p.folder) for p in parts),
        )
        merged = merge_adapters(base, parts, output, sum_overlaps)
    for line in merged.text().splitlines():
        LOG.info("loki: %s", line)
    proof = verify(base, output, union([p.selection for p in parts]))
    for line in proof.text().splitlines():
        LOG.info("loki: %s", line)
    if not proof.ok:
        raise NotProven(f"do not use the merged model in '{output}':\n{proof.text()}")
    advice = _advice(original, parts)
    if advice:
        for line in advice.text().splitlines():
            LOG.info("loki: %s", line)
    return replace(merged, advice=advice), proof


def _advice(base: Base, parts: list[Adapter]) -> Advice | None:
    """Onto which base the run is merged best; what is merged and proven does not fail by it."""
    try:
        return advise(base, parts)
    except (OSError, RuntimeError, ValueError) as error:
        LOG.warning("loki: how large the base's rounding is could not be measured: %s", error)
        return None


def _dequantised(base: Base, selections: list[RowSelection], output: Path) -> Base:
    marks = [s.fingerprint for s in selections]
    if any(mark != marks[0] for mark in marks):
        raise ValueError(
            "onto the dequantised base: the adapters were not all learned on the same quantised"
            " base; merge onto the original one"
        )
    folder = output.with_name(f"{output.name}-base")
    LOG.info("loki: %s: %s", folder, write_dequantised(base, selections[0], folder))
    return replace(base, name=folder, revision=None)
