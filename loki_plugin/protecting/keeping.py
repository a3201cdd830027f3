"""What is made once: by one rank for all, and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from .. import ranks
from ..analysing.scores.cache import use
from ..model.loading import is_loaded

LOG = logging.getLogger("loki_plugin")
T = TypeVar("T")


def by_one(model: nn.Module, work: Callable[[], Any]) -> tuple[Any, int]:
    """What `work` returns on the first rank that holds the weights, None on others; that rank."""
    if ranks.count() == 1:
        return work(), 0
    loaded = ranks.gather(is_loaded(model))
    first = loaded.index(True)  # sharded training loads the weights of one rank only
    with ranks.together():
        return (work() if ranks.current() == first else None), first


def read_kept(path: Path, read: Callable[[], T], otherwise: str) -> T | None:
    """What the cache keeps at `path`; None where it keeps nothing, or something damaged."""
    try:
        if not path.exists():
            return None
        found = read()
    except (ValueError, PermissionError) as error:
        LOG.warning("loki: %s; %s", error, otherwise)
        return None
    use(path)
    return found


def key_of(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
