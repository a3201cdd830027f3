"""The obvious loop of the package, for models that the stack does not know."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny
from helpers.faults import Shifted
from helpers.prompts import error, pad, prompts, whole
from helpers.reference import Exact, loop
from helpers.unknown import UNKNOWN, unknown

from loki_plugin import attribute
from loki_plugin.analysing.analysis import analyse, convergence
from loki_plugin.analysing.attribution import plain
from loki_plugin.analysing.attribution.plain import integrate_plainly
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.analysing.attribution.quiet import quiet
from loki_plugin.model.anatomy import find_anatomy

LENGTHS = (9, 5, 9, 12)


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_a_family_that_the_stack_does_not_know_is_scored_exactly(model_type):
    model = unknown(model_type).double()
    ids = prompts(lengths=LENGTHS)
    with Exact():
        truth = loop(model, find_anatomy(model).down, ids, *quadrature("left", 3))
        scores = attribute(model, *pad(ids, "left"), n_steps=3)
    assert scores.dtype == torch.float64
    assert error(scores, truth) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_unknown_mixer_is_told_once_with_its_cost(dtype, our_log):
    model = tiny("llama", dtype=dtype)
    model.model.layers[1].input_layernorm = Shifted(model.model.layers[1].input_layernorm, 0.5)
    ids = prompts()
    scores = attribute(model, *pad(ids, "right"))
    told = list({r.getMessage() for r in our_log.records if "plain loop" in r.getMessage()})
    assert len(told) == 1 and "1 of its 3 layers" in told[0] and "21 passes" in told[0]
    assert "loki stability" in told[0]
    truth = loop(model, find_anatomy(model).down, ids, *quadrature("left", 7))
    assert error(scores, truth) <= (1e-5 if dtype is torch.float32 else 0.1)
    our_log.clear()
    attribute(model, *pad(ids, "right"))
    assert not [r for r in our_log.records if r.name.startswith("loki_plugin")]
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["qwen2", "qwen3_5", "falcon_h1", "jamba", "lfm2"])
@pytest.mark.parametrize("path", ["token", "sequence"])
def test_it_equals_the_stack_where_both_can(path, family):
    model, rule = tiny(family, dtype=torch.float64), quadrature("left", 4)
    anatomy, some = find_anatomy(model), whole(prompts(lengths=(9, 9)))
    with Exact():
        fast = analyse(model, anatomy, some, rule, path)
        with quiet(model) as own_attention, own_attention():
            slow = integrate_plainly(model, anatomy, some, rule, path)
    assert error(slow.scores, fast) <= 1e-10


def test_its_convergence_error_is_the_stacks(monkeypatch):
    model, rule = tiny("llama", dtype=torch.float64), quadrature("left", 3)
    some = whole(prompts())
    with Exact():
        fast = convergence(model, find_anatomy(model), some, rule)
        monkeypatch.setattr("loki_plugin.analysing.analysis.not_known", lambda *_: "for this test")
        slow = convergence(model, find_anatomy(model), some, rule)
    assert slow == pytest.approx(fast, rel=1e-9)


def test_memory_that_runs_out_halves_the_copies(monkeypatch):
    model, rule = tiny("llama", dtype=torch.float64), quadrature("left", 4)
    anatomy, some = find_anatomy(model), whole(prompts(lengths=(9, 9)))
    seen, inner = [], plain._gradients

    def full(model, anatomy, down, ids, *more):
        seen.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("full")
        return inner(model, anatomy, down, ids, *more)

    with Exact(), quiet(model) as own_attention, own_attention():
        expected = integrate_plainly(model, anatomy, some, rule, "token").scores
        monkeypatch.setattr(plain, "_gradients", full)
        found = integrate_plainly(model, anatomy, some, rule, "token").scores
    assert seen[:3] == [1, 7, 3] and max(seen[3:]) <= 3
    assert error(found, expected) <= 1e-12
    monkeypatch.setattr(plain, "_gradients", lambda *_: full(None, None, None, range(9)))
    with (
        quiet(model) as own_attention,
        own_attention(),
        pytest.raises(RuntimeError, match="one calibration prompt of 9 tokens does not fit"),
    ):
        integrate_plainly(model, anatomy, some, rule, "token")


def test_a_small_budget_runs_few_copies_at_once(monkeypatch):
    model, rule = tiny("llama"), quadrature("left", 4)
    anatomy, some = find_anatomy(model), whole(prompts(lengths=(9, 9)))
    seen, inner = [], plain._gradients
    monkeypatch.setattr(plain, "_gradients", lambda *a: seen.append(len(a[3])) or inner(*a))
    with quiet(model) as own_attention, own_attention():
        room = plain.Room(model, anatomy)
        integrate_plainly(model, anatomy, some, rule, "token", room)
        assert seen == [1, 7, 8, 8]  # one at first, then all copies of both prompts
        room.budget = int(2 * plain._BESIDE * room.kept_by_token * 9)
        seen.clear()
        integrate_plainly(model, anatomy, some, rule, "token", room)
    assert max(seen) == 2


def test_prompts_of_one_length_share_a_batch_once_the_first_was_measured(monkeypatch):
    model, rule = tiny("llama"), quadrature("left", 4)
    anatomy, some = find_anatomy(model), whole(prompts(lengths=(9,) * 5 + (7,)))
    seen, inner = [], plain.integrate_plainly
    monkeypatch.setattr(
        plain,
        "integrate_plainly",
        lambda m, a, p, *more: seen.append(len(p)) or inner(m, a, p, *more),
    )
    with quiet(model) as own_attention, own_attention():
        parts = list(plain.attribute_plainly(model, anatomy, some, rule, "token"))
        assert seen == [1, 4, 1] and torch.cat(parts).shape == (6, 3, 48)
        seen.clear()
        given = list(plain.attribute_plainly(model, anatomy, some, rule, "token", batch_size=2))
    assert seen == [2, 2, 1, 1]
    assert error(torch.cat(given), torch.cat(parts)) <= 1e-5
