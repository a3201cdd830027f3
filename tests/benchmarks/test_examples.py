"""The sweep over a folder of YAMLs: what is taken, what is refused by whom, what trains."""

from __future__ import annotations

import csv
import sys

import pytest
import yaml

from benchmarks import examples
from benchmarks.known_bases import known

# In the style of Axolotl's examples; bases by ids that nobody has.
LORA = {
    "load_in_8bit": False,
    "datasets": [{"path": "mhenrichsen/alpaca_2k_test", "type": "alpaca"}],
    "val_set_size": 0.1,
    "output_dir": "./outputs/lora-out",
    "adapter": "lora",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "sequence_len": 512,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "num_epochs": 1,
    "optimizer": "adamw_torch",
    "lr_scheduler": "cosine",
    "learning_rate": 0.0002,
    "bf16": "auto",
    "gradient_checkpointing": True,
}
FULL = {k: v for k, v in LORA.items() if not k.startswith(("adapter", "lora_"))}
YAMLS = {
    "llama-3/lora-1b.yml": LORA | {"base_model": "nobody/Llama-3.2-1B"},
    "llama-3/fft-1b.yaml": FULL | {"base_model": "nobody/Llama-3.2-1B"},
    "llama-3/unfrozen.yml": FULL
    | {"base_model": "nobody/Llama-3.2-1B", "unfrozen_parameters": ["model.layers.2[4-9]+.*"]},
    "mistral3/lora.yml": LORA | {"base_model": "nobody/Ministral-3-3B"},
    "mixtral/lora.yml": LORA | {"base_model": "nobody/Mixtral-8x7B"},
    "mixtral/rows.yml": FULL | {"base_model": "nobody/Mixtral-8x7B"},
    "jamba/lora.yml": LORA | {"base_model": "nobody/Jamba-v0.1"},
    "quantised/lora.yml": LORA | {"base_model": "nobody/Llama-2-7B-GPTQ"},
    "own/lora.yml": LORA | {"base_model": "nobody/has-this-one", "trust_remote_code": True},
    "old/lora.yml": LORA | {"base_model": "nobody/Llama-3.2-1B", "max_packed_sequence_len": 9},
    "deepspeed.yaml": {"zero_optimization": {"stage": 1}},
}


TRAIN = ("llama-3/lora-1b.yml", "llama-3/fft-1b.yaml", "mistral3/lora.yml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    for name, run in YAMLS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(run))
    (folder / "broken.yml").write_text("base_model: [")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return {o.file: o for o in examples.sweep(folder)}


def test_every_yaml_with_a_base_has_an_outcome(found):
    assert set(found) == set(YAMLS) - {"deepspeed.yaml"}
    assert found["own/lora.yml"].axolotl.startswith("not tried")
    assert "no longer supported" in found["old/lora.yml"].axolotl
    assert sum(o.taken for o in found.values()) == 8


@pytest.mark.parametrize(
    "name", ["llama-3/lora-1b.yml", "llama-3/fft-1b.yaml", "mistral3/lora.yml"]
)
def test_what_trains_was_trained_merged_and_verified(found, name):
    outcome = found[name]
    assert outcome.whole and outcome.in_the_end and not outcome.why
    assert (outcome.analysed, outcome.trains, outcome.merges) == ("yes", "yes", "yes")


def test_refusals_are_told_apart_by_who_refuses_and_why(found):
    unfrozen = found["llama-3/unfrozen.yml"]
    assert unfrozen.accepted and unfrozen.whole  # the key is overridden, and the log says so
    gptq = found["quantised/lora.yml"]
    assert "quantised with 'gptq'" in gptq.loki and not gptq.accepted and not gptq.whole
    jamba = found["jamba/lora.yml"]
    assert jamba.whole and jamba.analysed == "yes"  # by the plain loop
    mixtral = found["mixtral/lora.yml"]  # `lora_target_linear`: all but the experts
    assert mixtral.whole and "routed experts only" in mixtral.analysed
    asked = found["mixtral/rows.yml"]
    assert "routed experts only" in asked.loki and asked.possible and asked.in_the_end


def test_the_command_counts_them(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.csv"
    monkeypatch.setattr(sys, "argv", ["examples", str(folder), "--csv", str(out)])
    examples.main()
    said = capsys.readouterr().out
    assert "10 YAMLs, of which Axolotl takes 8 here" in said
    assert "7 (88 %; analysed 5) have a base that trains" in said
    assert "6 (75 %; analysed 5) are accepted as they stand" in said
    assert "a mixture with routed experts only" in said
    with out.open() as file:
        assert len(list(csv.DictReader(file))) == 10


@pytest.mark.parametrize(
    "base, family, text, stored",
    [
        ("google/gemma-4-26B-A4B", "gemma4", "gemma4_text", None),
        ("Qwen/Qwen3.5-35B-A3B-Base", "qwen3_5_moe", "qwen3_5_moe_text", None),
        ("Qwen/Qwen3.5-9B", "qwen3_5", "qwen3_5_text", None),
        ("mistral-community/Mixtral-8x22B-v0.1", "mixtral", "mixtral", None),
        ("mistral-community/pixtral-12b", "llava", "mistral", None),
        ("some/Mistral-Small-4-119B-2603-BF16", "mistral3", "mistral4", None),
        ("openai/gpt-oss-20b", "gpt_oss", "gpt_oss", "mxfp4"),
        ("some/gpt-oss-120b-dequantized", "gpt_oss", "gpt_oss", None),
        ("some/Llama-4-Scout-17B-16E-Linearized-bnb-nf4", "llama4", "llama4_text", "bitsandbytes"),
    ],
)
def test_a_base_is_known_by_its_id(base, family, text, stored):
    config, quantised = known(base)
    assert (config.model_type, config.get_text_config().model_type) == (family, text)
    assert quantised == stored
    if base.endswith("A4B"):
        assert config.get_text_config().enable_moe_block
    assert known("nobody/has-this-one") is None
