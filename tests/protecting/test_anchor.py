"""The anchor: KL(base ‖ tuned) on calibration prompts, inside a real Trainer."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from helpers.families import tiny
from helpers.merging import shaken
from helpers.prompts import prompts
from transformers import Trainer, TrainingArguments

from loki_plugin import implant
from loki_plugin.implanting import selected
from loki_plugin.model.causal import looks_ahead
from loki_plugin.protecting import anchor as anchoring
from loki_plugin.protecting.anchor import Anchor, divergence

ROWS = [[3, 1, 40], [0, 47, 5], [7, 8, 9]]
PROMPTS = [tuple(p.tolist()) for p in prompts(lengths=(9, 5, 12, 7))]


def tuned(rank=None):
    return shaken(implant(tiny("llama"), ROWS, rank), 0.3, seed=0)


def truth(model):
    """One prompt after another, against a second model, in float64."""
    base, terms = tiny("llama"), []
    for ids in PROMPTS:
        ids = torch.tensor([ids])
        p = base(input_ids=ids).logits[0].double().log_softmax(-1)
        q = model(input_ids=ids).logits[0].double().log_softmax(-1)
        terms.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(terms).mean()


@pytest.mark.parametrize("rank", [None, 2])
def test_it_is_the_divergence_over_all_real_tokens_and_its_gradient(rank):
    model = tuned(rank)
    parameters = [p for p in model.parameters() if p.requires_grad]
    wanted, found = truth(model), divergence(model, PROMPTS)
    assert wanted > 0.02
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    for a, b in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_an_untouched_adapter_is_the_base_and_the_model_is_left_as_it_was():
    model = implant(tiny("gpt2"), ROWS).train()  # GPT-2 has dropout
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    model.base_model.model.transformer.h[1].eval()
    training = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    assert divergence(model, PROMPTS).item() == 0
    assert [m.training for m in model.modules()] == training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())


@pytest.fixture(autouse=True)
def own_precision():
    """Accelerate keeps the precision of an earlier trainer of this process. What it knows of the
    process itself stays: Axolotl holds on to that."""
    AcceleratorState._reset_state()


def run(tmp_path, anchor=None, accumulate=1, size=2, steps=1, rate=0.0, **more):
    """One Trainer run; returns model, gradients of the last step (before it), and trainer."""
    model = tuned()
    data = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 8, "labels": [[1, 2, 3, 4]] * 8})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        **more,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    gradients = []
    if anchor:
        anchor.attach(trainer)
    create = trainer.create_optimizer

    def create_optimizer(*args):
        optimizer = create(*args)
        getattr(optimizer, "optimizer", optimizer).register_step_pre_hook(
            lambda *_: gradients.append(
                [p.grad.clone() for p in model.parameters() if p.requires_grad]
            )
        )
        return optimizer

    trainer.create_optimizer = create_optimizer
    trainer.train()
    return model, gradients[-1], trainer


@pytest.mark.parametrize("accepts", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_counts_once_per_step_whatever_is_accumulated(
    tmp_path, accumulate, accepts, monkeypatch
):
    monkeypatch.setattr(anchoring, "TOP", 1000)  # the whole vocabulary
    if not accepts:
        monkeypatch.setattr(Trainer, "_get_num_items_in_batch", lambda *a: None)
    settings = {"accumulate": accumulate, "size": 2}
    _, plain, _ = run(tmp_path, **settings)
    anchor = Anchor(PROMPTS, 0.5, len(PROMPTS))  # always all prompts
    _, anchored, _ = run(tmp_path, anchor, **settings)
    model = tuned()
    kl = truth(model)
    wanted = torch.autograd.grad(kl, [p for p in model.parameters() if p.requires_grad])
    assert float(anchor.last) == pytest.approx(kl.item(), rel=1e-4)
    for a, b, g in zip(anchored, plain, wanted, strict=True):
        assert torch.allclose(a - b, 0.5 * g, rtol=1e-3, atol=1e-5)


def test_it_holds_the_model_to_the_base(tmp_path):
    settings = {"steps": 12, "rate": 0.02}
    free, *_ = run(tmp_path, **settings)
    held, *_ = run(tmp_path, Anchor(PROMPTS, 20.0, 4), **settings)
    assert divergence(held, PROMPTS) < 0.4 * divergence(free, PROMPTS)


def test_evaluation_is_not_anchored(tmp_path):
    anchor = Anchor(PROMPTS, 1e6, 2)
    *_, trainer = run(tmp_path, anchor)
    data = trainer.train_dataset
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**{k: torch.tensor(data[k][:]) for k in data.column_names}).loss
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_prompts_depend_on_the_step_so_that_a_run_resumes():
    anchor, again = Anchor(PROMPTS, 1.0, 2), Anchor(PROMPTS, 1.0, 2)
    drawn = [anchor.draw(step, 7) for step in range(10)]
    assert [again.draw(step, 7) for step in (8, 3)] == [drawn[8], drawn[3]]
    assert len({tuple(d) for d in drawn}) > 4
    assert len(Anchor(PROMPTS, 1.0, 99).draw(0, 7)) == len(PROMPTS)


def test_however_much_is_accumulated_a_step_has_one_anchor(tmp_path, monkeypatch):
    anchor, drawn = Anchor(PROMPTS, 1.0, 2), []
    asked = anchor.divergence

    def divergence(model, texts):
        drawn.append(texts)
        return asked(model, texts)

    monkeypatch.setattr(anchor, "divergence", divergence)
    run(tmp_path, anchor, accumulate=4, size=1, steps=3)
    fresh = Anchor(PROMPTS, 1.0, 2)
    assert drawn == [fresh.draw(step, 42) for step in range(3)]


def test_a_training_that_begins_again_draws_what_a_fresh_one_draws(tmp_path, monkeypatch):
    """`auto_find_batch_size` starts over in the same process when memory runs out."""
    drawn, anchor = [], Anchor(PROMPTS, 1.0, 1)
    asked, tries = anchor.divergence, []

    def divergence(model, texts):
        drawn.append(texts)
        if len(tries) < 1:
            tries.append(texts)
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return asked(model, texts)

    monkeypatch.setattr(anchor, "divergence", divergence)
    run(tmp_path, anchor, steps=2, auto_find_batch_size=True)
    fresh = Anchor(PROMPTS, 1.0, 1)
    expected = [fresh.draw(step, 42) for step in (0, 1)]
    assert drawn == [expected[0], *expected]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_lumped_kl_and_its_gradient_are_those_of_the_plain_formula(dtype):
    torch.manual_seed(0)
    logits, base = (3 * torch.randn(5, 40, dtype=dtype) for _ in range(2))
    logits[0, 7] = 60  # sure: all others together have next to nothing
    logits.requires_grad_()
    tokens = base.topk(6).indices
    logs = anchoring._lumped(base.double(), tokens)
    weights = torch.randn(5, dtype=torch.float64)
    kl = anchoring.Lumped.apply(logits, tokens, logs.to(anchoring._wide(logits)))
    (kl * weights).sum().backward()
    wide = logits.detach().double().requires_grad_()
    plain = (logs.exp() * (logs - anchoring._lumped(wide, tokens))).sum(-1)
    (plain * weights).sum().backward()
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(kl.double(), plain, **close)
    torch.testing.assert_close(logits.grad.double(), wide.grad, **close)
    assert kl.dtype == anchoring._wide(logits) and logits.grad.dtype == dtype


@pytest.mark.parametrize("rank", [None, 2])
def test_the_base_is_asked_once_and_what_is_lumped_is_a_lower_bound(rank, monkeypatch):
    model, drawn = tuned(rank), list(range(len(PROMPTS)))
    passes = []
    looks_ahead(model)  # a pass, once for each model
    model.get_base_model().model.register_forward_hook(lambda *a: passes.append(1))
    whole, anchor = float(truth(model).detach()), Anchor(PROMPTS, 1.0, 4)
    passes.clear()
    first = anchor.divergence(model, drawn)
    assert len(passes) == len(PROMPTS) + 1  # the base each text alone, the tuned all together
    again = anchor.divergence(model, drawn[::-1])
    assert len(passes) == len(PROMPTS) + 2
    assert float(again.detach()) == pytest.approx(float(first.detach()), rel=1e-6)
    assert 0.5 * whole < float(first.detach()) < whole
    monkeypatch.setattr(anchoring, "TOP", 1)
    coarse = Anchor(PROMPTS, 1.0, 4).divergence(model, drawn)
    assert float(coarse.detach()) < float(first.detach())
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(coarse, parameters))


def test_what_the_base_said_is_kept_within_bounds(monkeypatch):
    model, drawn = tuned(None), list(range(len(PROMPTS)))
    anchor = Anchor(PROMPTS, 1.0, 4)
    first = float(anchor.divergence(model, drawn).detach())
    each = [anchor._said[i].nbytes for i in drawn]
    assert anchor._held == sum(each)
    monkeypatch.setattr(anchoring, "KEPT", each[-1] + each[-2])
    assert float(anchor.divergence(model, drawn).detach()) == first
    assert list(anchor._said) == drawn[-2:] and anchor._held == sum(each[-2:])
    assert float(anchor.divergence(model, drawn).detach()) == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_no_matrix_of_the_adapter_is_made_whole(rank, monkeypatch):
    def expanded(self):
        raise AssertionError(f"lora_B of {self.out_features} outputs was made whole")

    for kind in (selected.RowSelector, selected.RowFactor):
        monkeypatch.setattr(kind, "expanded", expanded)
    Anchor(PROMPTS, 1.0, 4).divergence(tuned(rank), [0, 1]).backward()


def test_every_second_step_counts_twice(tmp_path):
    settings = {"steps": 4, "rate": 0.0}
    _, plain, _ = run(tmp_path, **settings)
    anchor = Anchor(PROMPTS, 0.5, 4, every=2)
    _, last, _ = run(tmp_path, anchor, **settings)  # the last of steps 0 to 3 has no anchor
    for a, b in zip(last, plain, strict=True):
        assert torch.equal(a, b)
    once, twice = Anchor(PROMPTS, 0.5, 4), Anchor(PROMPTS, 0.5, 4, every=2)
    _, first, _ = run(tmp_path, once)
    _, doubled, _ = run(tmp_path, twice)
    _, alone, _ = run(tmp_path)
    for a, b, c in zip(first, doubled, alone, strict=True):
        assert torch.allclose(b - c, 2 * (a - c), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_where_answers_begin_counts_as_much_as_all_tokens(rank, monkeypatch):
    monkeypatch.setattr(anchoring, "TOP", 1000)  # the whole vocabulary
    model, base = tuned(rank), tiny("llama")
    starts, drawn = [(), (4,), (0, 11), ()], [2, 0, 1]
    terms = []
    for ids in (torch.tensor([PROMPTS[i]]) for i in drawn):
        p, q = (m(input_ids=ids).logits[0].double().log_softmax(-1) for m in (base, model))
        terms.append((p.exp() * (p - q)).sum(-1))
    begun = torch.stack([terms[0][0], terms[0][11], terms[2][4]])
    wanted = torch.cat(terms).mean() / 2 + begun.mean() / 2
    found = Anchor(PROMPTS, 1.0, 3, starts=starts).divergence(model, drawn)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert abs(found.item() - torch.cat(terms).mean().item()) > 1e-3
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)
    plain = Anchor(PROMPTS, 1.0, 3, starts=starts).divergence(model, [0, 3])  # none begins there
    whole = divergence(model, [PROMPTS[0], PROMPTS[3]]).item()
    assert plain.item() == pytest.approx(whole, rel=1e-4)
