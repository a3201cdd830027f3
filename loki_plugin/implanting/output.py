"""Where a command writes a folder: nothing is lost there, and nothing half-written stays."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import Base


def check_output(output: Path, base: Base | None = None) -> None:
    """Check that a model or an adapter can be written there.

    Raises:
        ValueError: it is the base, not empty, or where another disk is mounted, which cannot be
            put in the place of a folder.
    """
    if base is not None and output.resolve() == Path(base.name).resolve():
        raise ValueError(f"output '{output}' is the base model itself; give another folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output '{output}' exists and is not empty; remove it or give another")
    if output.is_mount():
        raise ValueError(f"output '{output}' is the root of a disk; give a folder on it")


@contextmanager
def writing_to(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place if the block ends, and goes if it fails.

    Where `output` is a link to an empty folder, that folder is meant.
    """
    place = output.resolve()
    partial = place.parent / f".{place.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # ours, of an interrupted run
    with removing(partial):
        partial.mkdir(parents=True)
        yield partial
        if place.exists():
            place.rmdir()
        partial.rename(place)


@contextmanager
def removing(folder: Path) -> Iterator[None]:
    """Remove `folder` if the block fails; on a full disk it would take the room of others."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
