"""The score log: scores go to disk as they are made, and a killed run goes on where it stopped.

A folder holds `manifest.json` (what was analysed, with which settings, on which prompts) and one
safetensors file per shard of consecutive prompts. Shards are cut by the prompt list alone, so that
a resumed run ends with the bytes of an uninterrupted one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

LOG = logging.getLogger("loki_plugin")
MANIFEST = "manifest.json"
SHARD_PROMPTS = 64
_LOCK = ".lock"
# What a log writes: manifest and facts, shards, and what a killed writer left of them.
_OURS = re.compile(r"[a-z_]+\.json|scores-\d{5}\.safetensors|\..*\.partial|\.lock")


class ScoreLog:
    """Scores [N, L, H] of N prompts in shards on disk; append-only.

    Args:
        folder: made if it is not there.
        manifest: JSON with `prompts` (the keys of the N prompts in canonical order) and
            `num_layers`, `hidden_size`, and whatever else tells this analysis from another.

    Raises:
        ValueError: the folder holds the log of another analysis.
    """

    def __init__(self, folder: str | os.PathLike, manifest: dict[str, Any]):
        self.folder = Path(folder)
        self.manifest = manifest
        self.shape = (manifest["num_layers"], manifest["hidden_size"])
        content = json.dumps(manifest, sort_keys=True, indent=1)
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        self._content = content
        self._sound: set[int] = set()
        self._claim()

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / MANIFEST
        if not path.exists():
            self._sound.clear()
            _write(path, self._content.encode())
        elif path.read_text(encoding="utf-8") != self._content:
            raise ValueError(
                f"'{self.folder}' is the score log of another analysis; give another cache_dir or"
                " clear it with `loki cache clear`"
            )

    @property
    def num_shards(self) -> int:
        return shards_of(len(self.manifest["prompts"]))

    def prompts(self, shard: int) -> range:
        """Positions of the shard's prompts in the canonical order."""
        first = shard * SHARD_PROMPTS
        return range(first, min(first + SHARD_PROMPTS, len(self.manifest["prompts"])))

    def missing(self) -> list[int]:
        """Shards still to be made. A damaged one counts as missing; it is made again.

        Raises:
            ValueError: a shard that another analysis wrote.
        """
        return [i for i in range(self.num_shards) if not self._is_sound(i)]

    def write(self, shard: int, scores: torch.Tensor) -> None:
        """Store the scores [n, L, H] of a shard; it is there whole or not at all.

        Raises:
            OSError: no space is left; the finished shards stay.
        """
        expected = (len(self.prompts(shard)), *self.shape)
        if scores.shape != expected:
            raise ValueError(
                f"shard {shard} takes scores {list(expected)}, got {list(scores.shape)}"
            )
        scores = scores.float().contiguous()
        about = {"log": self.digest, "shard": shard, "checksum": _checksum(scores)}
        # One entry: safetensors writes several in no fixed order, and bytes are to be reproducible.
        _write(self._path(shard), save({"scores": scores}, {"loki": json.dumps(about)}))
        self._sound.add(shard)

    def read(self) -> Iterator[torch.Tensor]:
        """The scores of all prompts in canonical order, shard by shard: [n, L, H] float32."""
        return map(self.scores, range(self.num_shards))

    def scores(self, shard: int) -> torch.Tensor:
        """The scores of one finished shard: [n, L, H] float32."""
        with safe_open(self._path(shard), "pt") as file:
            return file.get_tensor("scores")

    def fact(self, name: str, make: Callable[[], float]) -> float:
        """A figure about the scores: made the first time, then read from beside them."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            made = make()
            try:
                _write(path, json.dumps(made).encode())
            except OSError:  # another user's log, or one that is not to be written
                return made
        return json.loads(path.read_text(encoding="utf-8"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out; a second one waits here and then finds the work done."""
        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            LOG.info("loki: another process analyses the same model; waiting for it")
            lock.acquire()
        except OSError as error:  # another user's, or mounted to be read
            if self.missing():
                raise ValueError(
                    f"'{self.folder}' cannot be written ({error.strerror or error}) and is not"
                    " complete; set `loki.cache_dir` to a folder of your own"
                ) from error
            yield  # there is nothing left to write
            return
        try:
            self._claim()  # the cache may have been cleared meanwhile
            yield
        finally:
            lock.release()

    def age_and_size(self) -> tuple[float, int]:
        """Seconds since the last shard was written, and bytes in all."""
        files = [f.stat() for f in self.folder.glob("*.safetensors")]
        return time.time() - max(f.st_mtime for f in files), sum(f.st_size for f in files)

    def _path(self, shard: int) -> Path:
        return self.folder / f"scores-{shard:05d}.safetensors"

    def _is_sound(self, shard: int) -> bool:
        if shard in self._sound:
            return True
        path = self._path(shard)
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("loki", "{}"))
                scores = file.get_tensor("scores")
        except (SafetensorError, OSError) as error:
            LOG.warning("loki: shard %s is damaged (%s) and will be made again", path.name, error)
            return False
        if about.get("log") != self.digest or about.get("shard") != shard:
            raise ValueError(
                f"'{path}' belongs to another analysis; it was not written by this log. Remove it,"
                " or clear the cache with `loki cache clear`"
            )
        if about["checksum"] != _checksum(scores):
            LOG.warning("loki: shard %s fails its checksum and will be made again", path.name)
            return False
        self._sound.add(shard)
        return True


def shards_of(prompts: int) -> int:
    """How many shards that many prompts fill."""
    return -(-prompts // SHARD_PROMPTS)


def remove_log(folder: Path) -> bool:
    """Delete the log's own files, and the folder if nothing else is in it; False if it is in use.

    The manifest goes last, so that what is left of a removal that was cut off is still known.
    """
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        ours = [p for p in folder.iterdir() if p.is_file() and _OURS.fullmatch(p.name)]
        for path in sorted(ours, key=lambda p: (p.name == _LOCK, p.name == MANIFEST)):
            path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()
    finally:
        lock.release()
    return True


def fill(log: ScoreLog, make: Callable[[range], torch.Tensor], shards: list[int]) -> None:
    """Make and store the given shards: one is written while the next is made.

    Raises:
        OSError: as `ScoreLog.write`; for a shard that the disk refused, before the next but one is
            begun.
    """
    with ThreadPoolExecutor(1, "loki-writer") as writer:
        writing: Future[None] | None = None
        for shard in shards:
            scores = make(log.prompts(shard))
            if writing is not None:
                writing.result()
            writing = writer.submit(log.write, shard, scores)
        if writing is not None:
            writing.result()


def _checksum(scores: torch.Tensor) -> str:
    return hashlib.sha256(scores.numpy()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write, sync and rename: whatever kills us leaves the whole file or none."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"no space left for '{path.name}' ({len(content) / 2**20:.1f} MiB) in"
                f" '{path.parent}'. The finished shards are kept: free some space and run again,"
                " or set loki.cache_dir to a larger disk",
            ) from error
        raise
