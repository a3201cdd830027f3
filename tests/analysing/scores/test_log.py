"""The score log under real faults: kills, truncation, foreign files, full disks, races."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.scores import MANIFEST, N, make
from safetensors.torch import load_file, save_file

from loki_plugin.analysing.scores.log import ScoreLog, fill

# A worker that makes every missing shard, slowly, as a separate process.
WORKER = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from helpers.scores import MANIFEST, make
from loki_plugin.analysing.scores.log import ScoreLog, fill
folder, pause = sys.argv[1], float(sys.argv[2])
log = ScoreLog(folder, MANIFEST)
made = 0
def slowly(positions):
    time.sleep(pause)
    return make(positions)
print("started", flush=True)
with log.locked():
    for shard in log.missing():
        fill(log, slowly, [shard])
        made += len(log.prompts(shard))
        print(made, flush=True)
print("finished", made, flush=True)
"""


def start(folder, pause):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(pause)], stdout=subprocess.PIPE, text=True
    )


def finish(folder):
    log = ScoreLog(folder, MANIFEST)
    fill(log, make, log.missing())
    return log


def content(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if not p.name.startswith(".")}


def test_what_is_written_is_read_in_order(tmp_path):
    log = ScoreLog(tmp_path, MANIFEST)
    assert log.missing() == list(range(6)) and log.num_shards == 6
    fill(log, make, [5, 0, 3, 1, 2, 4])
    assert log.missing() == []
    assert torch.equal(torch.cat(list(log.read())), make(range(N)))
    again = ScoreLog(tmp_path, MANIFEST)
    assert again.missing() == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.0, 0.3, 0.7, 1.1, 1.7])  # of about 3 seconds
def test_kill_9_at_any_moment_and_resuming_gives_the_same_bytes(tmp_path, moment):
    finish(tmp_path / "whole")
    process = start(tmp_path / "killed", 0.5)
    assert process.stdout.readline() == "started\n"
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = ScoreLog(tmp_path / "killed", MANIFEST).missing()
    assert left, "the worker was to be killed before its end"
    finish(tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_a_truncated_shard_is_made_again(tmp_path, size):
    finish(tmp_path)
    before = content(tmp_path)
    shard = tmp_path / "scores-00002.safetensors"
    os.truncate(shard, size if size >= 0 else shard.stat().st_size - 1)
    assert ScoreLog(tmp_path, MANIFEST).missing() == [2]
    finish(tmp_path)
    assert content(tmp_path) == before


def test_a_flipped_bit_is_found(tmp_path):
    finish(tmp_path)
    shard = tmp_path / "scores-00004.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert ScoreLog(tmp_path, MANIFEST).missing() == [4]


def test_another_analysis_is_refused(tmp_path):
    finish(tmp_path)
    with pytest.raises(ValueError, match="score log of another analysis"):
        ScoreLog(tmp_path, MANIFEST | {"by": 2})


def test_a_shard_of_another_log_or_place_is_refused(tmp_path):
    finish(tmp_path / "a")
    other = ScoreLog(tmp_path / "b", MANIFEST | {"by": 2})
    other.write(0, make(range(64)))
    (tmp_path / "b" / "scores-00000.safetensors").replace(
        tmp_path / "a" / "scores-00000.safetensors"
    )
    with pytest.raises(ValueError, match="scores-00000.*belongs to another analysis"):
        ScoreLog(tmp_path / "a", MANIFEST).missing()
    finish(tmp_path / "c")
    moved = tmp_path / "c" / "scores-00001.safetensors"
    moved.replace(tmp_path / "c" / "scores-00002.safetensors")
    with pytest.raises(ValueError, match="scores-00002.*belongs to another analysis"):
        ScoreLog(tmp_path / "c", MANIFEST).missing()


def test_a_stranger_without_our_marks_is_refused(tmp_path):
    finish(tmp_path)
    shard = tmp_path / "scores-00000.safetensors"
    save_file(load_file(shard), shard)
    with pytest.raises(ValueError, match="was not written by this log"):
        ScoreLog(tmp_path, MANIFEST).missing()


def test_scores_of_a_wrong_shape_are_refused(tmp_path):
    log = ScoreLog(tmp_path, MANIFEST)
    with pytest.raises(ValueError, match=r"shard 5 takes scores \[7, 2, 8\], got \[64, 2, 8\]"):
        log.write(5, make(range(64)))


@pytest.mark.slow
def test_two_processes_that_start_together_do_the_work_once(tmp_path):
    workers = [start(tmp_path / "shared", 0.05) for _ in range(2)]
    outputs = [w.communicate(timeout=120)[0] for w in workers]
    made = sorted(int(o.split()[-1]) for o in outputs)
    assert made == [0, N]
    assert [w.returncode for w in workers] == [0, 0]
    finish(tmp_path / "whole")
    assert content(tmp_path / "whole") == content(tmp_path / "shared")


def test_a_shard_is_written_while_the_next_is_made(tmp_path, monkeypatch):
    """The device never waits for the disk, and no shard begins before the last but one is safe."""
    log, write = ScoreLog(tmp_path, MANIFEST), ScoreLog.write
    begun, written, seen = threading.Event(), [], []

    def slowly(self, shard, scores):
        if shard == 0:
            assert begun.wait(20), "shard 1 is not begun before shard 0 is written"
        write(self, shard, scores)
        written.append(shard)

    def making(positions):
        if positions.start == 64:
            begun.set()
        seen.append((positions.start // 64, set(written)))
        return make(positions)

    monkeypatch.setattr(ScoreLog, "write", slowly)
    fill(log, making, log.missing())
    assert written == list(range(6)) and log.missing() == []
    assert all(set(range(shard - 1)) <= before for shard, before in seen)


@pytest.mark.parametrize("faulty", [0, 5])
def test_an_error_of_the_writer_is_the_callers(tmp_path, monkeypatch, faulty):
    """Of an early shard and of the last one; what was written before and after resumes."""
    log, write, made = ScoreLog(tmp_path, MANIFEST), ScoreLog.write, []

    def breaking(self, shard, scores):
        if shard == faulty:
            raise OSError("the disk is gone")
        write(self, shard, scores)

    monkeypatch.setattr(ScoreLog, "write", breaking)
    with pytest.raises(OSError, match="the disk is gone"):
        fill(log, lambda p: made.append(p.start // 64) or make(p), log.missing())
    assert made == list(range(min(faulty + 2, 6)))  # nothing is made that could not be kept
    monkeypatch.undo()
    assert faulty in log.missing()
    assert torch.equal(torch.cat(list(finish(tmp_path).read())), make(range(N)))


def test_a_shard_that_was_made_is_kept_when_the_next_fails(tmp_path):
    log = ScoreLog(tmp_path, MANIFEST)

    def breaking(positions):
        if positions.start:
            raise RuntimeError("no device")
        return make(positions)

    with pytest.raises(RuntimeError, match="no device"):
        fill(log, breaking, log.missing())
    assert ScoreLog(tmp_path, MANIFEST).missing() == [1, 2, 3, 4, 5]


def test_a_full_disk_is_named_and_keeps_the_finished_shards(tmp_path):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(tmp_path)], capture_output=True
    )
    if mount.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mount.stderr.decode().strip()}")
    try:
        log = ScoreLog(tmp_path, MANIFEST)
        with pytest.raises(OSError, match="no space left for 'scores-0000.*finished shards are"):
            fill(log, make, log.missing())
        left = ScoreLog(tmp_path, MANIFEST).missing()
        assert 0 < len(left) < 6
        assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*partial"))
        subprocess.run(["mount", "-o", "remount,size=1m", str(tmp_path)], check=True)
        assert torch.equal(torch.cat(list(finish(tmp_path).read())), make(range(N)))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
