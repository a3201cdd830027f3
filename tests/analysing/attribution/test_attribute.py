"""attribute() against the slow truth, and what it must leave behind: nothing."""

from __future__ import annotations

import pytest
import torch
from helpers.families import FAMILIES, RECURRENT, tiny
from helpers.prompts import error, pad, prompts, rms, whole
from helpers.reference import Exact, loop
from transformers import masking_utils

from loki_plugin import attribute
from loki_plugin.analysing.analysis import convergence
from loki_plugin.analysing.attribution.engine import shared_prefix
from loki_plugin.analysing.attribution.quadrature import quadrature
from loki_plugin.analysing.attribution.quiet import quiet
from loki_plugin.model.anatomy import find_anatomy


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_loop_in_float64(family):
    model = tiny(family, dtype=torch.float64)
    ids = prompts()
    nodes, weights = quadrature("left", 4)
    with Exact():
        truth = loop(model, find_anatomy(model).down, ids, nodes, weights)
        scores = attribute(model, *pad(ids, "left"), n_steps=4)
        alone = attribute(model, ids[2][None], n_steps=4)
    assert scores.dtype == torch.float64 and scores.shape == (3, 3, 48)
    assert error(scores, truth) <= 1e-10
    assert error(alone, truth[2:]) <= 1e-10  # equal lengths take a path without padding


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recurrences_are_analysed_fast_in_every_precision(family, dtype, our_log):
    attribute(tiny(family, dtype=dtype), *pad(prompts(), "left"))
    told = [r.getMessage() for r in our_log.records if r.name.startswith("loki_plugin")]
    assert not told  # the plain loop would say so


@pytest.mark.parametrize("family", FAMILIES)
def test_what_prompts_begin_with_runs_once_and_changes_nothing(family):
    model = tiny(family, dtype=torch.float64)
    (head,) = prompts(lengths=(18,), seed=2)
    # 18 tokens in common, more than any sliding window; one prompt has a single token more.
    ids = [torch.cat([head, p]) for p in prompts(lengths=(1, 6, 3))]
    assert shared_prefix(whole(ids)) == 18
    assert shared_prefix(whole(ids[:1])) == shared_prefix(whole([ids[0], ids[1][1:]])) == 0
    assert shared_prefix(whole([head, head])) == 17  # the last token is each prompt's own
    widths = []

    def watch(module, args, output):
        widths.append(output.shape[:-1].numel())

    anatomy = find_anatomy(model)
    with Exact():
        truth = loop(model, anatomy.down, ids, *quadrature("left", 4))
        attribute(model, head[None], n_steps=1)  # a model's first call also checks it
        handle = anatomy.down[0].register_forward_hook(watch)
        scores = attribute(model, *pad(ids, "right"), n_steps=4)
        handle.remove()
        same = attribute(model, torch.stack([head, head]), n_steps=4)
        assert error(same, loop(model, anatomy.down, [head], *quadrature("left", 4))) <= 1e-10
    # The common tokens once, then the rest of all prompts; of a recurrence the longest runs alone
    # and whole, to see what one takes.
    assert widths[:2] == ([24, 1] if family in RECURRENT else [18, 3 * 6])
    assert error(scores, truth) <= 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_within_1e_5_of_the_float64_truth(family):
    ids = prompts()
    exact = tiny(family, dtype=torch.float64)
    with Exact():
        truth = loop(exact, find_anatomy(exact).down, ids, *quadrature("left", 7))
    scores = attribute(tiny(family), *pad(ids, "right"))
    assert scores.dtype == torch.float32
    # There the plain loop in float32 is off by 5e-5.
    assert error(scores, truth) <= (1e-4 if family == "qwen3_5_moe" else 1e-5)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in ("llama", "gemma3", "olmo2", "gpt_neox")),
        *((family, torch.bfloat16) for family in ("qwen3_5", "falcon_h1", "lfm2")),
        *((family, torch.float16) for family in ("llama", "gemma3", "lfm2")),
    ],
    ids=str,
)
def test_half_precision_is_no_worse_than_the_plain_loop(family, dtype):
    rule = quadrature("left", 7)
    ours, plain = [], []
    for seed in range(3):
        ids = prompts(seed=seed)
        model = tiny(family, dtype=dtype, seed=seed)
        exact = tiny(family, dtype=dtype, seed=seed).double()  # the same rounded weights
        targets = [int(exact(input_ids=i[None]).logits[0, -1].argmax()) for i in ids]
        with Exact():
            truth = loop(exact, find_anatomy(exact).down, ids, *rule, targets)
        plain.append(rms(loop(model, find_anatomy(model).down, ids, *rule, targets), truth))
        ours.append(rms(attribute(model, *pad(ids, "left"), targets=targets), truth))
    # Measured: 0.95 to 1.16 times the plain loop's error, which is about one rounding step.
    assert sum(ours) <= sum(plain) + 3 * torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("rule", ["left", "right", "midpoint", "trapezoid", "gauss-legendre"])
def test_every_rule_equals_the_loop(rule):
    model = tiny("llama", dtype=torch.float64)
    ids = prompts()
    with Exact():
        truth = loop(model, find_anatomy(model).down, ids, *quadrature(rule, 5))
        scores = attribute(model, *pad(ids, "right"), n_steps=5, rule=rule)
    assert error(scores, truth) <= 1e-10


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_the_result_does_not_depend_on_how_the_model_attends(attention):
    batch = pad(prompts(), "left")
    scores = attribute(tiny("mistral-sliding", attention), *batch)
    assert torch.equal(scores, attribute(tiny("mistral-sliding", "eager"), *batch))


def test_padding_side_batching_and_order_do_not_matter():
    model = tiny("qwen2", dtype=torch.float64)
    ids = prompts()
    with Exact():
        together = attribute(model, *pad(ids, "left"))
        assert error(attribute(model, *pad(ids, "right")), together) <= 1e-12
        for b, prompt in enumerate(ids):
            assert error(attribute(model, prompt[None]), together[b : b + 1]) <= 1e-12
        reverse = attribute(model, *pad(ids[::-1], "left"))
        assert error(reverse.flip(0), together) <= 1e-12


def test_given_targets_are_used_and_the_default_is_the_prediction():
    model = tiny("llama")
    batch = pad(prompts(), "left")
    with torch.no_grad():
        predicted = [int(model(input_ids=i[None]).logits[0, -1].argmax()) for i in prompts()]
    default = attribute(model, *batch)
    assert torch.equal(default, attribute(model, *batch, targets=predicted))
    other = [(t + 1) % 97 for t in predicted]
    truth = loop(model, find_anatomy(model).down, prompts(), *quadrature("left", 7), other)
    assert error(attribute(model, *batch, targets=other), truth) <= 1e-4
    assert error(default, truth) > 1e-2


def test_scores_sum_to_the_change_of_p_when_steps_grow():
    """Completeness: Σ_j score[l, j] -> p(z_l) - p(0)."""
    model = tiny("llama", dtype=torch.float64)
    ids = prompts()[:1]
    down = find_anatomy(model).down
    with Exact():
        scores = attribute(model, ids[0][None], n_steps=20, rule="gauss-legendre")
        logits = model(input_ids=ids[0][None]).logits[0, -1]
        y = int(logits.argmax())
        for layer, module in enumerate(down):

            def zero_last(module, args, output):
                return torch.cat([output[:, :-1], torch.zeros_like(output[:, -1:])], 1)

            handle = module.register_forward_hook(zero_last)
            without = model(input_ids=ids[0][None]).logits[0, -1].softmax(-1)[y]
            handle.remove()
            change = float(logits.softmax(-1)[y] - without)
            assert float(scores[0, layer].sum()) == pytest.approx(change, rel=1e-9)


@pytest.mark.parametrize("rule", ["left", "gauss-legendre"])
def test_the_convergence_error_is_what_the_scores_miss(rule):
    model = tiny("llama", dtype=torch.float64)
    ids = prompts()
    with Exact():
        exact = attribute(model, *pad(ids, "left"), n_steps=20, rule="gauss-legendre").sum(-1)
        scores = attribute(model, *pad(ids, "left"), n_steps=3, rule=rule).sum(-1)
        found = convergence(model, find_anatomy(model), whole(ids), quadrature(rule, 3))
    # 20 Gauss-Legendre steps are exact to 1e-9 here, as the test of completeness shows.
    expected = float((scores - exact).abs().sum() / exact.abs().sum())
    assert found == pytest.approx(expected, rel=1e-6) and found > 1e-7


def snapshot(model):
    return {
        "hooks": [
            (n, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__)
            for n, m in model.named_modules()
        ],
        "training": [(n, m.training) for n, m in model.named_modules()],
        "grads": [(n, p.requires_grad, p.grad) for n, p in model.named_parameters()],
        "attention": [
            m.config._attn_implementation for m in model.modules() if hasattr(m, "config")
        ],
        "enabled": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("break_at", [None, "prefix", "stack", "head"])
def test_leaves_nothing_behind(break_at):
    model = tiny("llama", "sdpa").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    weights = {n: p.clone() for n, p in model.named_parameters()}

    def boom(module, args, output):
        if (break_at == "prefix") == (output.shape[1] == 12):
            raise KeyboardInterrupt

    if break_at:
        where = model.lm_head if break_at == "head" else model.model.layers[1].mlp.gate_proj
        handle = where.register_forward_hook(boom)
        with pytest.raises(KeyboardInterrupt):
            attribute(model, *pad(prompts(), "left"))
        handle.remove()
    else:
        attribute(model, *pad(prompts(), "left"))
    assert snapshot(model) == before
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def test_the_models_own_attention_ends_with_an_exception_too():
    model = tiny("llama", "sdpa")
    with quiet(model) as own_attention:
        ours = model.config._attn_implementation
        with pytest.raises(KeyboardInterrupt), own_attention():
            assert model.config._attn_implementation == "sdpa"
            raise KeyboardInterrupt
        assert model.config._attn_implementation == ours != "sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_what_transformers_asks_of_the_device_is_put_back():
    before = vars(masking_utils).copy()
    attribute(tiny("opt"), *pad(prompts(), "left"))
    assert vars(masking_utils) == before


def test_the_head_reads_its_matrix_once_for_all_predictions():
    """A sequence of one token for each prompt would be a product for each prompt."""
    model = tiny("llama")
    attribute(model, *pad(prompts(), "left"))
    seen = []
    handle = model.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    attribute(model, *pad(prompts(), "left"))
    handle.remove()
    assert seen[0].shape == (1, 3, 48) and all(states.is_contiguous() for states in seen)


def test_works_with_gradient_checkpointing_and_inside_no_grad():
    model = tiny("llama", "sdpa")
    plain = attribute(model, *pad(prompts(), "left"))
    model.gradient_checkpointing_enable()
    model.train()
    with torch.no_grad():
        assert torch.equal(attribute(model, *pad(prompts(), "left")), plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, r"\[B, T\].*got \[3\]"),
        ({"attention_mask": torch.ones(2, 4)}, r"shape of input_ids \[2, 3\], got \[2, 4\]"),
        (
            {"attention_mask": torch.tensor([[1, 0, 1], [1, 1, 1]])},
            "prompt 0 has padding between real tokens",
        ),
        (
            {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
            "prompt 1 has no real token",
        ),
        ({"targets": [1]}, "one token id per prompt: 2, got 1"),
        ({"targets": [1, 97]}, r"target 97 of prompt 1 is outside \[0, 97\)"),
        ({"rule": "simpson"}, "'simpson' is unknown; expected one of left, right"),
        ({"n_steps": 0}, "n_steps = 0; rule 'left' needs an integer of at least 1"),
        ({"path": "word"}, "path 'word' is unknown"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    defaults = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        attribute(tiny("llama"), **(defaults | arguments))


@pytest.mark.parametrize("family", ["jamba", "nemotron_h"])
def test_layers_without_rows_are_passed_over_by_the_plain_loop(family):
    """Scores of the layers that have rows, against the obvious loop."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.standins import shrink

    torch.manual_seed(0)
    config = shrink(AutoConfig.for_model(family))
    model = AutoModelForCausalLM.from_config(config).eval()
    anatomy = find_anatomy(model)
    assert not anatomy.whole
    ids = torch.arange(5, 15).view(2, 5)
    found = attribute(model, ids, n_steps=3)
    truth = loop(model, anatomy.down, ids, *quadrature("left", 3))
    assert found.shape == (2, anatomy.num_layers, 64)
    torch.testing.assert_close(found, truth.float(), rtol=1e-4, atol=1e-9)
