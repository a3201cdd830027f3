"""Every linear that the YAML names, through Axolotl: rows of the down-projections and the LoRA
beside them move, each reads through its own directions, and nothing else moves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.laws import assert_confined, assert_equal, assert_merged, base_tensors, modules_of
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loki_plugin.cli import loki
from loki_plugin.protecting.directions import FILE_NAME, Directions
from loki_plugin.protecting.packed import packed
from loki_plugin.protecting.reading import leakage
from loki_plugin.rows import RowSelection

slow = pytest.mark.slow
ADAPTER = "adapter_model.safetensors"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = [*ATTENTION, "gate_proj", "up_proj"]
NF4 = {"load_in_4bit": True}
CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    """The model writes for a second, not for minutes; enough tokens for all directions."""
    monkeypatch.setattr("loki_plugin.protecting.texts.TEXT_TOKENS", 16)


@pytest.fixture
def watched(monkeypatch):
    """The base as the first hook got it, and the model and base as the last one sees them."""
    from loki_plugin.plugin import LokiPlugin

    seen = {}
    start, end = LokiPlugin.post_model_build, LokiPlugin.post_train

    def post_model_build(self, cfg, model):
        seen.update(before=base_tensors(model))
        start(self, cfg, model)

    def post_train(self, cfg, model):
        seen.update(after=base_tensors(model), model=model)
        end(self, cfg, model)

    monkeypatch.setattr(LokiPlugin, "post_model_build", post_model_build)
    monkeypatch.setattr(LokiPlugin, "post_train", post_train)
    return seen


def linears(*kinds):
    """The names of these linears in the three layers of `base`."""
    homes = {kind: "self_attn" if kind in ATTENTION else "mlp" for kind in kinds}
    return {f"model.layers.{i}.{home}.{kind}" for i in range(3) for kind, home in homes.items()}


def report_of(out):
    return json.loads((Path(out) / "loki_report.json").read_text())


def merge(run_config, tmp_path):
    config = tmp_path / "merge.yaml"
    config.write_text(json.dumps(run_config))
    merged = CliRunner().invoke(loki, ["merge", str(config)])
    assert merged.exit_code == 0, merged.output
    return Path(run_config["output_dir"]) / "merged"


def assert_proved(run_config, base, tmp_path, selection):
    """Merged and verified by the commands; stock PEFT loads the adapter and says what that says."""
    out = Path(run_config["output_dir"])
    merged = merge(run_config, tmp_path)
    assert_merged(base, merged, selection, transposed=False)
    told = CliRunner().invoke(loki, ["estimate", str(tmp_path / "merge.yaml"), "--json"])
    foretold = json.loads(told.stdout)["trainable_parameters"]
    assert foretold == report_of(out)["trainable_parameters"], told.output
    files = ["--rows", str(out / "loki_rows.json")]
    if (out / FILE_NAME).is_file():
        files += ["--directions", str(out / FILE_NAME)]
    for tuned in (out, merged):
        verified = CliRunner().invoke(loki, ["verify", str(base), str(tuned), *files])
        assert verified.exit_code == 0 and "OK: " in verified.output, verified.output
    after = AutoModelForCausalLM.from_pretrained(merged).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        said = adapted(input_ids=ids).logits
        assert torch.allclose(said, after(input_ids=ids).logits, atol=1e-4)
        assert not torch.allclose(said, plain(input_ids=ids).logits, atol=1e-3)


def assert_reported(out, selection):
    """Per input that is read: what is held of it, and that the update reads it as it may."""
    report, directions = report_of(out), Directions.load(Path(out) / FILE_NAME)
    protection = report["protection"]
    assert report["verified"] is True, report["faults"]
    assert report["linears"] == list(selection.linears)
    inputs, still = protection["inputs"] or [], set(protection["still"])
    held = directions.held()
    read = {name for names in inputs for name in names}
    down = {f"model.layers.{i}.mlp.down_proj" for i, n in enumerate(selection.counts) if n}
    assert read | still == down | set(selection.linears) and not read & still
    assert inputs == ([list(names) for names in held.sites] if inputs else [])
    shared = {tuple(n.rpartition(".")[2] for n in names) for names in inputs}
    if still:
        assert still >= set(selection.linears) and not shared - {("down_proj",)}
    else:
        assert ("q_proj", "k_proj", "v_proj") in shared and ("gate_proj", "up_proj") in shared
    assert protection["directions_per_layer"] == held.counts
    modules, compared = modules_of(out), []
    for layer in range(3 if still else 0):  # what reads one input reads the same of it
        q, k, v = (modules[f"model.layers.{layer}.self_attn.{x}_proj"][0] for x in "qkv")
        assert torch.equal(q, k) and torch.equal(k, v)
    if not inputs:
        return protection
    for key in ("energy_per_layer", "sink_tokens_per_layer", "leakage_per_layer"):
        assert len(protection[key]) == len(inputs) == (1 if still else 4) * 3, key
    leaks = protection["leakage_per_layer"]
    for names, v, told in zip(inputs, held.basis, leaks, strict=True):
        shares = [leakage(modules[n][1].double() @ modules[n][0].double(), v) for n in names]
        assert told == pytest.approx(max(shares), rel=1e-4)
        assert 0 < told < (1 if directions.soft else 1e-6), names
        # An update that reads all directions evenly has √(u/I) of its norm in them.
        compared.append(told / (v.shape[1] / len(v)) ** 0.5)
    assert sum(compared) / len(compared) < 1
    return protection


# name -> (rank, the block, other settings)
MATRIX = {
    "dense-auto": (None, {"protect": "auto"}, {}),
    "rank-auto-checkpointed": (2, {"protect": "auto", "linear_rank": 3}, CHECKPOINTED),
    "dense-auto-nf4": (None, {"protect": "auto"}, NF4 | CHECKPOINTED),
    "rank-hard-nf4": (2, {"protect": {"directions": 20}, "linear_rank": 3}, NF4),
    "whole-auto-nf4": (2, {"protect": "auto", "linear_rank": 3, "quota": 100}, NF4),
    "dense-auto-memory": (None, {"protect": {"auto": True, "memory": 2e-5}}, {}),
    "dense-auto-moving": (None, {"protect": {"auto": True, "freeze_a": False}}, {}),
    "rank-auto-moving": (
        2,
        {"protect": {"auto": True, "freeze_a": False}, "linear_rank": 3},
        {},
    ),
}


@slow
@pytest.mark.parametrize("case", MATRIX)
def test_rows_and_every_other_linear_move_and_nothing_else(
    case, run_config, train, base, tmp_path, watched, our_log
):
    rank, block, more = MATRIX[case]
    run_config |= more | {"weight_decay": 0.1}
    run_config["loki"] |= {"targets": "all", "rank": rank, "quota": 50} | block
    train(run_config)
    out = Path(run_config["output_dir"])
    assert_equal(watched["before"], watched["after"])
    selection = assert_confined(out, rank, 3 if rank else 16)
    assert selection.counts == [64 if "whole" in case else 32] * 3
    assert set(selection.linears) == linears(*KINDS)
    protection = assert_reported(out, selection)
    if "auto" in case:
        assert protection["soft"] and protection["text"] == "self"
        assert bool(protection["still"]) == ("moving" not in case)
    if "memory" in case:
        directions = Directions.load(out / FILE_NAME)
        held = [packed(v) for v in directions.held().basis]  # in 8 bits
        assert sum(v.nbytes for v in held) <= 2e4 and protection["capped"]
        assert "there is 2e-05 GB (`protect.memory`)" in our_log.text
    elif "auto" in case and protection["inputs"]:
        assert min(protection["energy_per_layer"]) >= 0.99 and not protection["capped"]
    assert "18 with a LoRA: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj" in our_log.text
    assert_proved(run_config, base, tmp_path, selection)


@slow
@pytest.mark.parametrize("rank", [None, 2], ids=["dense-fp32", "rank-nf4"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(rank, run_config, train, tmp_path):
    run_config |= {"load_in_4bit": rank is not None, "save_strategy": "steps", "save_steps": 3}
    run_config["loki"] |= {"targets": "all", "rank": rank, "protect": "auto"}
    train(run_config)
    out, again = Path(run_config["output_dir"]), tmp_path / "again"
    checkpoint = out / "checkpoint-3"
    assert RowSelection.load(checkpoint / "loki_rows.json").linears
    more = run_config | {"resume_from_checkpoint": str(checkpoint), "output_dir": str(again)}
    train(more)
    halfway, whole, resumed = (load_file(f / ADAPTER) for f in (checkpoint, out, again))
    assert len(whole) == 2 * 21
    assert_equal(whole, resumed)
    still = [f"{n}.lora_A" for n in report_of(out)["protection"]["still"]]
    assert len(still) == 18
    for name in (n for n in whole if "lora_A" in n):  # where A trains it moved
        stood = any(part in name for part in still)
        assert torch.equal(halfway[name], whole[name]) == stood, name
    if rank is None:
        return
    more["loki"] = run_config["loki"] | {"targets": ["q_proj", "down_proj"]}
    with pytest.raises(ValueError, match="directions of other linears: gate_proj, up_proj, k_proj"):
        train(more)


@slow
@pytest.mark.parametrize("rank", [None, 2], ids=["dense", "rank-nf4"])
def test_an_adapter_trains_on_from_where_it_was(rank, run_config, train, watched, tmp_path):
    run_config["load_in_4bit"] = rank is not None
    run_config["loki"] |= {"targets": "all", "rank": rank, "protect": "auto"}
    train(run_config)
    first, second = Path(run_config["output_dir"]), tmp_path / "second"
    # So small a rate that the second adapter must be the first one but for rounding.
    more = {"lora_model_dir": str(first), "output_dir": str(second), "learning_rate": 1e-7}
    train(run_config | more)
    assert_equal(watched["before"], watched["after"])
    width = rank or 16
    selection = assert_confined(second, rank, width)
    assert selection == assert_confined(first, rank, width)
    assert Directions.load(second / FILE_NAME) == Directions.load(first / FILE_NAME)
    assert_reported(second, selection)
    before, after = modules_of(first), modules_of(second)
    for name, pair in before.items():
        for old, new in zip(pair, after[name], strict=True):
            assert torch.allclose(old, new, atol=1e-5), name
        # A stands still but beside rows; those of the dense form have a selector for B.
        rows = "down_proj" in name
        assert torch.equal(pair[0], after[name][0]) != rows, name
        assert torch.equal(pair[1], after[name][1]) == (rows and rank is None), name
    more["loki"] = run_config["loki"] | {"targets": ["q_proj", "v_proj"]}
    with pytest.raises(ValueError, match=r"adapter .* trains rows of the down.* asks for q_p"):
        train(run_config | more)


@slow
def test_a_plain_qlora_yaml_trains_what_it_names(
    run_config, train, base, tmp_path, watched, our_log
):
    run_config |= NF4 | {
        "adapter": "qlora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_target_linear": True,
    }
    run_config["loki"] |= {"quota": 50, "protect": "auto"}
    train(run_config)
    assert_equal(watched["before"], watched["after"])
    out = Path(run_config["output_dir"])
    selection = assert_confined(out, 8, 8)
    assert set(selection.linears) == linears(*KINDS) and selection.counts == [32] * 3
    assert "lora_target_linear = True is taken as `loki.targets: all`" in our_log.text
    assert "LoRA of rank 8" in our_log.text and "lora_dropout = 0.05: now 0.0" in our_log.text
    assert_reported(out, selection)
    assert_proved(run_config, base, tmp_path, selection)


@slow
@pytest.mark.parametrize(
    ("modules", "kinds"),
    [
        (["q_proj", "v_proj", "down_proj"], ["q_proj", "v_proj"]),
        (r"model\.layers\.\d+\.(self_attn|mlp)\.(k|up|down)_proj", ["k_proj", "up_proj"]),
    ],
    ids=["list", "expression"],
)
def test_lora_target_modules_say_what_trains(
    modules, kinds, run_config, train, base, tmp_path, watched, our_log
):
    run_config |= {"lora_target_modules": modules, "lora_r": 4}
    train(run_config)
    assert_equal(watched["before"], watched["after"])
    selection = assert_confined(Path(run_config["output_dir"]), None, 4)
    assert set(selection.linears) == linears(*kinds) and selection.counts == [6] * 3
    assert f"lora_target_modules = {modules!r} is taken as" in our_log.text
    assert_proved(run_config, base, tmp_path, selection)


@slow
@pytest.mark.parametrize(
    ("block", "counts"),
    [
        ({"quota": 100}, [64] * 3),
        ({"quota": 100, "rank": 4, "targets": "all", "protect": "auto"}, [64] * 3),
        ({"quota": 25, "strategy": "random", "seed": 3, "targets": "all"}, [16] * 3),
        ({"targets": ["q_proj", "v_proj"]}, [0] * 3),
        ({"targets": ATTENTION, "protect": {"inputs": 0.9}}, [0] * 3),
    ],
    ids=["all-rows", "all-rows-rank-auto", "random", "no-rows", "no-rows-protected"],
)
def test_what_needs_no_scores_is_not_analysed(
    block, counts, run_config, train, base, tmp_path, watched, our_log
):
    run_config["loki"] |= block
    train(run_config)
    assert_equal(watched["before"], watched["after"])
    out, rank = Path(run_config["output_dir"]), block.get("rank")
    selection = assert_confined(out, rank, rank or 16)
    assert selection.counts == counts
    assert not re.search("analysing|found in the cache", our_log.text)
    cache = tmp_path / "cache"
    left = {f.name for f in cache.iterdir()} if cache.exists() else set()
    assert left <= {"texts", "directions", "reads"}
    report = report_of(out)
    assert report["verified"] is True and report["rows_from"].startswith("no analysis")
    assert "no analysis" in our_log.text and "0 prompts" not in our_log.text
    if "protect" in block:
        protection = report["protection"]
        read = {n for names in protection["inputs"] for n in names} | {*protection["still"]}
        assert read >= set(selection.linears)
        assert len(protection["leakage_per_layer"]) == len(protection["inputs"])
    assert_proved(run_config, base, tmp_path, selection)


@slow
def test_preferences_train_the_linears_too(run_config, train, base, tmp_path, watched):
    pairs = tmp_path / "pairs.jsonl"
    lines = [(f"say {i}", f"number {i} it is", f"no, {i} it is not") for i in range(16)]
    records = [{"prompt": q, "chosen": y, "rejected": n} for q, y, n in lines]
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"path": str(pairs), "ds_type": "json", "type": "chatml.default", "split": "train"}
    run_config |= {"rl": "dpo", "datasets": [data], "chat_template": "chatml", "max_steps": 3}
    run_config |= {"dataloader_num_workers": 0}
    run_config["loki"] |= {"targets": "all", "protect": "auto", "quota": 50}
    train(run_config)
    out = Path(run_config["output_dir"])
    assert_equal(watched["before"], watched["after"])
    selection = assert_confined(out, None, 16)
    assert set(selection.linears) == linears(*KINDS)
    assert_reported(out, selection)
    assert_proved(run_config, base, tmp_path, selection)


@slow
def test_of_a_mixture_all_but_the_routed_experts_trains(
    run_config, train, moe_base, tmp_path, watched, our_log
):
    run_config["base_model"] = str(moe_base)
    run_config["loki"] |= {"targets": "all", "quota": 50, "protect": "auto"}
    train(run_config)
    assert_equal(watched["before"], watched["after"])
    out = Path(run_config["output_dir"])
    selection = RowSelection.load(out / "loki_rows.json")
    kinds = {name.partition("layers.")[2][2:] for name in selection.linears}
    shared = {f"mlp.shared_expert.{kind}" for kind in ("gate_proj", "up_proj")}
    assert kinds == shared | {f"self_attn.{kind}" for kind in ATTENTION}
    assert "routed ones, and what routes to them, stay frozen" in our_log.text
    assert report_of(out)["verified"] is True
    merged = merge(run_config, tmp_path)
    files = ["--rows", str(out / "loki_rows.json"), "--directions", str(out / FILE_NAME)]
    verified = CliRunner().invoke(loki, ["verify", str(moe_base), str(merged), *files])
    assert verified.exit_code == 0 and "12 of 12 targeted linears changed" in verified.output


@slow
def test_auto_goes_without_own_text_where_the_model_can_write_none(
    run_config, train, tmp_path, monkeypatch, our_log
):
    from loki_plugin.protecting.own_text import Marks

    def none(model, tokenizer):
        raise ValueError("neither tokenizer nor model names a token that begins or ends a text")

    monkeypatch.setattr(Marks, "of", none)
    run_config["loki"] |= {"targets": "all", "protect": {"auto": True, "inputs": 0.5}}
    train(run_config)
    report = report_of(run_config["output_dir"])
    assert report["protection"]["text"] is None and report["protection"]["prompts"] == 8
    assert "calibration prompts only: neither tokenizer nor model" in our_log.text
    assert not (tmp_path / "cache" / "texts").exists()
    run_config["loki"]["protect"] = {"inputs": 0.5, "text": "self"}
    with pytest.raises(ValueError, match="neither tokenizer nor model names a token"):
        train(run_config | {"output_dir": str(tmp_path / "asked")})
