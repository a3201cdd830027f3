"""A saved adapter is measured on its own base, under the names that it has, or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from axolotl.utils.dict import DictDefault
from click.testing import CliRunner
from helpers.merging import shaken
from helpers.prompts import LM_EVAL_TASK
from helpers.tokenizers import make_tokenizer
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.standins import published, shrink
from benchmarks.trial import save_standin
from loki_plugin import RowSelection, implant
from loki_plugin.cli import loki
from loki_plugin.evaluating.forgetting import of_a_run
from loki_plugin.host.run import Run
from loki_plugin.implanting.fitting import changed_modules, check_fits
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.model.building import kinds
from loki_plugin.model.fingerprint import fingerprint

ROWS = [[1, 5, 9], [0, 2, 63, 7], [3, 4, 5], [7, 8]]
OLD, NEW = "a" * 40, "b" * 40


def call(*words):
    return CliRunner().invoke(loki, [str(word) for word in words])


def whole(base):
    return kinds(AutoConfig.from_pretrained(base))[0].loader.from_pretrained(
        base, dtype=torch.float32
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base for images and text, adapters of the whole and of its text model, and a task."""
    folder = tmp_path_factory.mktemp("fitting")
    base = folder / "base"
    save_standin(shrink(published("qwen3_5")), base)
    make_tokenizer(base)
    model = whole(base)
    rows = RowSelection(ROWS, 64, fingerprint(model))
    shaken(implant(model, rows), 0.3).save_pretrained(folder / "adapter")
    shaken(implant(whole(base), rows, rank=1), 0.3).save_pretrained(folder / "low")
    # Rows that are given as a list have no fingerprint.
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    shaken(implant(alone, ROWS), 0.3).save_pretrained(folder / "listed")
    for name in ("adapter", "low"):
        done = call("export", folder / name, folder / f"{name}-text", "--names", "text")
        assert done.exit_code == 0, done.output
    questions = folder / "questions.jsonl"
    asked = [{"question": f"say {i}", "choices": [" a", " b"], "answer": i % 2} for i in range(12)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "colours.yaml").write_text(LM_EVAL_TASK % questions)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(5)))
    return folder


def kl(done):
    assert done.exit_code in (0, 1), done.output
    return float(re.search(r"KL to the base (-?[\d.]+) nats", done.output)[1])


def forgetting(folder, tuned, *more, base=None):
    prompts = "--prompts", folder / "prompts.jsonl"
    given = "--base", base or folder / "base", "--tuned", folder / tuned
    return call("forgetting", *given, *prompts, *more)


@pytest.mark.parametrize("name", ["adapter-text", "listed"])
def test_a_base_is_loaded_as_the_class_whose_modules_an_adapter_names(folder, name):
    """Else PEFT only warns, the base is compared with itself, and every threshold is kept."""
    truth = kl(forgetting(folder, "adapter"))
    assert truth > 0.05
    done = forgetting(folder, name, "--max-kl", "0.05")
    assert done.exit_code == 1 and kl(done) > 0.05
    if name == "adapter-text":
        assert kl(done) == pytest.approx(truth, abs=1e-3)


def test_what_a_smaller_rank_loses_is_measured_under_both_names(folder, tmp_path):
    told = []
    for name in ("adapter", "adapter-text"):
        prompts = "--prompts", folder / "prompts.jsonl"
        done = call("export", folder / name, tmp_path / name, "--rank", "1", *prompts)
        told.append(re.search(r"KL\(ADAPTER \|\| OUT\) ([\d.]+) nats", done.output)[1])
    assert told[0] == told[1] and float(told[0]) > 0.01


@pytest.mark.slow
def test_tasks_are_asked_of_an_adapter_as_of_its_merged_model(folder, tmp_path):
    """lm-eval loads the text model alone, of which the adapter changes nothing."""
    rows = RowSelection.load(folder / "adapter" / "loki_rows.json")
    merge_adapter(folder / "base", folder / "adapter", tmp_path / "merged", rows, progress=False)
    tasks = ("--tasks", "colours", "--include", folder / "tasks", "--batch-size", "4")
    tasks += ("--device", "cpu")
    lines = [
        re.search(r"colours \(acc.*", forgetting(folder, tuned, *tasks).output)[0]
        for tuned in ("adapter", tmp_path / "merged")
    ]
    assert lines[0] == lines[1]
    lost, gained = re.search(r"items (\d+) lost, (\d+) gained", lines[0]).groups()
    assert int(lost) + int(gained) > 0


def test_an_adapter_of_other_modules_is_refused(folder, tmp_path):
    model = whole(folder / "base")
    missing = sorted(changed_modules(folder / "low-text"))
    assert len(missing) == 4
    told = f"changes {re.escape(missing[0])} and 3 more, which {type(model).__name__} does"
    with pytest.raises(ValueError, match=told):
        check_fits(model, folder / "low-text")
    check_fits(model, folder / "low")
    check_fits(PeftModel.from_pretrained(model, folder / "low"), folder / "low")


def test_a_run_does_not_go_on_with_an_adapter_of_other_modules(folder):
    """PEFT makes a fresh one of it, which would start over."""
    model = PeftModel.from_pretrained(whole(folder / "base"), folder / "low-text")
    cfg = DictDefault(lora_model_dir=str(folder / "low-text"))
    with pytest.raises(ValueError, match="nothing of it would be there"):
        Run.install(SimpleNamespace(), cfg, model)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub's cache in which `main` has moved on since an adapter was trained."""
    root = tmp_path_factory.mktemp("hub")
    cache = root / "models--me--base"
    for commit, seed in ((OLD, 0), (NEW, 7)):
        place = cache / "snapshots" / commit
        place.mkdir(parents=True)
        tokenizer = make_tokenizer(place)
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=len(tokenizer),
            initializer_range=0.2,
        )
        LlamaForCausalLM(config).save_pretrained(place)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(NEW)
    model = AutoModelForCausalLM.from_pretrained(cache / "snapshots" / OLD, dtype=torch.float32)
    model = implant(model, RowSelection(ROWS[:3], 64, fingerprint(model)))
    shaken(model, 0.1).save_pretrained(root / "adapter")
    return root


def named(hub, tmp_path, name, revision=None):
    """The adapter, whose configuration names that base."""
    folder = shutil.copytree(hub / "adapter", tmp_path / "adapter")
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"base_model_name_or_path": name, "revision": revision}
    file.write_text(json.dumps(config))
    return folder


@pytest.fixture
def cached(hub, monkeypatch):
    """Where the hub's cache is for this test."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub))
    return hub


def test_another_revision_than_the_adapters_own_is_refused(cached, folder, tmp_path):
    adapter = named(cached, tmp_path, "me/base")
    done = forgetting(folder, adapter, base="me/base")
    assert done.exit_code == 1, done.output
    assert "the rows were made on another model" in done.output and "revision" in done.output
    out, prompts = tmp_path / "out", ("--prompts", folder / "prompts.jsonl")
    done = call("export", adapter, out, "--rank", "1", *prompts)
    assert "was not measured: the rows were made on another model" in done.output
    # Given, or named by the adapter, it is the one that was trained on.
    truth = kl(forgetting(folder, adapter, base=cached / f"models--me--base/snapshots/{OLD}"))
    assert kl(forgetting(folder, adapter, "--revision", OLD, base="me/base")) == truth > 0
    out = tmp_path / "again"
    done = call("export", adapter, out, "--rank", "1", "--revision", OLD, *prompts)
    assert "KL(ADAPTER || OUT) 0." in done.output


def test_the_revision_that_an_adapter_names_is_taken(cached, folder, tmp_path):
    adapter = named(cached, tmp_path, "me/base", OLD)
    snapshot = cached / f"models--me--base/snapshots/{OLD}"
    truth = forgetting(folder, adapter, base=snapshot)
    assert kl(forgetting(folder, adapter, base="me/base")) == kl(truth) > 0
    told = []
    for name, more in (("out", ()), ("true", ("--base", snapshot))):
        prompts = "--prompts", folder / "prompts.jsonl"
        done = call("export", adapter, tmp_path / name, "--rank", "1", *prompts, *more)
        told.append(re.search(r"KL\(ADAPTER \|\| OUT\) [\d.]+ nats", done.output)[0])
    assert told[0] == told[1]


def test_a_merged_model_that_is_older_than_the_adapter_is_not_measured(tmp_path):
    """What others put beside it later, such as a GGUF file, does not make it newer."""
    (tmp_path / "merged").mkdir()
    run = {"base_model": "base", "output_dir": str(tmp_path)}
    for name, time in (("merged/config.json", 100), ("adapter_config.json", 50)):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (time, time))
    assert of_a_run(run) == str(tmp_path / "merged")
    os.utime(tmp_path / "adapter_config.json", (200, 200))
    (tmp_path / "merged" / "model.gguf").touch()  # the folder is newer than the adapter now
    with pytest.raises(ValueError, match="is older than the adapter"):
        of_a_run(run)
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    done = call("forgetting", tmp_path / "run.yaml")
    assert "say which one is meant" in done.output
    done = call("forgetting", tmp_path / "run.yaml", "--tuned", tmp_path / "merged")
    assert "is older than" not in done.output and "say which one" not in done.output
