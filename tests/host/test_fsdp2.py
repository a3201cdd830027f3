"""FSDP2 through Axolotl on two CPU ranks: as under DDP, and the base is whole and unchanged.

Only the device is another one than on GPUs, see helpers/fsdp2_on_cpu.py.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from helpers.axolotl import load
from helpers.laws import adapter_of, assert_confined, modules_of
from helpers.torchrun import two_ranks
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loki_plugin.analysing.calibration.prompts import Text
from loki_plugin.blocks import ProtectArgs
from loki_plugin.evaluating.watching import measure
from loki_plugin.host import settings
from loki_plugin.host.files import Files
from loki_plugin.host.sharding import let_anchor_pass
from loki_plugin.protecting.directions import FILE_NAME, Directions
from loki_plugin.protecting.reading import leakage

EXAMPLE = Path(__file__).parents[2] / "example_configs" / "multi-gpu-fsdp2.yaml"
SCRIPT = """
import json, os, sys
from pathlib import Path
import helpers.fsdp2_on_cpu
import torch
from torch.distributed.tensor import DTensor
from loki_plugin.picturing import after
from loki_plugin.plugin import LokiPlugin

start, finish, seen = LokiPlugin.pre_lora_load, LokiPlugin.post_train, {}

def pre_lora_load(self, cfg, model):
    torch.manual_seed(0)  # lora_A is drawn alike under DDP and FSDP2
    start(self, cfg, model)

def post_train(self, cfg, model):
    parameters = dict(model.named_parameters())
    whole = sum(p.numel() for p in parameters.values())
    here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters.values())
    seen["part"] = here / whole
    watch = self.run.watch
    seen["texts"] = watch and [[t.ids for t in part] for part in (watch.prompts, watch.own)]
    try:
        model.save_pretrained(str(Path(cfg.output_dir) / "alone"))
    except RuntimeError as error:
        seen["alone"] = str(error)
    finish(self, cfg, model)

LokiPlugin.pre_lora_load, LokiPlugin.post_train = pre_lora_load, post_train

if __name__ == "__main__":  # data sets are tokenised in processes that import this file
    from accelerate.state import AcceleratorState, GradientState
    import axolotl.train
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    after.show = lambda *run: {"not_drawn": "the test is not about pictures"}
    axolotl.train.cleanup_distributed = lambda: None  # the next run needs the ranks still
    for path in sys.argv[1:]:
        do_train(load_cfg(path), TrainerCliArgs())
        Path(f"{path}.seen-{os.environ['RANK']}").write_text(json.dumps(seen))
        seen.clear()
        AcceleratorState._reset_state()
        GradientState._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)
"""


def sharding() -> dict:
    """The keys that shard the example, for the tests' Llama."""
    keys = ("fsdp_version", "fsdp_config", "save_only_model")
    example = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    found = {key: example[key] for key in keys}
    found["fsdp_config"]["transformer_layer_cls_to_wrap"] = "LlamaDecoderLayer"
    return found


@pytest.fixture
def sharded(run_config):
    """The YAML of a sharded run; what Axolotl's loading of it puts into the environment goes."""
    before = dict(os.environ)
    yield run_config | sharding()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_in_4bit": True}, "load_in_4bit: only 16/32-bit bases .* it trains under DDP"),
        ({"load_in_8bit": True}, "load_in_8bit: only 16/32-bit bases"),
        (
            {"loki": {"stop_forgetting": 0.05}},
            "loki.stop_forgetting: loading a checkpoint back was not proved under FSDP2",
        ),
        ({"rl": "dpo"}, "rl: preferences were not proved under FSDP2"),
        ({"dp_replicate_size": 2}, "dp_replicate_size: it was not proved"),
        ({"gradient_checkpointing": "offload"}, "gradient_checkpointing: offload was not proved"),
        (
            {"gradient_checkpointing": True, "loki": {}}
            | {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "gradient_checkpointing_kwargs: .* set `{use_reentrant: false}`",
        ),
        ({"fsdp": ["full_shard"]}, "fsdp: the settings of FSDP2 stand in `fsdp_config`"),
        ({"fsdp_version": 1}, "fsdp_config: FSDP1 hides what trains; use `fsdp_version: 2`"),
    ],
)
def test_what_was_not_proved_under_fsdp2_is_refused(sharded, change, message):
    with pytest.raises(ValueError, match=message):
        load(sharded | change)


def test_a_wrong_block_is_named(run_config):
    with pytest.raises(ValueError, match=r"`fsdp_config:` must be a block of settings, got 'all'"):
        load(run_config | {"fsdp_version": 2, "fsdp_config": "all"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offload_params": True}, "fsdp_config.offload_params: it was not proved"),
        ({"fsdp_offload_params": True}, "fsdp_config.offload_params: it was not proved"),
        ({"cpu_ram_efficient_loading": False}, "proved with True only, got False"),
        ({"auto_wrap_policy": "SIZE_BASED_WRAP"}, "proved with TRANSFORMER_BASED_WRAP only"),
    ],
)
def test_other_ways_of_sharding_are_refused(sharded, change, message):
    sharded["fsdp_config"] |= change
    with pytest.raises(ValueError, match=message):
        load(sharded)


@pytest.mark.parametrize("shares", ["fsdp2", "deepspeed", "nobody"])
def test_one_rank_that_reduces_gradients_has_checkpoints_that_bear_an_anchor(
    run_config, sharded, shares
):
    """Reentrant ones, Axolotl's default, lose a gradient under FSDP2 and end a DeepSpeed run."""
    cfg = sharded if shares == "fsdp2" else run_config
    cfg |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": None}
    cfg |= {"deepspeed": "zero2.json"} if shares == "deepspeed" else {}
    let_anchor_pass(cfg, ProtectArgs(anchor=1.0))
    wanted = None if shares == "nobody" else {"use_reentrant": False}
    assert cfg["gradient_checkpointing_kwargs"] == wanted


@pytest.mark.parametrize("prefix", ["", "fsdp_"])
def test_what_can_be_set_for_the_user_is_set_and_said(sharded, prefix):
    """About 50 of Axolotl's own FSDP2 examples want nothing else."""
    sharded["fsdp_config"] = {
        f"{prefix}auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        f"{prefix}transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        f"{prefix}activation_checkpointing": True,
    }
    sharded["save_strategy"] = "epoch"
    del sharded["save_only_model"]
    before = copy.deepcopy(sharded)
    kept = settings.remember(sharded)
    lines = [text for _, text in settings.prepare(sharded)]
    assert sharded["save_only_model"] is True and sharded["gradient_checkpointing"] is True
    assert sharded["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert sharded["fsdp_config"] == {
        f"{prefix}auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        f"{prefix}transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "cpu_ram_efficient_loading": True,
        "reshard_after_forward": True,
    }
    for said in (
        "fsdp_config.cpu_ram_efficient_loading = None: now True",
        "fsdp_config.reshard_after_forward = None: now True",
        "fsdp_config.activation_checkpointing = True: now `gradient_checkpointing: true`",
        "save_only_model = None: now True: checkpoints hold the adapter alone",
    ):
        assert any(line.startswith(said) for line in lines), (said, lines)
    once = copy.deepcopy(sharded)
    assert settings.prepare(sharded) == [
        ("sharding", "FSDP2: has run on CPU ranks only, see docs/ways.md")
    ]
    assert sharded == once
    settings.restore(sharded, kept)
    assert sharded == before
    cfg = load(sharded)  # and Axolotl takes what was set
    assert cfg.save_only_model is True and cfg.gradient_checkpointing is True
    assert cfg.fsdp_config.cpu_ram_efficient_loading is True


def test_every_refusal_says_what_to_do(sharded):
    """Under a heading that says so."""
    sharded |= {"load_in_8bit": True, "rl": "dpo", "torch_compile": True, "peft_use_dora": True}
    sharded["fsdp_config"] |= {"offload_params": True, "cpu_ram_efficient_loading": False}
    sharded["fsdp_config"].pop("auto_wrap_policy")
    with pytest.raises(ValueError, match="each line says what to do:") as raised:
        settings.prepare(sharded)
    lines = str(raised.value).splitlines()[1:]
    assert len(lines) >= 7
    for line in lines:
        assert any(do in line for do in ("remove it", "set it to", "take ", "set ")), line


def test_another_way_of_saving_is_refused(sharded, monkeypatch):
    from axolotl.integrations.expert_parallel import shard

    monkeypatch.delattr(shard, "save_fsdp2_lora_adapter")
    with pytest.raises(ValueError, match="this version of Axolotl saves FSDP2 adapters in another"):
        load(sharded)


@pytest.mark.parametrize("key", ["lora_model_dir", "resume_from_checkpoint"])
def test_a_sharded_training_starts_afresh(sharded, key):
    cfg = load(sharded | {key: "somewhere"})  # `inference` and `merge-lora` may name an adapter
    with pytest.raises(ValueError, match=f"{key}: going on from an adapter or a checkpoint"):
        Files.read(cfg)


@pytest.fixture(scope="module")
def tied(base, tmp_path_factory):
    """The base with its output embeddings tied to the others."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tied")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def runs(base, tied, dataset, questions, tmp_path_factory):
    """Name -> the output folder of a run on two ranks; all in one launch."""
    from helpers.axolotl import short_run

    folder = tmp_path_factory.mktemp("fsdp2")
    plain = short_run(base, dataset, questions, folder) | {
        "optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.1, "max_grad_norm": 0.1,
        "micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3,
        "dataloader_num_workers": 0,
    }  # fmt: skip
    low = {"rank": 2, "protect": {"inputs": 0.9, "anchor": 0.5, "anchor_batch": 2}}
    low_rank = plain | {
        "base_model": str(tied),
        "loki": plain["loki"] | low,
        "bf16": True,
        "plugins": ["loki", "helpers.on_cpu.OnCpu"],
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    auto = plain | {"loki": plain["loki"] | {"protect": {"auto": True, "count": 4}}}
    auto["gradient_checkpointing"] = True  # what is sharded gets no reentrant ones
    # `lora_target_linear: true`, as a user has it: rank 4 on every linear, and all rows.
    linears = plain | {"loki": plain["loki"] | {"quota": 100, "rank": 4, "targets": "all"}}
    linears["loki"] |= {"protect": {"auto": True, "count": 4}}
    few = plain | {"loki": plain["loki"] | {"targets": "all", "linear_rank": 4}}
    saving = sharding() | {"save_strategy": "steps", "save_steps": 2}
    reentrant = {"gradient_checkpointing": True}
    configs = {
        "dense-fsdp2": plain | saving | reentrant,  # its first rank analyses
        "dense-ddp": plain,
        "rank2-ddp": low_rank,
        "rank2-fsdp2": low_rank | saving,  # finds the analysis of both ranks in the cache
        "auto-ddp": auto,
        "auto-fsdp2": auto | sharding(),
        "all-ddp": linears,
        "all-fsdp2": linears | sharding(),
        "few-ddp": few,
        "few-fsdp2": few | saving,
        "watched-fsdp2": plain | sharding() | {"val_set_size": 0.2, "eval_steps": 3},
    }
    files = []
    for name, config in configs.items():
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(json.dumps(config | {"output_dir": str(folder / name)}))
    (folder / "ranks.py").write_text(SCRIPT)
    two_ranks(folder / "ranks.py", *files)
    return folder


def seen(runs: Path, name: str) -> list[dict]:
    return [json.loads((runs / f"{name}.yaml.seen-{rank}").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "rank", "linear_rank"),
    [
        ("dense", None, None),
        ("rank2", 2, None),
        ("auto", None, None),
        ("all", 4, 4),
        ("few", None, 4),
    ],
)
def test_it_trains_the_model_that_ddp_trains(runs, base, tied, form, rank, linear_rank):
    for found in seen(runs, f"{form}-fsdp2"):
        assert 0.4 < found["part"] < 0.6  # each rank holds a half
        assert "each rank holds a part of it only" in found["alone"]
    assert [found["part"] for found in seen(runs, f"{form}-ddp")] == [1, 1]
    out = runs / f"{form}-fsdp2"
    assert not (out / "alone").exists()
    assert_confined(out, rank, linear_rank)
    report = json.loads((out / "loki_report.json").read_text())
    assert report["verified"] is True and not report["faults"]
    assert report["verified_what"]["base"] == "every byte"
    if form in ("auto", "all"):
        assert report["protection"]["soft"] is True and report["anchor_kl_last_step"] is not None
        directions = Directions.load(out / FILE_NAME)
        assert len(directions.still) == (21 if form == "all" else 0)
        assert all(directions.held().counts) and len(directions.held().basis) == 3 * (form != "all")
    # Mixed precision rounds other sums to bf16 than autocast does.
    bound = 0.05 if form == "rank2" else 1e-5
    ddp = modules_of(runs / f"{form}-ddp")
    for name, (a, b) in modules_of(out).items():
        update, wanted = b @ a, ddp[name][1] @ ddp[name][0]
        assert (update - wanted).norm() <= bound * wanted.norm(), name
        assert wanted.norm() > (1e-5 if linear_rank else 1e-3)  # B starts at zero on linears
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tied if form == "rank2" else base), out
    )
    stored = load_file(out / "adapter_model.safetensors")
    loaded = {k: v for k, v in tuned.state_dict().items() if ".lora_" in k}
    assert len(loaded) == len(stored) == (2 * 3 * 7 if linear_rank else 6)
    for key, tensor in stored.items():
        assert torch.equal(loaded[key.replace(".weight", ".default.weight")], tensor), key


@pytest.mark.slow
def test_its_evaluations_measure_what_the_saved_adapter_has_forgotten(runs, base):
    out = runs / "watched-fsdp2"
    (texts, theirs) = (found["texts"] for found in seen(runs, "watched-fsdp2"))
    assert texts == theirs and len(texts[0]) == 1 and len(texts[1]) > 1
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    truth = measure(tuned, *([Text(tuple(ids)) for ids in part] for part in texts))
    report = json.loads((out / "loki_report.json").read_text())["forgetting_while_training"]
    before, after = report["path"]
    assert before.pop("loss") > after["loss"] > 0
    assert before == {"step": 0, "kl": 0.0, "kept": 1.0} and after["step"] == 3
    assert after["kl"] == pytest.approx(truth.kl, rel=1e-3) and truth.kl > 1e-6
    assert after["kept"] == truth.kept


@pytest.mark.slow
def test_it_does_not_read_protected_directions(runs):
    out = runs / "rank2-fsdp2"
    report = json.loads((out / "loki_report.json").read_text())
    assert report["anchor_kl_last_step"] is not None
    for layer, u in enumerate(Directions.load(out / FILE_NAME).basis):
        a, b = adapter_of(out)[layer]
        assert leakage(b @ a, u) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("form", "rank"), [("dense", None), ("rank2", 2)])
def test_its_checkpoints_hold_the_whole_adapter(runs, form, rank):
    folder = runs / f"{form}-fsdp2" / "checkpoint-2"
    assert_confined(folder, rank)
    assert not list(folder.glob("*optimizer*")) and not list(folder.glob("*fsdp*"))
