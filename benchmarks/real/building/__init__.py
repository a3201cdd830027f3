"""Builds the data folder out of public repositories: `python -m benchmarks.real data`.

What a file comes from and its SHA-256 are in `sources.py`, how it comes about in `measured.py`
and `taught.py`. None of its lines is part of this project.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from benchmarks.real.building.reading import Gone, Reader, Unreachable, told
from benchmarks.real.building.sources import FILES, File
from loki_plugin.model.writing import replacing


def build(folder: Path, reader: Reader) -> list[str]:
    """Makes the files of `FILES` that `folder` does not have; returns what went wrong.

    A file that is there is never fetched or written again. What is made is checked by its SHA-256
    before it gets its name.

    Raises:
        OSError: the folder cannot be written.
    """
    wrong = []
    for name, file in FILES.items():
        path = folder / name
        if path.is_file():
            found = _sha256(path.read_bytes())
            if found == file.sha256:
                print(f"{name}: there already", flush=True)
                continue
            wrong.append(
                f"{name}: '{path}' has the SHA-256 {found}, expected {file.sha256}; it was left as"
                " it is: remove it to have it built"
            )
            continue
        try:
            made = _made(name, file, reader)
        except Unreachable as error:
            missing = sum(not (folder / n).is_file() for n in FILES)
            wrong.append(
                f"{name}: {error}\n{missing} of {len(FILES)} files are missing. The same command"
                " with a network fetches them and no others; without one, --repositories FOLDER"
                " reads them from git repositories on this machine"
            )
            break
        except Gone as error:
            wrong.append(f"{name}: {error}")
            continue
        if (found := _sha256(made)) != file.sha256:
            sources = ", ".join(told(*source) for source in file.sources)
            wrong.append(
                f"{name}: what was made of {sources} has the SHA-256 {found}, expected"
                f" {file.sha256}; it was not kept: what was fetched is not what stood there, or"
                " the recipe has changed"
            )
            continue
        with replacing(path) as temporary:
            temporary.write_bytes(made)
        print(f"{name}: built", flush=True)
    return wrong


def _made(name: str, file: File, reader: Reader) -> bytes:
    texts = reader.texts(file.sources)
    try:
        return file.recipe(texts).encode()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        sources = ", ".join(told(*source) for source in file.sources)
        raise Gone(f"{sources} is not in the shape that is expected: {error!r:.300}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
