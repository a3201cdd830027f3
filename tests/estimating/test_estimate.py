"""`loki estimate` against what real runs of a tiny model write and hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.estimates import asked
from helpers.families import FAMILIES, tiny
from transformers import MixtralConfig

from benchmarks.floor import flops
from loki_plugin import RowSelection, implant
from loki_plugin.args import LokiConfig
from loki_plugin.cli import loki
from loki_plugin.estimating.base import Stored, weight_bytes
from loki_plugin.estimating.disk import score_log_bytes
from loki_plugin.estimating.estimate import Estimator
from loki_plugin.estimating.planned import Planned
from loki_plugin.estimating.training import state_bytes
from loki_plugin.estimating.work import Work
from loki_plugin.host.base import look_at
from loki_plugin.implanting.adapter import trainable_share
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.protecting.fixing import fix_reads


@pytest.mark.parametrize("targets", ["down", "all", ["q_proj", "up_proj", "down_proj"]])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("still", [False, True])
def test_trainable_parameters_and_adapter_bytes_are_exact(tmp_path, rank, dtype, targets, still):
    model = tiny("llama")
    anatomy = find_anatomy(model)
    selection = RowSelection([[1, 5, 7, 20, 40], [], [2, 3, 4, 5, 6, 9, 11]], 48)
    tuned = implant(model, selection, rank, targets=targets, linear_rank=3)
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    if still:
        fix_reads(tuned)
    for module in tuned.modules():
        if hasattr(module, "like"):
            module.like = module.like.to(dtype)
    tuned.save_pretrained(tmp_path)
    block = LokiConfig(
        rank=rank,
        targets=targets,
        linear_rank=None if targets == "down" else 3,
        protect={"auto": True, "freeze_a": still},
    )
    empty = tiny("llama")
    said = Estimator(empty, find_anatomy(empty), block, selection.counts, [1], analysed=False)
    assert said.parameters() == trainable_share(tuned)
    run = Planned(Stored(torch.float32), 1, 8, 1, False, "sgd", dtype)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert said.disk(run, 24)["adapter_bytes"] == size
    assert anatomy.hidden_size == 48


def test_optimizer_states_are_exact():
    import bitsandbytes as bnb
    from axolotl.contribs.mit.muon import Muon

    shapes = [(5, 800), (7, 800), (8, 1024), (3, 9)]
    for dtype in (torch.float32, torch.bfloat16):
        for name, make in (
            ("adamw_torch", torch.optim.AdamW),
            ("adamw_bnb_8bit", bnb.optim.AdamW8bit),
            ("lion_8bit", bnb.optim.Lion8bit),
            ("sgd", torch.optim.SGD),
            ("muon", Muon),
        ):
            weights = [torch.nn.Parameter(torch.ones(*s, dtype=dtype)) for s in shapes]
            optimizer = make(**{"muon_params" if make is Muon else "params": weights, "lr": 0.1})
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            optimizer.step()
            held = sum(
                x.nbytes
                for state in optimizer.state.values()
                for key, x in state.items()
                if isinstance(x, torch.Tensor) and key != "step" and "qmap" not in key
            )
            said = state_bytes(name, [w.numel() for w in weights], dtype)
            assert said == held, (name, dtype)
    assert state_bytes("of my own", [3], torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_states_of_torchao_are_exact(kind, dtype):
    """As its step makes them; the step itself is compiled, which takes minutes."""
    import torchao.optim

    weights = [torch.nn.Parameter(torch.ones(n, dtype=dtype)) for n in (4000, 5600, 8192, 27)]
    optimizer = getattr(torchao.optim, kind)(weights, lr=0.1)
    states = [optimizer._new_buffer(w, signed) for w in weights for signed in (True, False)]
    parts = [
        getattr(state, name) if hasattr(state, "codes") else state
        for state in states
        for name in (("codes", "scale") if hasattr(state, "codes") else ("itself",))
    ]
    assert any(p.dtype == torch.float32 and p.numel() < 100 for p in parts)  # scales
    held = sum(part.numel() * part.element_size() for part in parts)
    short = kind.removeprefix("AdamW").lower()
    for name in (f"adamw_torch_{short}", f"ao_adamw_{short}"):
        if name != "adamw_torch_fp8":  # transformers has none
            assert state_bytes(name, [w.numel() for w in weights], dtype) == held, name


def test_a_family_without_weights_has_the_bytes_of_its_weights(tmp_path):
    for family in ("llama", "gemma2", "gpt2", "qwen2_moe"):
        model = tiny(family)
        model.config.save_pretrained(tmp_path / family)
        empty, anatomy = look_at({"base_model": str(tmp_path / family)})
        held = [*model.parameters(), *model.buffers()]
        storages = {t.untyped_storage().data_ptr(): t.nbytes for t in held}
        assert weight_bytes(empty, Stored(torch.float32)) == sum(storages.values())
        assert anatomy.names == find_anatomy(model).names


def test_operations_are_the_floor_of_a_llama(tmp_path):
    tiny("llama").config.save_pretrained(tmp_path)
    empty, anatomy = look_at({"base_model": str(tmp_path)})
    shape = FAMILIES["llama"][1]
    sizes = (3, 48, 80, shape["num_key_value_heads"], 12, 97)
    said = Work.of(empty, anatomy).analysis(length=50, steps=7)
    assert said == pytest.approx(flops(*sizes, length=50, steps=7), rel=1e-12)


def test_a_base_that_is_not_there_is_named(run_config, tmp_path):
    run = run_config | {"base_model": str(tmp_path / "nowhere")}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run))
    result = CliRunner().invoke(loki, ["estimate", str(config)])
    assert result.exit_code == 1
    assert "nowhere' cannot be read" in result.output and "config.json" in result.output


def test_a_mixture_without_rows_is_estimated_where_it_goes_on_from_an_adapter_too(
    run_config, tmp_path
):
    layer, shape = "model.layers.0.self_attn.q_proj", {"num_hidden_layers": 1}
    MixtralConfig(hidden_size=64, vocab_size=320, **shape).save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    RowSelection([], 64, linears=[layer]).save(tmp_path / "adapter" / "loki_rows.json")
    run = run_config | {"base_model": str(tmp_path / "base"), "lora_target_modules": ["q_proj"]}
    run |= {"adapter": "lora", "lora_r": 8, "loki": {"quota": 100, "protect": "off"}}
    fresh, further = (
        asked(run | more, tmp_path, "--json")
        for more in ({}, {"lora_model_dir": str(tmp_path / "adapter")})
    )
    assert fresh["trainable_parameters"] == further["trainable_parameters"] > 0


def test_what_does_not_fit_is_told_with_what_to_change(big, tmp_path):
    facts = asked(big, tmp_path, "--json", "--card", "12", code=1)
    card = facts["card"]
    assert not card["training"] and card["change"] == ["load_in_4bit: true"] and card["then_fits"]
    assert "loki" in asked(big, tmp_path, "--card", "12", code=1)
    changed = big | {"load_in_4bit": True}
    assert asked(changed, tmp_path, "--json", "--card", "12")["card"]["training"]
    # Several changes together, where none alone is enough; and a card too small for any.
    wide = big | {"gradient_checkpointing": False, "micro_batch_size": 8}
    wide["loki"] = {"quota": 30, "protect": "off"}
    card = asked(wide, tmp_path, "--json", "--card", "12", code=1)["card"]
    assert card["then_fits"] and {"micro_batch_size: 1", "load_in_4bit: true"} <= {*card["change"]}
    card = asked(big, tmp_path, "--json", "--card", "4", code=1)["card"]
    assert not card["then_fits"]
    assert "take a smaller model" in asked(big, tmp_path, "--card", "4", code=1)


def test_where_only_the_length_can_change_the_shortest_is_told(big, tmp_path):
    small = big | {"load_in_4bit": True, "peft_autocast_adapter_dtype": False}
    card = asked(small, tmp_path, "--json", "--card", "4", code=1)["card"]
    assert card["change"] == ["sequence_len: 512"] and not card["then_fits"]


def test_a_folder_without_a_tokenizer_gives_none_that_knows_no_word(big, tmp_path):
    """transformers makes an empty tokenizer for a Qwen that has only its configuration."""
    from transformers import Gemma3TextConfig, Qwen3Config

    Qwen3Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2).save_pretrained(
        tmp_path / "qwen"
    )
    facts = asked(big | {"base_model": str(tmp_path / "qwen")}, tmp_path, "--json")
    assert facts["assumed"] == ["the tokenizer is not here: prompts of 200 tokens"]
    # And one that takes every word for the unknown one for a Gemma.
    Gemma3TextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16
    ).save_pretrained(tmp_path / "gemma")
    facts = asked(big | {"base_model": str(tmp_path / "gemma")}, tmp_path, "--json")
    assert facts["assumed"] == ["the tokenizer is not here: prompts of 200 tokens"]
    assert facts["analysis"]["longest_prompt_tokens"] == 200


def test_the_paper_s_counts_and_what_is_assumed_are_said(big, tmp_path):
    blocks = {q: {"quota": q, "protect": "off"} for q in (10, 20, 30)}
    counts = {q: asked(big | {"loki": block}, tmp_path, "--json") for q, block in blocks.items()}
    trained = [round(c["trainable_parameters"] / 1e6) for c in counts.values()]
    assert trained == [188, 376, 563]  # millions, in the paper's table
    assert counts[10]["assumed"] == ["the tokenizer is not here: prompts of 200 tokens"]
    protected = big | {"loki": {"quota": 10, "protect": {"directions": 100}}}
    facts = asked(protected, tmp_path, "--json")
    assert facts["disk"]["directions_bytes"] == 4 * 100 * 32 * 14336
    assert facts["training"]["directions_bytes"] == facts["disk"]["directions_bytes"]
    assert facts["analysis"]["finding_directions_bytes"] > facts["analysis"]["least_bytes"]
    anchored = big | {"loki": {"quota": 10, "protect": {"anchor": 0.1}}}
    plain = counts[10]["training"]
    facts = asked(anchored, tmp_path, "--json", "--card", "48")
    facts = facts["training"]
    assert facts["bytes"] >= plain["bytes"] and facts["activations_bytes"]["anchor"] > 0
    assert all(facts["step_seconds"][c] > plain["step_seconds"][c] for c in plain["step_seconds"])


def test_without_bf16_in_the_yaml_axolotl_takes_it_on_a_card_that_has_it(big, tmp_path):
    said = asked(big, tmp_path, "--json")["training"]
    unsaid = {k: v for k, v in big.items() if k != "bf16"}
    for same in (unsaid, unsaid | {"bf16": "auto"}, unsaid | {"fp16": True}):
        assert asked(same, tmp_path, "--json")["training"]["weights_bytes"] == said["weights_bytes"]
    for wide in (big | {"bf16": False}, big | {"bf16": None}):
        found = asked(wide, tmp_path, "--json", "--card", "80")["training"]
        assert found["weights_bytes"] > 1.9 * said["weights_bytes"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft": "x"}, "`peft:` must be a block of settings, got 'x'"),
        ({"bnb_config_kwargs": "x"}, "`bnb_config_kwargs:` must be a block of settings, got 'x'"),
        ({"overrides_of_model_config": [1]}, "`overrides_of_model_config:` must be a block of"),
        ({"loki": 5}, "`loki:` must be a block of settings, got 5"),
        ({"optimizer": ["adamw"]}, "optimizer must be a text, got ['adamw']"),
        ({"deepspeed": [1]}, "deepspeed: [1] is no configuration"),
        ({"deepspeed": {"zero_optimization": 3}}, "`zero_optimization` must be a block of"),
        ({"tensor_parallel_size": "2"}, "tensor_parallel_size: it spreads the rows"),
        ({"base_model": 7}, "base_model must be a text, got 7"),
        ({"output_dir": ["x"]}, "output_dir must be a text, got ['x']"),
        ({"adapter": "lora", "lora_r": 8.5}, "lora_r = 8.5, expected a whole number"),
        ({"adapter": "lora", "lora_r": 0}, "lora_r = 0, expected a whole number"),
        ({"loki": {"rank": 409}}, "rank = 409, but 409 rows train per layer"),
    ],
)
def test_settings_of_another_kind_are_named(big, tmp_path, change, message):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(big | change))
    result = CliRunner().invoke(loki, ["estimate", str(config)])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1
    assert message in result.output


def test_a_run_of_no_time_at_all_is_not_told_as_zero(big, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(tmp_path / "tiny")
    run = big | {"base_model": str(tmp_path / "tiny"), "sequence_len": 64}
    told = asked(run, tmp_path)
    assert "one step: RTX 3090 under 1 ms" in told and " 0.0 s" not in told
    assert all(0 < s for s in asked(run, tmp_path, "--json")["training"]["step_seconds"].values())


@pytest.mark.slow
def test_a_real_run_writes_and_trains_what_was_estimated(run_config, train, tmp_path):
    run = run_config | {
        "max_steps": 2, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    facts = asked(run, tmp_path, "--json")
    cfg = train(run)
    folder = Path(cfg.output_dir)
    report = json.loads((folder / "loki_report.json").read_text())
    assert facts["trainable_parameters"] == report["trainable_parameters"]
    assert facts["base_parameters"] == report["base_parameters"]
    adapter = (folder / "adapter_model.safetensors").stat().st_size
    assert facts["disk"]["adapter_bytes"] == adapter
    shards = (tmp_path / "cache").rglob("scores-*.safetensors")
    assert facts["disk"]["score_log_bytes"] == sum(s.stat().st_size for s in shards)
    assert facts["analysis"]["prompts"] == 8
    states = torch.load(folder / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]
    held = sum(s[k].nbytes for s in states.values() for k in ("exp_avg", "exp_avg_sq"))
    assert facts["training"]["optimizer_bytes"] == held


def test_score_shards_have_the_bytes_that_a_log_writes(tmp_path):
    from loki_plugin.analysing.scores.log import ScoreLog

    prompts = [str(i) for i in range(70)]
    log = ScoreLog(tmp_path, {"prompts": prompts, "num_layers": 3, "hidden_size": 48})
    for shard in range(log.num_shards):
        log.write(shard, torch.zeros(len(log.prompts(shard)), 3, 48))
    assert score_log_bytes(70, 3, 48) == log.age_and_size()[1]
