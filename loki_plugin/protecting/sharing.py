"""What low-rank updates read: found once, by one rank for all, and kept in the cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from peft import PeftModel

from .. import ranks
from ..analysing.scores.cache import READS, cache_folder, kept_file
from ..analysing.scores.pruning import prune
from ..model.fingerprint import fingerprint
from ..model.writing import replacing
from .fixing import low_rank, task_reads
from .keeping import by_one, key_of, read_kept
from .reads import Reads
from .solving import Wanted

LOG = logging.getLogger("loki_plugin")


def shared_reads(
    model: PeftModel,
    texts: Sequence[Sequence[int]],
    general: Sequence[Sequence[int]],
    wanted: Wanted,
    cache: str | None = None,
    limit: float | None = None,
) -> Reads:
    """`task_reads`, kept in the cache; one rank works, and all return the same, bit for bit.

    Args:
        cache, limit: its folder, None: the user's, and its gigabytes, None: no limit.
    """
    asked = model, texts, general, wanted
    found, first = by_one(model, lambda: _kept_reads(*asked, cache_folder(cache), limit))
    if ranks.count() == 1:
        return found
    a = {name: ranks.broadcast(found and found.a[name], first) for name in low_rank(model)}
    return Reads(a, ranks.broadcast(found and found.behind, first))


def _kept_reads(
    model: PeftModel,
    texts: Sequence[Sequence[int]],
    general: Sequence[Sequence[int]],
    wanted: Wanted,
    folder: Path,
    limit: float | None,
) -> Reads:
    if not texts:  # what is drawn is drawn anew in each run
        return task_reads(model, texts, general, wanted)
    identity = {
        "loki_plugin": version("loki_plugin"),
        "fingerprint": fingerprint(model, unchanged=True),
        "texts": [list(t) for t in texts],
        "general": [list(t) for t in general],
        "wanted": str(wanted),
        "ranks": {n: layer.r[model.active_adapter] for n, layer in low_rank(model).items()},
    }
    path = kept_file(folder, READS, key_of(identity))
    kept = read_kept(path, lambda: Reads.load(path), "it will be found again")
    if kept is not None:
        LOG.info("loki: what low-rank updates read found in the cache (%s)", path)
        return kept
    found = task_reads(model, texts, general, wanted)
    try:
        with replacing(path) as temporary:
            found.save(temporary)
        prune(folder, limit, keep=path.stem)
    except OSError as error:
        LOG.warning("loki: what updates read could not be kept in the cache: %s", error)
    return found
