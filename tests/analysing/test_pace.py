"""The pace of an analysis: told once, early, and only where it is known and too slow."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny

from loki_plugin.analysing import pace
from loki_plugin.analysing.analysis import analyse
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.analysing.calibration.prompts import Prompt
from loki_plugin.analysing.pace import Pace, duration, why_elsewhere
from loki_plugin.model.anatomy import find_anatomy


def told(steps, total):
    """What a pace tells after each (second, prompts done since)."""
    now, said = [0.0], []
    watch = Pace(total, said.append, lambda: now[0])
    found = []
    for second, count in steps:
        now[0] = second
        watch.update(count)
        found.append(list(said))
    return found


def test_the_whole_is_told_once_from_the_pace_so_far():
    # 4 prompts in 6 s: 100 take 150 s. The pace is not known at 3 s.
    assert told([(3, 2), (6, 2), (9, 2)], 100) == [[], [150.0], [150.0]]
    assert told([(6, 10), (12, 10)], 100) == [[], []]  # a minute in all, which is the limit
    assert told([(6, 20), (20, 20)], 200) == [[], [100.0]]  # it has become slower


@pytest.mark.parametrize(
    "device, sharded, gpu, why",
    [
        ("cuda", True, True, None),
        ("cpu", False, False, None),
        ("cpu", False, True, "though there is a GPU"),
        ("cpu", True, False, "sharded"),
    ],
)
def test_why_another_place_is_better(monkeypatch, device, sharded, gpu, why):
    monkeypatch.setattr(pace, "gpu_is_there", lambda: gpu)
    found = why_elsewhere(torch.device(device), sharded)
    assert found is None if why is None else why in found


def test_durations_are_read_at_a_glance():
    said = [duration(s) for s in (0.0, 4e-4, 6e-4, 0.04, 0.84, 9.9, 59.6, 119, 130, 7100, 9000)]
    assert said[:4] == ["under 1 ms", "under 1 ms", "1 ms", "40 ms"]
    assert said[4:] == ["0.8 s", "9.9 s", "60 s", "119 s", "2 min", "118 min", "2.5 h"]


def test_every_batch_is_told_as_it_is_done():
    """A bar that moves once per shard of 64 prompts stands still for an hour on a CPU."""
    model, done = tiny("llama"), []
    prompts = [Prompt((i + 1, i + 2, 3), None) for i in range(5)]
    analyse(
        model, find_anatomy(model), prompts, quadrature("left", 3), batch_size=2, done=done.append
    )
    assert sum(done) == 5 and max(done) <= 2
