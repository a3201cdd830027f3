"""`loki estimate`: what of a run is counted, and what is left out and said."""

from __future__ import annotations

import pytest
import torch
from helpers.estimates import asked
from helpers.families import tiny
from torch.utils.flop_counter import FlopCounterMode

from loki_plugin import RowSelection
from loki_plugin.args import LokiConfig
from loki_plugin.estimating.base import Stored
from loki_plugin.estimating.estimate import Estimator
from loki_plugin.estimating.planned import Planned
from loki_plugin.host.estimated import size
from loki_plugin.host.telling import duration
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.protecting.reading import ProtectedA


def test_a_step_has_one_anchor_however_much_is_accumulated(big, tmp_path):
    def training(accumulated, protect):
        run = {"gradient_accumulation_steps": accumulated, "loki": {"protect": protect}}
        return asked(big | run, tmp_path, "--json", "--card", "80")["training"]

    def seconds(accumulated, protect):
        return training(accumulated, protect)["step_seconds"]

    def added(accumulated):
        plain, anchored = seconds(accumulated, "off"), seconds(accumulated, {"anchor": 1.0})
        return {card: anchored[card] - plain[card] for card in plain}

    once = added(1)
    assert min(once.values()) > 1e-4
    assert added(8) == pytest.approx(once, abs=3e-6)  # they are rounded
    often, plain = seconds(8, {"anchor": 1.0, "anchor_every": 4}), seconds(8, "off")
    for card, most in once.items():
        assert often[card] - plain[card] == pytest.approx(most / 4, abs=3e-6)
    # Gradients of earlier micro batches are there while the next one's loss is computed.
    moments = [training(n, "off")["activations_bytes"] for n in (1, 2, 8)]
    assert moments[1] == moments[2] and moments[1]["step"] == moments[0]["step"]
    assert moments[1]["loss"] - moments[0]["loss"] == moments[0]["step"]


@pytest.mark.parametrize("anchor", [0, 6, 48])
@pytest.mark.parametrize("tokens", [5, 40])
def test_products_with_directions_are_those_of_a_step(tokens, anchor):
    """Of few tokens the inputs go through P, of many A does: batch and anchor each by itself."""
    model, rows, directions = tiny("llama"), 12, 9
    anatomy = find_anatomy(model)
    (inputs,) = set(anatomy.input_sizes)
    a = ProtectedA(
        torch.nn.Parameter(torch.randn(rows, inputs)),
        torch.linalg.qr(torch.randn(inputs, directions))[0],
    )
    texts = [torch.randn(n, inputs, requires_grad=True) for n in (tokens, anchor) if n]
    with FlopCounterMode(display=False) as counted:
        sum(a(x).sum() for x in texts).backward()
    products = counted.get_total_flops() - 6 * (tokens + anchor) * rows * inputs
    protect = {"directions": directions} | ({"anchor": 1.0, "anchor_batch": 1} if anchor else {})
    config = LokiConfig(quota=10, protect=protect)
    layers = anatomy.num_layers
    estimator = Estimator(model, anatomy, config, [rows] * layers, [anchor or 1], analysed=False)
    run = Planned(Stored(torch.float32, 0), 1, tokens, 1, False, "adamw_torch", torch.float32)
    assert estimator.protection_flops(run, 24) == layers * products


def test_what_is_not_known_of_the_texts_is_said(big, tmp_path):
    prompts, time = "the anchor is counted with calibration prompts", "to write is not counted"
    for text, told in (("own.txt", prompts), ("self", time)):
        run = big | {"loki": {"protect": {"anchor": 1.0, "text": text}}}
        assumed = asked(run, tmp_path, "--json", "--card", "48")["assumed"]
        said = [line for line in assumed if f"text: {text}: " in line]
        assert len(said) == 1 and told in said[0], said


def test_a_run_that_analyses_nothing_is_told_what_finding_directions_holds(big, tmp_path):
    block = {"quota": 100, "protect": {"directions": 100}}
    facts = asked(big | {"loki": block}, tmp_path, "--json", "--card", "80")
    assert not facts["analysis"]["prompts"]
    finding = size(facts["analysis"]["finding_directions_bytes"])
    said = asked(big | {"loki": block}, tmp_path, "--card", "80")
    assert "none: no rows are chosen by scores\n" in said
    times = facts["analysis"]["finding_directions_seconds"]
    assert f"finding directions {finding}: RTX 3090 {duration(times['RTX 3090'])}, " in said
    plain = asked(big | {"loki": {"quota": 100, "protect": "off"}}, tmp_path, "--card", "80")
    assert "finding" not in plain and "none: no rows are chosen by scores\n" in plain


def test_a_model_with_rows_in_some_layers_is_estimated(big, tmp_path):
    """Of four layers two have a dense MLP; the others' linears may train all the same."""
    from transformers import JambaConfig

    JambaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, pad_token_id=0, expert_layer_offset=1,
        expert_layer_period=2, attn_layer_offset=1, attn_layer_period=2, num_experts=4,
        use_mamba_kernels=False,
    ).save_pretrained(tmp_path / "jamba")  # fmt: skip
    run = big | {"base_model": str(tmp_path / "jamba"), "sequence_len": 64}
    rows, every = (
        asked(run | {"loki": {"quota": 100, "targets": t}}, tmp_path, "--json")
        for t in ("down", "all")
    )
    assert rows["rows_per_layer"] == every["rows_per_layer"] == [32, 32]
    assert rows["trainable_parameters"] == 2 * 32 * 48
    assert every["trainable_parameters"] > rows["trainable_parameters"]
    assert every["training"]["bytes"] > rows["training"]["bytes"]


def test_a_rows_file_of_an_earlier_run_tells_how_many_train(big, tmp_path):
    """It carries a fingerprint, and an estimate has no weights to hold against it."""
    mark = {"config": "c", "identity": "i", "weights": "w", "quantisation": "none:bfloat16"}
    RowSelection([[1, 2, 3]] * 32, 4096, mark).save(tmp_path / "rows.json")
    facts = asked(big | {"loki": {"rows": str(tmp_path / "rows.json")}}, tmp_path, "--json")
    assert facts["trainable_parameters"] == 32 * 3 * 14336


def test_a_fused_loss_makes_no_logits_and_what_is_left_out_is_said(big, tmp_path):
    plain = asked(big, tmp_path, "--json")["training"]["activations_bytes"]["loss"]
    fused = asked(big | {"cut_cross_entropy": True}, tmp_path, "--json")["training"]
    assert fused["activations_bytes"]["loss"] == plain - 12 * 2048 * 128256
    # The plugin switches it on by itself.
    plugin = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
    for key, saved in ((None, True), (True, True), (False, False)):
        run = big | {"plugins": [*big["plugins"], plugin], "cut_cross_entropy": key}
        loss = asked(run, tmp_path, "--json")["training"]["activations_bytes"]["loss"]
        assert (loss == fused["activations_bytes"]["loss"]) == saved, key
    run = big | {
        "rl": "dpo",
        "layer_offloading": True,
        "quantize_moe_experts": True,
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    run["loki"] = {"attribution": {"path": "sequence"}, "protect": "off"}
    assumed = asked(run, tmp_path, "--json")["assumed"]
    assert [line.split(":")[0] for line in assumed] == [
        "deepspeed", "rl", "layer_offloading", "quantize_moe_experts", "attribution.path",
        "the tokenizer is not here",
    ]  # fmt: skip
