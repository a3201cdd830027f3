"""A disk that is full, as far as this process can tell."""

from __future__ import annotations

import resource
from contextlib import contextmanager


@contextmanager
def little_room(size: int):
    """No file may grow beyond `size` bytes; writing more is an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
