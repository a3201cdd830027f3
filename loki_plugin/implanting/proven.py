"""A merge and its proof, as `loki merge` and `axolotl merge-lora` make them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..rows import FILE_NAME, RowSelection
from .checkpoint import Base
from .merge import MergeReport, merge_adapter
from .verify import VerifyReport, verify

LOG = logging.getLogger("loki_plugin")


class NotProven(RuntimeError):
    """A merged model differs from its base in more than the selected rows."""


def merge_run(
    run: Mapping[str, Any], adapter: Path, output: Path
) -> tuple[MergeReport, VerifyReport]:
    """Merge the adapter of a run into its base, and prove what was written.

    Args:
        run: the keys of an Axolotl YAML.
        adapter: the folder of the adapter, with its rows file.
        output: where the merged model is to stand.

    Raises:
        ValueError: what cannot be merged; nothing stands at `output` then.
        NotProven: the merged model is not to be used.
    """
    base, selection = Base.of_run(run), RowSelection.load(adapter / FILE_NAME)
    LOG.info("loki: merging %s shard by shard; frozen rows keep their bytes", adapter)
    merged = merge_adapter(base, adapter, output, selection)
    for line in merged.text().splitlines():
        LOG.info("loki: %s", line)
    proof = verify(base, output, selection)
    for line in proof.text().splitlines():
        LOG.info("loki: %s", line)
    if not proof.ok:
        raise NotProven(f"do not use the merged model in '{output}':\n{proof.text()}")
    return merged, proof
