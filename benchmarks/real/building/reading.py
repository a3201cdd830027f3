"""Public files at known commits: out of the network, or of git repositories on this machine.

Both ways read with git. Out of the network comes only what is asked for: a commit, its folders,
and the wanted files of it in one request; GitHub's host for single raw files refuses hundreds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from benchmarks.real.building.lines import Texts
from benchmarks.real.building.sources import COMMITS

HOST = "https://github.com"
_WAITS = (1, 5)  # seconds before a host is asked again
_ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY")  # set in hooks


class Gone(RuntimeError):
    """A public file could not be had; others may."""


class Unreachable(RuntimeError):
    """No public file can be had."""


class Reader:
    """Texts of public files, each read once.

    Args:
        repositories: a folder with git repositories `OWNER+NAME` or `OWNER/NAME`, bare or not,
            that have the commits of `sources.COMMITS`; none: the files come out of the network.
        host: what has the repositories `HOST/OWNER/NAME`; default: `HOST`.
    """

    def __init__(self, repositories: Path | None = None, host: str = ""):
        self.repositories, self.host = repositories, host or HOST
        self._texts: dict[tuple[str, str], str] = {}

    @cached_property
    def _fetched(self) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="loki-real-data-")  # goes with `self`

    def texts(self, sources: tuple[tuple[str, str], ...]) -> Texts:
        """The files (repository, path) of `sources` at their commits, by their paths.

        Raises:
            Gone: a repository, a commit or a file is not there, or it is no UTF-8.
            Unreachable: the host does not answer, or there is no git.
        """
        wanted = defaultdict(list)
        for repository, path in sources:
            if (repository, path) not in self._texts:
                wanted[repository].append(path)
        for repository, paths in wanted.items():
            place = (self._fetch if self.repositories is None else self._find)(repository, paths)
            for path in paths:
                raw = _git(place, "cat-file", "blob", f"{COMMITS[repository]}:{path}")
                if raw.returncode:
                    raise Gone(
                        f"{told(repository, path)}: git finds no such file in '{place}':"
                        f" {_why(raw)}"
                    )
                try:
                    self._texts[repository, path] = raw.stdout.decode()
                except UnicodeDecodeError as error:
                    raise Gone(f"{told(repository, path)} is no UTF-8: {error}") from error
        return {path: self._texts[repository, path] for repository, path in sources}

    def _find(self, repository: str, paths: list[str]) -> Path:
        assert self.repositories is not None
        flat = self.repositories / repository.replace("/", "+")
        nested = self.repositories / repository
        for place in (flat, nested):
            if place.is_dir():
                return place
        raise Gone(
            f"{told(repository, paths[0])}: neither '{flat}' nor '{nested}' is there; clone"
            f" https://github.com/{repository} to one of them"
        )

    def _fetch(self, repository: str, paths: list[str]) -> Path:
        """A repository of its own with the commit, its folders, and the files of `paths`."""
        place = Path(self._fetched.name) / repository.replace("/", "+")
        commit, url = COMMITS[repository], f"{self.host}/{repository}"
        if not place.is_dir():
            try:
                place.mkdir()
                for made in (("init", "-q", "--bare"), ("remote", "add", "origin", url)):
                    _git(place, *made).check_returncode()
                _ask(place, told(repository, paths[0]), url, "--depth=1", "origin", commit)
            except BaseException:
                shutil.rmtree(place)  # or it would count as fetched
                raise
        listed = _git(place, "ls-tree", "-z", "-r", commit, "--", *paths).stdout.decode()
        blobs = [line.split("\t")[0].split()[2] for line in listed.split("\0") if line]
        if blobs:  # else: reading says what is missing
            _ask(place, told(repository, paths[0]), url, "origin", *blobs)
        return place


def _ask(place: Path, what: str, url: str, *arguments: str) -> None:
    """`git fetch` without files that were not asked for; a host that is busy is asked again."""
    command = "fetch -q --no-tags --no-write-fetch-head --filter=blob:none".split()
    for wait in (*_WAITS, None):
        found = _git(place, "-c", "fetch.negotiationAlgorithm=noop", *command, *arguments)
        if not found.returncode:
            return
        if "unable to access" not in _why(found):  # git's words for a host that does not answer
            raise Gone(f"{what}: {url} does not have it: {_why(found)}")
        if wait is not None:
            time.sleep(wait)
    raise Unreachable(f"{what}: {url} does not answer: {_why(found)}")


def _git(place: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Runs git in the repository `place`; one that lies above it does not count."""
    around = {k: v for k, v in os.environ.items() if k not in _ELSEWHERE}
    ours = {
        "GIT_CEILING_DIRECTORIES": str(place.absolute().parent),
        "GIT_TERMINAL_PROMPT": "0",  # a repository that is gone would ask for a password
        "LC_ALL": "C",
    }
    command = ["git", "-C", str(place), *arguments]
    try:
        return subprocess.run(command, capture_output=True, env={**around, **ours})
    except FileNotFoundError as error:
        raise Unreachable("git reads the public files, and it is not installed") from error


def _why(ran: subprocess.CompletedProcess[bytes]) -> str:
    return " ".join(ran.stderr.decode(errors="replace").split())


def told(repository: str, path: str) -> str:
    """A public file as README.md names it."""
    return f"{repository}@{COMMITS[repository][:12]}:{path}"
