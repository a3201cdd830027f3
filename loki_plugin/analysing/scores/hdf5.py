"""The score files of the LoKI authors' code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# Names that the authors' `HDF5Manager` gives to the scores and to the facts beside them.
_DATASET, _METADATA = "dataset", "metadata_"
_PROMPTS = 64


class Hdf5Scores:
    """The authors' HDF5 score file as an iterable of chunks for `select_rows`.

    Each iteration reads the file once, in order, as float32 chunks [n, L, H]; memory does not grow
    with N. The authors store float16: what they measured below 3e-8 reads as 0, larger scores with
    11 bits, so expect many equal scores. Those go to the lower index here and nowhere in
    particular in their code.

    Attributes:
        shape: (N, L, H).
        metadata: how the authors say the scores were made, e.g. `model_name`, `ig_steps`; may be
            empty.

    Raises:
        ImportError: h5py is not installed.
        ValueError: not a readable HDF5 file, or one without scores [N, L, H].
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with self._open() as file:
            found = file.get(_DATASET)
            shape = getattr(found, "shape", None)  # a group has none
            if shape is None or len(shape) != 3 or 0 in shape or found.dtype.kind != "f":
                raise ValueError(
                    f"score file '{self.path}' must hold floating-point scores [N, L, H] named"
                    f" '{_DATASET}'; it holds {_contents(file)}"
                )
            self.shape = tuple(shape)
            self.metadata = {
                name.removeprefix(_METADATA): _plain(value)
                for name, value in found.attrs.items()
                if name.startswith(_METADATA)
            }

    def __iter__(self) -> Iterator[torch.Tensor]:
        with self._open() as file:
            scores = file[_DATASET]
            # Whole storage chunks, so that each is decompressed once.
            stored = scores.chunks[0] if scores.chunks else 1
            step = -(-_PROMPTS // stored) * stored
            for first in range(0, len(scores), step):
                yield torch.from_numpy(scores[first : first + step]).float()

    def _open(self):
        try:
            import h5py
        except ImportError as error:
            raise ImportError(
                f"reading the HDF5 score file '{self.path}' needs h5py: `pip install h5py`"
            ) from error
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise ValueError(f"score file '{self.path}' cannot be read: {error}") from error


def _contents(file) -> str:
    return (
        ", ".join(
            f"'{name}' {list(item.shape)} {item.dtype}"
            if hasattr(item, "shape")
            else f"group '{name}'"
            for name, item in file.items()
        )
        or "nothing"
    )


def _plain(value: Any) -> Any:
    """The authors store lists and dictionaries as JSON text; numpy scalars become plain numbers."""
    if not isinstance(value, str):
        return value.tolist() if hasattr(value, "tolist") else value
    try:
        return json.loads(value)
    except ValueError:
        return value
