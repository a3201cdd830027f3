"""Shared fixtures: small models of real families with real tokenizers, made here."""

from __future__ import annotations

import gc
import json
import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
# Data is prepared in the process itself: another one takes three seconds to start, for 64 records.
os.environ.setdefault("AXOLOTL_DATASET_NUM_PROC", "0")

import pytest
import torch
from helpers import axolotl, without_axolotl
from helpers.tokenizers import make_tokenizer


def pytest_collection_finish():
    """What the modules have imported stays: Axolotl collects garbage seven times in a run, and to
    walk through all of that took a second each time."""
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where Axolotl is not installed, a test that needs it is skipped."""
    report = yield
    error = call.excinfo and call.excinfo.value
    if isinstance(error, ImportError) and without_axolotl.asks_for_it(error):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, "Skipped: needs Axolotl")
    return report


@pytest.fixture
def our_log(caplog):
    """`caplog` with what the package logs, whatever Axolotl has made of the loggers above it."""
    log = logging.getLogger("loki_plugin")
    log.addHandler(caplog.handler)
    yield caplog
    log.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A Llama of 3 layers x 64 rows (I = 128) with its tokenizer, in float32 safetensors."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="150KB")
    return folder


@pytest.fixture
def own_plugins():
    """Axolotl keeps plugins for later configurations of the process; these take theirs along."""
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    before = manager.plugins.copy()
    yield
    manager.plugins.clear()
    manager.plugins.update(before)


@pytest.fixture(scope="session")
def moe_base(tmp_path_factory):
    """A Qwen2-MoE of 2 layers x 64 rows: 4 routed experts and a shared one in each."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    folder = tmp_path_factory.mktemp("moe_base")
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A chat data set of 64 exchanges."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    with path.open("w") as file:
        for i in range(64):
            messages = [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"number {i} it is"},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """A small calibration file, so that end-to-end runs spend seconds on analysing."""
    path = tmp_path_factory.mktemp("calibration") / "questions.jsonl"
    with path.open("w") as file:
        for i in range(8):
            record = {
                "subject": "arithmetic",
                "question": f"What is {i} plus 1?",
                "choices": [str(i + 1), str(i + 2), str(i + 3), str(i + 4)],
                "answer": 0,
            }
            file.write(json.dumps(record) + "\n")
    return path


@pytest.fixture
def run_config(base, dataset, questions, tmp_path):
    """The YAML of a short run as a dict; a test changes what it is about."""
    return axolotl.short_run(base, dataset, questions, tmp_path)


@pytest.fixture
def train():
    """Run Axolotl's own load_cfg and do_train in this process."""
    return axolotl.train


@pytest.fixture(autouse=True)
def pictures_where_they_matter(request, monkeypatch):
    """A run's pictures take two seconds; only the tests of `picturing/` look at them."""
    if "picturing" not in request.path.parts:
        reason = {"not_drawn": "the test is not about pictures"}
        monkeypatch.setattr("loki_plugin.picturing.after.show", lambda *run: reason)
