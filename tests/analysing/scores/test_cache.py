"""The cache of score logs: what is found again, what is dropped, and what is never touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time

import pytest
import torch
from click.testing import CliRunner

from loki_plugin.analysing.calibration.prompts import Calibration, Prompt
from loki_plugin.analysing.scores import cache
from loki_plugin.analysing.scores.cache import (
    cache_folder,
    entries,
    find_log,
    fingerprint_of,
    kept,
    open_log,
    strangers,
    use,
)
from loki_plugin.analysing.scores.log import ScoreLog, fill
from loki_plugin.analysing.scores.pruning import clear, prune
from loki_plugin.cli import loki

PROMPTS = [Prompt((i, i + 1), None) for i in range(70)]
CALIBRATION = Calibration(PROMPTS, 0, "here")
MARK = {"config": "c", "identity": "i", "weights": "w", "quantisation": "none:float32"}
SETTINGS = {"steps": 7, "rule": "left", "path": "token"}


def make(positions):
    return torch.stack([torch.arange(16.0).view(2, 8) * (i + 1) for i in positions])


def analysis(folder, weights="w", used=None) -> ScoreLog:
    """A finished analysis of a model with these weights; `used` is its age in seconds."""
    log = open_log(folder, MARK | {"weights": weights}, CALIBRATION, SETTINGS, 2, 8, "model")
    fill(log, make, log.missing())
    if used is not None:
        for path in log.folder.iterdir():
            then = path.stat().st_mtime - used
            os.utime(path, (then, then))
    return log


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def run(*arguments):
    return CliRunner().invoke(loki, ["cache", *map(str, arguments)])


def test_a_log_that_version_0_1_1_wrote_is_found_again(tmp_path):
    manifest = {
        "loki_plugin": "0.1.1",
        "fingerprint": MARK,
        "calibration": CALIBRATION.hash,
        "settings": SETTINGS,
        "num_layers": 2,
        "hidden_size": 8,
        "prompts": [p.key for p in PROMPTS],
    }
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:20]
    old = ScoreLog(tmp_path / key, manifest | {"model": "its/name"})
    fill(old, make, old.missing())
    # What newer fingerprints say besides, and the release that asks, do not change the scores.
    new = open_log(tmp_path, MARK | {"half": "h"}, CALIBRATION, SETTINGS, 2, 8, "other/name")
    assert new.folder == old.folder and new.missing() == []
    assert torch.equal(torch.cat(list(new.read())), make(range(70)))


def test_8_bit_scores_of_version_0_1_1_are_others(tmp_path):
    """They came from another product."""
    mark = MARK | {"quantisation": "bnb-int8"}
    log = open_log(tmp_path, mark, CALIBRATION, SETTINGS, 2, 8, "model")
    assert log.manifest["loki_plugin"] != "0.1.1"


@pytest.mark.parametrize("content", ['{"name": "an app"}', "[1]", "oops", '{"model": "m"}'])
def test_folders_of_others_are_named_and_never_deleted(tmp_path, content):
    log = analysis(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "manifest.json").write_text(content)
    assert [e.key for e in entries(tmp_path)] == [log.folder.name]
    assert strangers(tmp_path) == ["theirs"]
    listed = run("list", "--dir", tmp_path)
    assert listed.exit_code == 0 and listed.output.startswith("1 analyses")
    assert "theirs  is not ours" in listed.output
    assert run("clear", "theirs", "--dir", tmp_path).exit_code == 1
    assert "removed 1 analyses" in run("clear", "--dir", tmp_path).output
    assert prune(tmp_path, 1e-12, keep="") == []
    assert files(tmp_path) == ["theirs/manifest.json"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS], ids=["another user's", "read-only"])
def test_a_finished_analysis_that_cannot_be_written_is_used_and_an_unfinished_one_is_named(
    tmp_path, monkeypatch, number
):
    log = analysis(tmp_path)

    def denied(*given, **more):
        raise OSError(number, os.strerror(number))  # of EACCES a PermissionError

    monkeypatch.setattr(os, "utime", denied)
    monkeypatch.setattr("loki_plugin.analysing.scores.log.FileLock.acquire", denied)
    monkeypatch.setattr("loki_plugin.analysing.scores.log._write", denied)
    again = open_log(tmp_path, MARK, CALIBRATION, SETTINGS, 2, 8, "model")
    with again.locked():
        assert torch.equal(next(again.read()), next(log.read()))
    assert again.fact("error", lambda: 0.5) == 0.5
    assert prune(tmp_path, 0.0, keep="none") == [] and len(entries(tmp_path)) == 1
    next(log.folder.glob("*.safetensors")).unlink()
    again = open_log(tmp_path, MARK, CALIBRATION, SETTINGS, 2, 8, "model")
    with pytest.raises(
        ValueError, match=f"cannot be written .{os.strerror(number)}. and is not complete"
    ):
        with again.locked():
            raise AssertionError("nothing may be written")


def test_rows_from_the_cache_know_the_model_in_the_other_half_precision_too(tmp_path):
    whole = MARK | {"half": "h", "packed": "p"}
    log = open_log(tmp_path, whole, CALIBRATION, SETTINGS, 2, 8, "model")
    assert fingerprint_of(log) == whole
    old = analysis(tmp_path / "old")
    manifest = json.loads((old.folder / "manifest.json").read_text())
    for since in ("packed", "half"):  # as before 0.6.0, and before 0.5.0
        del manifest[since], whole[since]
        (old.folder / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, indent=1))
        newer = MARK | {"half": None, "packed": "p"}
        again = open_log(tmp_path / "old", newer, CALIBRATION, SETTINGS, 2, 8, "model")
        assert again.folder == old.folder and "packed" not in fingerprint_of(again)
    assert fingerprint_of(again) == MARK == whole


def test_a_copied_analysis_under_another_name_is_not_ours_to_delete(tmp_path):
    log = analysis(tmp_path)
    log.folder.rename(tmp_path / "backup")
    assert entries(tmp_path) == [] and strangers(tmp_path) == ["backup"]
    assert clear(tmp_path) == ([], []) and (tmp_path / "backup").is_dir()


def test_files_of_others_in_our_folders_stay(tmp_path):
    log = analysis(tmp_path)
    log.fact("convergence_error", lambda: 0.1)
    (log.folder / ".x.partial").touch()
    for name in ("notes.txt", "scores.safetensors", "sub/manifest.json"):
        (log.folder / name).parent.mkdir(exist_ok=True)
        (log.folder / name).touch()
    for place, suffix in KEPT:
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{'a' * 20}.{suffix}").touch()
        (tmp_path / place / "notes.txt").touch()
    assert clear(tmp_path) == ([log.folder.name], [])
    left = [f"{log.folder.name}/{n}" for n in ("notes.txt", "scores.safetensors")]
    left += [f"{log.folder.name}/sub/manifest.json", "directions/notes.txt", "texts/notes.txt"]
    assert files(tmp_path) == sorted(left)


def protected(folder, key, used, size=10_000, place="directions", suffix="safetensors"):
    """A file of protected directions, or of texts; `used` is as in `analysis`."""
    (folder / place).mkdir(exist_ok=True)
    file = folder / place / f"{key * 20}.{suffix}"
    file.write_bytes(bytes(size))
    then = int(time.time()) - used
    os.utime(file, (then, then - 50))
    return file


def test_protected_directions_count_and_go_by_their_last_use_as_analyses_do(tmp_path):
    log = analysis(tmp_path, used=500)
    size = entries(tmp_path)[0].bytes
    old, new = protected(tmp_path, "a", 1000), protected(tmp_path, "b", 100)
    made = old.stat().st_mtime_ns
    limit = (size + 20_000) / 1e9
    assert prune(tmp_path, limit, keep="") == []
    use(old)
    assert old.stat().st_mtime_ns == made  # its age stays
    assert prune(tmp_path, limit - 1e-9, keep="") == [log.folder.name]
    assert prune(tmp_path, 15_000 / 1e9, keep="b" * 20) == ["a" * 20]
    assert new.exists() and not log.folder.exists()
    assert prune(tmp_path, 1e-9, keep="b" * 20) == []  # the one just written stays
    assert prune(tmp_path, 1e-9, keep="") == ["b" * 20] and list(tmp_path.iterdir()) == []


KEPT = {("directions", "safetensors"): "protected directions",
        ("texts", "jsonl"): "texts of the model's own"}  # fmt: skip


@pytest.mark.parametrize(("where", "what"), KEPT.items())
def test_what_is_kept_beside_analyses_is_listed_and_cleared_by_its_key(tmp_path, where, what):
    log = analysis(tmp_path)
    place, suffix = where
    for key, used in (("a", 100), ("b", 1000)):
        protected(tmp_path, key, used, place=place, suffix=suffix)
    told = run("list", "--dir", tmp_path).output
    assert f"{'a' * 20}  {what}, 0.0 MiB" in told and log.folder.name in told
    result = run("clear", "a" * 20, "--dir", tmp_path)
    assert result.exit_code == 0 and "removed 0 analyses" in result.output
    assert f"removed 1 files of {what}" in result.output
    assert [(k.place, k.key) for k in kept(tmp_path)] == [(place, "b" * 20)]
    assert log.folder.exists()


def test_an_analysis_that_runs_keeps_its_log(tmp_path):
    busy, idle = analysis(tmp_path, "busy", used=100), analysis(tmp_path, "idle")
    with busy.locked():
        result = run("clear", busy.folder.name, "--dir", tmp_path)
        assert result.exit_code == 1 and "is in use by a running analysis" in result.output
        assert prune(tmp_path, 1e-12, keep=idle.folder.name) == []
        result = run("clear", "--dir", tmp_path)
        assert "removed 1 analyses" in result.output
        assert f"{busy.folder.name}  is in use" in result.output
        assert busy.missing() == [] and not idle.folder.exists()
    assert run("clear", busy.folder.name, "--dir", tmp_path).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_was_cleared_before_it_was_locked_is_begun_again(tmp_path):
    log = analysis(tmp_path)
    clear(tmp_path)
    with log.locked():
        assert log.missing() == [0, 1]
        fill(log, make, [0, 1])
    assert find_log(tmp_path).missing() == []


def test_the_home_of_the_user_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    """In a .env file or behind `--dir=` no shell expands it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOKI_CACHE_DIR", "~/kept")
    assert cache_folder() == tmp_path / "kept" and cache_folder("~/x") == tmp_path / "x"
    with pytest.raises(ValueError, match="names the home of nobody here"):
        cache_folder("~nobody-here/x")


def test_what_another_run_has_just_removed_is_passed_over(tmp_path, monkeypatch):
    gone = [analysis(tmp_path, weights=w).folder for w in "ab"][0]
    read = cache._read

    def removed(path):
        found = read(path)
        if path.parent == gone:
            shutil.rmtree(gone)
        return found

    monkeypatch.setattr(cache, "_read", removed)
    assert len(entries(tmp_path)) == 1


def test_what_was_being_written_when_a_run_was_killed_goes_a_day_later(tmp_path):
    names = [f"{c * 20}.safetensors1234.tmp" for c in "ab"] + ["other.tmp"]
    folder = tmp_path / cache.DIRECTIONS
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    for name in names[1:]:
        os.utime(folder / name, (time.time() - 90_000,) * 2)
    prune(tmp_path, None, "")
    assert sorted(p.name for p in folder.iterdir()) == sorted([names[0], names[2]])


def test_beyond_the_limit_what_was_used_longest_ago_goes_first(tmp_path):
    logs = [analysis(tmp_path, str(i), used=1000 - 100 * i) for i in range(4)]
    names = [log.folder.name for log in logs]
    size = entries(tmp_path)[0].bytes / 1e9
    assert prune(tmp_path, None, keep="") == prune(tmp_path, 4 * size, keep="") == []
    # Asked for again: the oldest is now the last to go.
    assert analysis(tmp_path, "0").folder == logs[0].folder
    assert prune(tmp_path, 2.5 * size, keep=names[3]) == [names[1], names[2]]
    assert {e.key for e in entries(tmp_path)} == {names[0], names[3]}
    # The one just written stays, whatever it takes.
    assert prune(tmp_path, size / 2, keep=names[3]) == [names[0]]
    assert [e.key for e in entries(tmp_path)] == [names[3]]
