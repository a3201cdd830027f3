"""Every example configuration passes Axolotl's validation and trains a tiny model in miniature."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers.families import FAMILIES
from helpers.laws import assert_confined, checkpoint
from helpers.tokenizers import SPECIAL, make_tokenizer

from loki_plugin.implanting.merge import merge_adapter

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "example_configs"
CONFIGS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
EVALUATES = "lm-eval-before"  # the one that does not train
TRAIN = [name for name in CONFIGS if name != EVALUATES]
# What Axolotl asks the machine for: an Ada card, as most of those named are.
CARD = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_89"}
FAMILY = {
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2",
    "Qwen/Qwen3-4B": "qwen3",
    "Qwen/Qwen3-8B": "qwen3",
    "meta-llama/Llama-3.1-8B-Instruct": "llama3-rope",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-sliding",
    "google/gemma-3-4b-it": "gemma3",
    "microsoft/Phi-4-mini-instruct": "phi4",
    "./outputs/tiny": "llama",
}


def read(name: str) -> dict:
    return yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))


def test_every_configuration_stands_in_the_table_with_its_card_and_model():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.-]+)\.yaml` \| (.*) \|$", table, re.MULTILINE))
    assert rows.keys() == CONFIGS.keys()
    for name in TRAIN:
        config = read(name)
        assert config["output_dir"] == f"./outputs/{name}"
        card = f"{int(name.partition('gb-')[0])} GB" if "gb-" in name else "none"
        assert CONFIGS[name].read_text(encoding="utf-8").startswith(f"# Card: {card}.")
        assert rows[name].startswith(f"{card} | {config['base_model'].rpartition('/')[2]} | ")


@pytest.mark.parametrize("name", TRAIN)
def test_axolotl_accepts_it_and_knows_every_key(name):
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    given = read(name)
    cfg = DictDefault(read(name))
    prepare_plugins(cfg)
    version = torch.__version__.partition("+")[0]
    valid = validate_config(cfg, dict(CARD), {"torch_version": version})
    assert valid.adapter == ("qlora" if given.get("load_in_4bit") else "lora")
    assert given.keys() - valid.keys() == set()
    for entry, kept in zip(given["datasets"], valid.datasets, strict=True):
        assert entry.keys() - kept.keys() == set()  # Axolotl drops what it does not know
    if given.get("sample_packing"):
        assert valid.attn_implementation == "flash_attention_2"


CHAT = [{"role": "user", "content": "say the number"}, {"role": "assistant", "content": "the one"}]
NAMES = {"user": "human", "assistant": "gpt"}
# Records with the columns that the data sets on the hub have.
RECORDS = {
    "Team-ACE/ToolACE": {
        "system": "answer, please",
        "conversations": [
            *({"from": turn["role"], "value": turn["content"]} for turn in CHAT),
            {"from": "tool", "value": "the answer"},
            {"from": "assistant", "value": "and the answer"},
        ],
    },
    "lightblue/reranker_continuous_filt_max7_train": {
        "conversations": [{"from": NAMES[t["role"]], "value": t["content"]} for t in CHAT],
    },
    "trl-lib/Capybara": {"source": "none", "messages": CHAT, "num_turns": 1},
    "trl-lib/ultrafeedback_binarized": {
        "chosen": CHAT,
        "rejected": [CHAT[0], {"role": "assistant", "content": "no"}],
        "score_chosen": 9.0,
        "score_rejected": 2.0,
    },
    "./self_replay.jsonl": {"messages": CHAT},
    "demo/data/skill_train.jsonl": {"messages": CHAT},
}
PAD = "<|finetune_right_pad_id|>"
IMAGES = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
TURNS = ["<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def base_of(folder):
    """The folder of a tiny model of the family that a model on the hub is of."""
    made = {}

    def make(name: str) -> Path:
        family = FAMILY[name]
        if family not in made:
            made[family] = save_tiny(family, folder / family)
        return made[family]

    return make


def save_tiny(family: str, target: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    target.mkdir()
    special = SPECIAL[:-1] + [PAD, *TURNS, *IMAGES.values(), SPECIAL[-1]]
    tokenizer = make_tokenizer(target, special=special)
    model_type, settings = FAMILIES[family]
    settings = settings | {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    if family == "gemma3":
        model = vision_wrapper(settings, tokenizer, target)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    model.save_pretrained(target)
    return target


def vision_wrapper(text: dict, tokenizer, target: Path):
    """What google/gemma-3-4b-it is: the text model inside a vision model, with its processor."""
    from transformers import (
        AutoTokenizer,
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessor,
        Gemma3Processor,
    )

    tokenizer = AutoTokenizer.from_pretrained(target, extra_special_tokens=IMAGES)
    size = {"height": 28, "width": 28}
    Gemma3Processor(Gemma3ImageProcessor(size=size), tokenizer).save_pretrained(target)
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    ids = {
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "boi_token_index": tokenizer.convert_tokens_to_ids("<boi>"),
        "eoi_token_index": tokenizer.convert_tokens_to_ids("<eoi>"),
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    return Gemma3ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def data(folder):
    """path on the hub -> a local file with the same columns."""
    files = {}
    for i, (name, record) in enumerate(RECORDS.items()):
        files[name] = folder / f"data{i}.jsonl"
        files[name].write_text((json.dumps(record) + "\n") * 280)
    return files


@pytest.fixture
def miniature(folder, base_of, data, questions, tmp_path):
    """An example as it stands, with model, data and files of this machine, for two steps."""

    def make(name: str) -> dict:
        config = read(name)
        config["base_model"] = str(base_of(config["base_model"]))
        for entry in config["datasets"]:
            entry |= {"path": str(data[entry["path"]]), "ds_type": "json"}
            entry.pop("split", None)
        block = config["loki"]
        block["calibration"] = {"source": str(questions)}
        block["cache_dir"] = str(folder / "cache")
        for key in ("rows", "exclude"):
            if key in block:
                path = folder / "rows.json"
                path.write_text(json.dumps([list(range(i, i + 12)) for i in range(2)]))
                block[key] = str(path) if key == "rows" else [str(path)]
        if config.get("bf16"):
            config["plugins"].append("helpers.on_cpu.OnCpu")
        config.pop("attn_implementation", None)  # of the card; a CPU has one
        return config | {
            "output_dir": str(tmp_path / "out"),
            "dataset_prepared_path": str(folder / "prepared"),
            "dataset_num_proc": 1,
            "dataloader_num_workers": 0,
            "sequence_len": 128,
            "max_steps": 2,
            "gradient_accumulation_steps": 2,
            "save_strategy": "no",
            "seed": 1,
        }

    return make


@pytest.fixture(autouse=True)
def plugins():
    """Axolotl keeps plugins for later configurations of the process; these take theirs along."""
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    before = manager.plugins.copy()
    yield
    manager.plugins.clear()
    manager.plugins.update(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAIN)
def test_it_trains_in_miniature(name, miniature, train):
    config = miniature(name)
    train(config)
    out = Path(config["output_dir"])
    report = json.loads((out / "loki_report.json").read_text())
    assert report["verified"] and not report["faults"]
    rank = config["loki"].get("rank") or config.get("lora_r")
    selection = assert_confined(out, rank)
    quota = config["loki"].get("quota", 10)
    assert selection.counts == [128 * quota // 100] * 2
    merge_adapter(config["base_model"], out, out / "merged", selection, progress=False)
    before, after = checkpoint(config["base_model"]), checkpoint(out / "merged")
    changed = {k: (old != after[k]).any(-1).nonzero() for k, old in before.items()}
    changed = {k: rows[:, 0] for k, rows in changed.items() if len(rows)}
    assert len(changed) == 2
    for layer, key in enumerate(sorted(changed)):
        assert key.endswith(f".layers.{layer}.mlp.down_proj.weight") and "vision" not in key
        assert torch.equal(changed[key], selection.rows[layer])
