"""Forgetting at an evaluation: the figures, the texts that they are of, and what they may cost."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import runs
from helpers.tokenizers import make_tokenizer

from loki_plugin import implant
from loki_plugin.analysing.calibration.prompts import Text
from loki_plugin.evaluating import watching
from loki_plugin.evaluating.held_back import (
    LEAST,
    MOST,
    affordable,
    held_back,
    row_length,
    within,
)
from loki_plugin.evaluating.watching import Watch, measure, path, under_limit
from loki_plugin.inputs import Inputs
from loki_plugin.protecting.texts import protecting_prompts


def texts(*lengths):
    torch.manual_seed(sum(lengths))
    return [Text(tuple(torch.randint(3, 300, (n,)).tolist())) for n in lengths]


@pytest.fixture(scope="module")
def tuned():
    model = implant(runs.model(), [[1, 4, 7, 9]] * 3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("tokens", [1, 40, 1024], ids=["alone", "some", "together"])
def test_the_figures_are_those_of_one_text_after_another(tuned, monkeypatch, tokens):
    monkeypatch.setattr(watching, "_ROWS", 7)
    prompts, own = texts(9, 3, 17, 5), texts(12, 1)
    total, same = 0.0, []
    with torch.no_grad():
        for text in prompts + own:
            ids = torch.tensor([text.ids])
            with tuned.disable_adapter():
                base = tuned(input_ids=ids).logits[0].double().log_softmax(-1)
            after = tuned(input_ids=ids).logits[0].double().log_softmax(-1)
            total += float((base.exp() * (base - after)).sum())
            same.append(bool(base[-1].argmax() == after[-1].argmax()))
    tuned.train()
    found = measure(tuned, prompts, own, tokens)
    assert tuned.training and 0 < sum(same[:4]) < 4
    assert found.kl == pytest.approx(total / 47, rel=1e-5) and found.kl > 0.01
    assert found.kept == sum(same[:4]) / 4
    assert measure(tuned, [], own).kept is None


def test_an_update_of_zero_has_forgotten_nothing():
    fresh = implant(runs.model(), [[1, 2]] * 3)
    found = measure(fresh, texts(9, 3, 17))
    assert (found.kl, found.kept) == (0.0, 1.0)


def test_the_texts_fit_what_the_run_can_pay_for():
    """100 steps of 50 tokens, 4 evaluations: 5 % of 3 x 5000 passes, two for a token."""
    paid = affordable(5000, 4)
    assert paid == pytest.approx(0.05 * 3 * 5000 / 4 / 2)
    prompts, own = texts(*range(5, 5 + MOST)), texts(*range(30, 30 + MOST))
    for tokens in (paid, 300, 10**9):
        found = within(prompts, own, tokens)
        assert sum(len(t.ids) for part in found for t in part) <= tokens or len(found[0]) == 2
    assert within(prompts, own, 10**9) == (prompts, own)
    few = within(prompts, own, 0)
    assert sum(map(len, few)) == LEAST and few == within(prompts, own, 1.0)
    assert sum(map(len, within(prompts[:1], own, 0))) == LEAST
    assert within(prompts[:1], [], 0) == (prompts[:1], [])


def test_rows_are_as_long_as_the_data_says():
    assert row_length([{"input_ids": [1] * n, "labels": [1] * n} for n in (2, 4, 9)]) == 5
    pairs = {"prompt_ids": [[1, 2]], "chosen_ids": [[1]], "rejected_ids": [[1, 2, 3]]}
    assert row_length(Dataset.from_dict(pairs)) == 6
    assert (
        row_length([{"text": "a"}]) is None and row_length([]) is None and row_length(None) is None
    )
    stream = Dataset.from_dict({"input_ids": [[1]]}).to_iterable_dataset()
    assert row_length(stream) is None


def test_nothing_that_protects_is_measured_on(tmp_path):
    model, tokenizer = runs.model(), make_tokenizer(tmp_path)
    config = runs.configure("builtin", tmp_path / "cache", protect="auto")
    inputs = Inputs.read(config)
    prompts, own = held_back(model, tokenizer, config, inputs)
    every = protecting_prompts(tokenizer, config, inputs)
    assert MOST - 2 < len(prompts) <= MOST and set(prompts) < set(every)
    assert 0 < len(own) <= MOST and not set(own) & set(prompts)
    assert (prompts, own) == held_back(model, tokenizer, config, inputs)  # now from the cache
    rest = Watch(prompts, own).without(every + own)
    assert len(rest) == len(every) - len(prompts) and not {*rest} & {*prompts, *own}
    plain = runs.configure("builtin", tmp_path / "cache")  # the same texts without protection
    assert held_back(model, tokenizer, plain, inputs) == (prompts, own)


@pytest.mark.parametrize(("count", "kept"), [(1, 0), (2, 1), (7, 1), (8, 1), (16, 2), (200, 15)])
def test_one_prompt_of_eight_is_held_back(tmp_path, monkeypatch, count, kept):
    found = texts(*range(5, 5 + count))
    monkeypatch.setattr("loki_plugin.evaluating.held_back.protecting_prompts", lambda *given: found)
    monkeypatch.setattr("loki_plugin.evaluating.held_back._written", lambda *given: [])
    config = runs.configure("builtin", tmp_path)
    prompts, own = held_back(None, None, config, Inputs(records=[None]))
    assert len(prompts) == kept and set(prompts) <= set(found) and own == []


def test_checkpoints_under_the_threshold_are_measured_ones_of_this_run(tmp_path):
    values = {0: 0.0, 2: 0.01, 4: 0.03, 5: 0.02, 6: 0.08, 8: float("nan")}
    history = [{"eval_loki_kl": kl, "step": step} for step, kl in values.items()]
    history.append({"loss": 1.0, "step": 3})
    for step in (2, 3, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = tmp_path / f"checkpoint-{step}" / "trainer_state.json"
        state.write_text(json.dumps({"log_history": [e for e in history if e["step"] <= step]}))

    def under(limit):
        return [int(f.name.partition("-")[2]) for f in under_limit(limit, history, tmp_path)]

    assert under(0.05) == [2, 4] and under(0.02) == [2] and under(0.001) == []
    again = {"eval_loki_kl": 0.0401, "step": 4}  # a run that resumes evaluates it once more
    history.append(again)
    assert under(0.05) == [2, 4] and [e["step"] for e in path(history)].count(4) == 1
    other = [{"eval_loki_kl": 0.029, "step": 4}]  # an earlier run has left it
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(
        json.dumps({"log_history": other})
    )
    assert under(0.05) == [2]


@pytest.mark.parametrize(
    ("error", "tries"),
    [(torch.OutOfMemoryError("CUDA out of memory"), [1024, 1]), (TypeError("no logits"), [1024])],
)
def test_a_failure_is_no_end_where_nothing_goes_by_the_figures(tuned, monkeypatch, error, tries):
    def fails(model, prompts, own, at_once):
        asked.append(at_once)
        raise error

    monkeypatch.setattr(watching, "measure", fails)
    trainer, asked = SimpleNamespace(model=tuned), []
    watch = Watch(texts(3), [])
    assert watch._figures(trainer) == {} and watch._off
    assert asked == tries
    with pytest.raises(RuntimeError, match=f"cannot be measured \\({error}\\), and this run stops"):
        Watch(texts(3), [], needed=True)._figures(trainer)
