"""Writing a file so that a reader sees all of it or nothing."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place where the block ends without an error.

    On a full disk, say, what stood at `path` stands there still.

    Raises:
        OSError: it cannot be written; also where safetensors says so in an error of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"'{path}' cannot be written: {error}") from error
        raise


def json_text(facts: Any) -> str:
    """`facts` as JSON of two spaces; what is not finite, as the loss of a run that diverged, is
    null there: strict readers refuse NaN."""
    return json.dumps(_finite(facts), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, the whole of it or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
