"""Forgetting in a minute: against plain loops, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from helpers.families import FAMILIES, tiny
from helpers.prompts import prompts

from loki_plugin import implant
from loki_plugin.evaluating import compare, log_probabilities

LENGTHS = (9, 5, 12, 5)


def ids():
    return [p.tolist() for p in prompts(lengths=LENGTHS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_it_does_prompt_by_prompt(family):
    model = tiny(family)
    found = log_probabilities(model, ids())
    for row, prompt in zip(found, ids(), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
        assert torch.allclose(row, logits.log_softmax(-1), atol=1e-5)


def test_long_batches_are_cut_and_change_nothing(monkeypatch):
    from loki_plugin.evaluating import quick

    model = tiny("llama")
    whole = log_probabilities(model, ids() * 3)
    monkeypatch.setattr(quick, "_TOKENS", 10)
    assert torch.allclose(log_probabilities(model, ids() * 3), whole, atol=1e-5)


def test_the_models_mode_is_put_back_also_after_an_exception():
    model = tiny("llama").train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    log_probabilities(model, ids())
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(IndexError):
        log_probabilities(model, [[10**6]])
    assert [m.training for m in model.modules()] == modes


def test_an_untouched_adapter_has_forgotten_nothing():
    model = implant(tiny("llama"), [[0, 1], [2], [3]])
    with model.disable_adapter():
        base = log_probabilities(model, ids())
    answers = base.argmax(-1).tolist()
    found = compare(base, log_probabilities(model, ids()), [answers[0], None, answers[2], 0])
    assert found.kl == 0 and found.same_answer == 1
    assert found.accuracy_before == found.accuracy_after and found.flips_down == found.flips_up == 0


def test_figures_by_hand():
    base = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]).log()
    tuned = torch.tensor([[0.25, 0.75, 0.0], [0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log()
    found = compare(base, tuned, [0, 1, 2])
    by_hand = [
        0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log(),
        torch.tensor(0.0),
        0.1 * torch.tensor(1 / 8).log() + 0.8 * torch.tensor(8.0).log(),
    ]
    assert found.kl == pytest.approx(float(sum(by_hand) / 3), rel=1e-5)
    assert found.same_answer == pytest.approx(1 / 3)  # the first has a tie, which the first wins
    assert (found.accuracy_before, found.accuracy_after) == (1.0, pytest.approx(1 / 3))
    assert (found.flips_down, found.flips_up) == (2, 0)
    assert found.to_json()["p_value"] == 0.5
    assert "2 lost, 0 gained" in found.text()


def test_a_grown_vocabulary_is_compared_on_the_old_one_and_a_shrunken_one_is_refused():
    base, tuned = torch.full((2, 3), 1 / 3).log(), torch.full((2, 4), 1 / 4).log()
    assert compare(base, tuned).kl == pytest.approx(float(torch.tensor(4 / 3).log()))
    with pytest.raises(ValueError, match=r"base are \[2, 4\], of the tuned model \[2, 3\]"):
        compare(tuned, base)


def test_what_the_tuned_model_rules_out_is_infinitely_far():
    base, tuned = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert compare(base, tuned).kl == float("inf")


def test_a_model_that_answers_nan_is_not_near_its_base():
    base = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert torch.tensor(compare(base, torch.full((1, 3), float("nan"))).kl).isnan()
