"""Every example configuration passes Axolotl's validation and trains a tiny model in miniature."""

from __future__ import annotations

import gc
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.families import FAMILIES
from helpers.laws import assert_confined, checkpoint
from helpers.published import PUBLISHED, save
from helpers.tokenizers import SPECIAL, make_tokenizer

from demo import tiny
from loki_plugin.cli import loki
from loki_plugin.host.estimated import size
from loki_plugin.host.sharding import SPREADING
from loki_plugin.implanting.merge import merge_adapter

pytestmark = pytest.mark.usefixtures("own_plugins")
ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "example_configs"
CONFIGS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
EVALUATES = "lm-eval-before"  # the one that does not train
SMOKE, WITH_LM_EVAL = "cpu-smoke", "8gb-qwen2.5-0.5b-bf16-lm-eval"
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
    "LiquidAI/LFM2-1.2B": "lfm2",
    "allenai/OLMoE-1B-7B-0924-Instruct": "olmoe",
}
# Without rows, so that it is no family of those that are analysed.
OLMOE = {"num_attention_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}


def read(name: str) -> dict:
    return yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))


def test_every_configuration_stands_in_the_table_with_its_card_and_model():
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.-]+)\.yaml` \| (.*) \|$", table, re.MULTILINE))
    assert rows.keys() == CONFIGS.keys()
    for name in [name for name in TRAIN if "gb-" in name]:
        config = read(name)
        assert config["output_dir"] == f"./outputs/{name}"
        card = f"{int(name.partition('gb-')[0])} GB"
        assert CONFIGS[name].read_text(encoding="utf-8").startswith(f"# Card: {card}.")
        assert rows[name].startswith(f"{card} | {config['base_model'].rpartition('/')[2]} | ")


def test_an_example_whose_rows_another_leaves_out_leaves_it_some():
    found = 0
    for name in TRAIN:
        for file in read(name)["loki"].get("exclude", ()):
            first = Path(file).parent.name
            assert file == f"./outputs/{first}/loki_rows.json"
            assert read(first)["base_model"] == read(name)["base_model"]
            assert read(first)["loki"]["quota"] + read(name)["loki"]["quota"] <= 100
            found += 1
    assert found


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
    assert given.keys() - valid.keys() - {"lora_target_linear"} == set()  # it is in our block now
    for entry, kept in zip(given["datasets"], valid.datasets, strict=True):
        assert entry.keys() - kept.keys() == set()  # Axolotl drops what it does not know
    if given.get("sample_packing"):  # other attention lets packed samples see each other
        assert valid.attn_implementation == "flash_attention_2"


def estimate_of(name: str, folder: Path) -> tuple[str, int]:
    """What `loki estimate` says of an example as a comment of its file, and its exit code."""
    config = read(name)
    model_type, shape = PUBLISHED[config["base_model"]]
    config["base_model"] = str(save(config["base_model"], folder / "model"))
    config["loki"].pop("exclude", None)
    if "rows" in config["loki"]:
        rows = list(range(shape["hidden_size"] // 10))
        config["loki"]["rows"] = str(folder / "rows.json")
        (folder / "rows.json").write_text(json.dumps([rows] * shape["num_hidden_layers"]))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    card = name.partition("gb-")[0] if "gb-" in name else "24"  # each of several
    result = CliRunner().invoke(loki, ["estimate", str(path), "--card", card, "--json"])
    assert result.stdout, result.output
    facts = json.loads(result.stdout)
    training, analysis = facts["training"], facts["analysis"]
    text = f"training {size(training['bytes'])}"
    if analysis["prompts"]:
        text += f", analysis {size(analysis['least_bytes'])} with one prompt at a time"
    left_out = [f"#   {line}\n" for line in facts["assumed"] if "prompts of" not in line]
    return "".join([f"# Estimate (`loki estimate`): {text}.\n", *left_out]), result.exit_code


# A shard of a model is not what `loki estimate` estimates.
@pytest.mark.parametrize("name", [n for n in TRAIN if n not in (SMOKE, "multi-gpu-fsdp2")])
def test_the_estimate_in_its_comment_fits_the_card(name, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    def not_here(*_, **__):
        raise OSError("only configurations are made here")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", not_here)
    line, code = estimate_of(name, tmp_path)
    assert code == 0, "it does not fit"
    assert line in CONFIGS[name].read_text(encoding="utf-8")


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
    "./chats.jsonl": {"messages": CHAT},
}
# Tokens that a family's tokenizer class or its example names, so that none is new to the base.
PAD, QWEN_END = "<|finetune_right_pad_id|>", "<|endoftext|>"
IMAGES = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
TURNS = ["<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """Axolotl's packing collects garbage a dozen times a run; what is imported is none."""
    import axolotl.core.builders  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
    special = SPECIAL[:-1] + [PAD, QWEN_END, *TURNS, *IMAGES.values(), SPECIAL[-1]]
    tokenizer = make_tokenizer(target, special=special)
    model_type, settings = FAMILIES.get(family) or (family, OLMOE)
    settings = {k: v for k, v in settings.items() if k != "layer_types"}
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
        # What spreads it over GPUs is tested on two ranks, in tests/host/.
        config = {key: value for key, value in read(name).items() if key not in SPREADING}
        config["base_model"] = str(base_of(config["base_model"]))
        for entry in config["datasets"]:
            entry |= {"path": str(data[entry["path"]]), "ds_type": "json"}
            entry.pop("split", None)
        block = config["loki"]
        block["calibration"] = {"source": str(questions)}
        block["cache_dir"] = str(folder / "cache")
        if block.get("protect") == "auto":
            block["protect"] = {"auto": True, "count": 8}  # 160 in earnest
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
            "dataloader_num_workers": 0,
            "sequence_len": 128,
            "max_steps": 2,
            "gradient_accumulation_steps": 2,
            "save_strategy": "no",
            "seed": 1,
        }

    return make


def assert_trained(config: dict) -> Path:
    """The adapter is there, confined to its rows, merges into its base, and the report says so."""
    out = Path(config["output_dir"])
    report = json.loads((out / "loki_report.json").read_text())
    assert report["verified"] and not report["faults"]
    block = config["loki"]
    rank = block.get("rank") or config.get("lora_r")
    selection = assert_confined(out, rank, block.get("linear_rank") or rank)
    hidden, quota = selection.hidden_size, block.get("quota", 10)
    assert selection.counts == [hidden * quota // 100] * selection.num_layers
    merge_adapter(config["base_model"], out, out / "merged", selection, progress=False)
    before, after = checkpoint(config["base_model"]), checkpoint(out / "merged")
    changed = {k: (old != after[k]).any(-1).nonzero() for k, old in before.items()}
    changed = {k: rows[:, 0] for k, rows in changed.items() if len(rows)}
    # A wrapper's checkpoint says `language_model.model.layers`, the loaded one has it otherwise.
    ends = {f"layers.{name.partition('layers.')[2]}.weight" for name in selection.linears}
    linears = {k for k in changed if k[k.find("layers.") :] in ends and "vision" not in k}
    assert len(linears) == len(ends)
    every = block.get("targets") == "all" or bool(config.get("lora_target_linear"))
    assert bool(linears) == every
    changed = {k: rows for k, rows in changed.items() if k not in linears}
    assert len(changed) == selection.num_layers
    for layer, key in enumerate(sorted(changed)):
        down = rf".*\.layers\.{layer}\.(mlp\.down_proj|feed_forward\.w2)\.weight"
        assert re.fullmatch(down, key) and "vision" not in key
        assert torch.equal(changed[key], selection.rows[layer])
    for path in block.get("exclude", []):
        earlier = json.loads(Path(path).read_text())
        assert not any({*a} & {*b.tolist()} for a, b in zip(earlier, selection.rows, strict=True))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in TRAIN if n not in (SMOKE, WITH_LM_EVAL)])
def test_it_trains_in_miniature(name, miniature, train):
    config = miniature(name)
    train(config)
    assert_trained(config)


@pytest.mark.slow
def test_the_smoke_run_needs_only_the_command_that_it_names(tmp_path, monkeypatch, train):
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = read(SMOKE)
    (command,) = re.findall(r"python -m demo\.tiny (\S+)", CONFIGS[SMOKE].read_text())
    assert Path(command) == Path(config["base_model"])
    tiny.make(tmp_path / command)
    train(config)
    assert_trained(config)


@pytest.mark.slow
def test_lm_eval_gets_the_base_before_and_the_merged_model_after(miniature, train, monkeypatch):
    from axolotl.integrations import lm_eval
    from axolotl.integrations.lm_eval.cli import lm_eval as command
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    asked = []
    monkeypatch.setattr(lm_eval.subprocess, "run", lambda arguments, check: asked.append(arguments))
    config = miniature(WITH_LM_EVAL)
    train(config)
    out = assert_trained(config)
    assert not asked
    for name in (EVALUATES, WITH_LM_EVAL):
        CliRunner().invoke(command, [str(CONFIGS[name])], catch_exceptions=False)
    given = read(WITH_LM_EVAL)
    models = [f"pretrained={given[key]},dtype=bfloat16" for key in ("base_model", "lm_eval_model")]
    assert [model in arguments for model, arguments in zip(models, asked, strict=True)] == [
        True
    ] * 2
    assert Path(given["lm_eval_model"]) == Path(given["output_dir"]) / "merged"
    assert [a[a.index("--tasks") + 1] for a in asked] == ["hellaswag,winogrande,gsm8k"] * 2
    ids = torch.arange(3, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(config["base_model"]).eval()
    merged = HFLM(pretrained=str(out / "merged"), device="cpu", dtype="float32").model
    with torch.no_grad():
        before, after = base(input_ids=ids).logits, merged(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, out).eval()(input_ids=ids).logits
    assert torch.allclose(after, tuned, atol=1e-5) and not torch.equal(before, tuned)


@pytest.mark.slow
def test_self_replay_keeps_the_models_own_finished_answers(base_of, data, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = base_of("Qwen/Qwen2.5-0.5B-Instruct"), tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(source)
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = list(range(0, model.config.vocab_size, 2))  # it does end
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)

    def ask(tokens: int) -> list[dict]:
        out = tmp_path / f"{tokens}.jsonl"
        asked = ["--questions", str(data["trl-lib/Capybara"]), "--count", "20"]
        command = [str(folder), str(out), *asked, "--tokens", str(tokens)]
        monkeypatch.setattr(sys, "argv", ["self_replay.py", *command])
        runpy.run_path(str(FOLDER / "self_replay.py"), run_name="__main__")
        return [json.loads(line)["messages"] for line in out.read_text().splitlines()]

    assert ask(1) == []  # cut off, or empty
    found = ask(64)
    assert len(found) > 2
    for asked, answer in found:
        assert asked == CHAT[0] and answer["role"] == "assistant"
    assert len({answer["content"] for _, answer in found}) > 2
    assert CHAT[1] not in [answer for _, answer in found]
