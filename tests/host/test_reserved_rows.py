"""New tokens for which the base's embeddings have rows all the same: padded or reserved ones."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers.axolotl import load
from helpers.tokenizers import make_tokenizer
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loki_plugin.host.files import Files
from loki_plugin.host.tokens import calibration_tokenizer
from loki_plugin.protecting import own_text
from loki_plugin.protecting.texts import protecting_prompts

RESERVED = ["<|reserved_0|>", "<|reserved_1|>"]
CHATML = {"chat_template": "chatml"}
ENDS = {"eos_token": "<|im_end|>"}
WAYS = {
    "tokens": {"tokens": ["<|im_start|>", "<|im_end|>"]},
    "special tokens": {"tokens": ["<|im_start|>"], "special_tokens": ENDS},
    "overrides": {"added_tokens_overrides": {3: "<|im_start|>", 4: "<|im_end|>"}},
}


@pytest.fixture(scope="module")
def padded_base(tmp_path_factory):
    """A Llama with 64 rows of embeddings behind its vocabulary, and two reserved tokens in it."""
    folder = tmp_path_factory.mktemp("padded_base")
    tokenizer = make_tokenizer(folder, None, ["<pad>", "<s>", "</s>", *RESERVED])
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer) + 64,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def asked(run_config, padded_base, more):
    cfg = load(run_config | {"base_model": str(padded_base)} | more)
    model = LlamaForCausalLM.from_pretrained(padded_base)
    files = Files.read(cfg)
    made = calibration_tokenizer(cfg, model, files)
    return made.tokenizer, made.unknown, files


@pytest.mark.parametrize("way", WAYS)
def test_a_row_for_it_does_not_make_a_token_known(run_config, padded_base, our_log, way):
    tokenizer, unknown, files = asked(run_config, padded_base, CHATML | WAYS[way])
    assert "2 tokens are new to the base (<|im_end|>, <|im_start|>): 2 take rows" in our_log.text
    assert "Their embeddings do not train" in our_log.text
    assert tokenizer.chat_template is None and not unknown
    assert "<|im_start|>" not in tokenizer.get_vocab()
    said = [
        tokenizer.decode(p.ids) for p in protecting_prompts(tokenizer, files.config, files.inputs)
    ]
    assert len(said) == 8 and not any("<|im" in text for text in said)


def test_a_prompt_without_new_tokens_is_told_by_the_runs_own_template(
    run_config, padded_base, tmp_path, our_log
):
    """Only texts that hold one are left out."""
    letters = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    more = {"tokens": ["<new>"], "chat_template": "jinja", "chat_template_jinja": letters}
    tokenizer, unknown, files = asked(run_config, padded_base, more)
    assert "1 tokens are new to the base (<new>): 1 take rows" in our_log.text
    assert tokenizer.chat_template == letters
    assert unknown == {tokenizer.convert_tokens_to_ids("<new>")}
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "plain words"}\n{"text": "with a <new> one"}\n')
    block = run_config["loki"] | {"protect": {"inputs": 0.9, "text": str(texts)}}
    files = Files.read(load(run_config | {"loki": block}))
    told = protecting_prompts(tokenizer, files.config, files.inputs, unknown)
    every = protecting_prompts(tokenizer, files.config, files.inputs)
    assert len(every) == len(told) + 1
    assert not any(unknown & set(text.ids) for text in told)


def test_nothing_is_said_of_tokens_that_the_base_knows(run_config, padded_base, our_log):
    known = {**CHATML, "tokens": [RESERVED[0]], "special_tokens": {"pad_token": "<pad>"}}
    tokenizer, unknown, _ = asked(run_config, padded_base, known)
    assert not unknown and "new to the base" not in our_log.text


def test_a_tokenizer_of_another_folder_is_compared_with_the_bases(
    run_config, padded_base, tmp_path, our_log
):
    folder = tmp_path / "chat"
    folder.mkdir()
    other = make_tokenizer(folder, special=["<pad>", "<s>", "</s>", *RESERVED])
    other.add_tokens(["<|im_start|>", "<|im_end|>"])
    other.save_pretrained(folder)
    more = {"tokenizer_config": str(folder)}
    tokenizer, _, _ = asked(run_config, padded_base, more)
    assert "2 tokens are new to the base" in our_log.text
    assert tokenizer.chat_template is None and "<|im_start|>" not in tokenizer.get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["special tokens", "overrides"])
def test_a_run_reads_no_row_that_was_never_trained(
    run_config, train, padded_base, monkeypatch, way
):
    """Neither the analysis nor the anchor nor the figure of forgetting."""
    from loki_plugin.host.run import Run

    read, start = [], Run.start.__func__

    def started(cls, cfg, model, files):
        run = start(cls, cfg, model, files)
        read.extend([p.ids for p in run.measured] + list(run.anchor.prompts))
        return run

    monkeypatch.setattr(Run, "start", classmethod(started))
    run_config |= {"base_model": str(padded_base), **CHATML, **WAYS[way]}
    run_config["loki"] |= {"protect": {"anchor": 1.0}}
    log = []
    monkeypatch.setattr(
        logging.getLogger("axolotl"), "handle", lambda record: log.append(record.getMessage())
    )
    train(run_config)
    out = Path(run_config["output_dir"])
    assert any("2 tokens are new to the base" in line for line in log)
    count = len(AutoTokenizer.from_pretrained(padded_base))
    new = {3, 4} if way == "overrides" else {count, count + 1}
    assert read and not any(set(ids) & new for ids in read)
    assert not any("embed" in name for name in load_file(out / "adapter_model.safetensors"))
    assert json.loads((out / "loki_report.json").read_text())["forgetting"]


TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
SYSTEM = "{{ bos_token }}[system] be kind\n" + TURNS


@pytest.mark.parametrize(
    ("own", "run", "known"),
    [
        (None, TURNS, False),  # a base that was never taught any
        (TURNS, TURNS, True),
        (SYSTEM, TURNS, True),  # the same turn behind another beginning
        (TURNS, SYSTEM, True),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", TURNS, False),
        ("{{ raise_exception('no') }}", TURNS, False),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", TURNS, False),  # begins none
        (TURNS, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}", True),  # nor the run's
        (TURNS, None, True),  # the run has the base's own
    ],
)
def test_a_base_knows_the_turns_of_its_own_template(
    run_config, padded_base, tmp_path, our_log, own, run, known
):
    folder = tmp_path / "base"
    shutil.copytree(padded_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = own
    tokenizer.save_pretrained(folder)
    given = {"chat_template": "jinja", "chat_template_jinja": run} if run else {}
    model = LlamaForCausalLM.from_pretrained(folder)
    for protect in ({}, {"anchor": 1.0, "text": "self"}):  # what it writes is not read, and is
        run_config["loki"]["protect"] = protect or "off"
        cfg = load(run_config | {"base_model": str(folder)} | given)
        with our_log.at_level("INFO", "loki_plugin"):
            assert calibration_tokenizer(cfg, model, Files.read(cfg)).turns is known
        told = not known and bool(protect)
        assert ("to write dialogues the base goes on with a list" in our_log.text) is told


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, TURNS], ids=["taught none", "taught the run's"])
def test_a_run_lets_the_base_write_in_turns_that_it_knows_only(
    run_config, train, padded_base, tmp_path, monkeypatch, own
):
    """What protects, and what is held back to measure."""
    seen, write = [], own_text.write_texts

    def watched(*given, **more):
        seen.append(more["turns"])
        return write(*given, **more)

    monkeypatch.setattr(own_text, "write_texts", watched)
    folder = tmp_path / "base"
    shutil.copytree(padded_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = own
    tokenizer.save_pretrained(folder)
    run_config |= {"base_model": str(folder), "max_steps": 2, "val_set_size": 0.2, "eval_steps": 2}
    run_config |= {"chat_template": "jinja", "chat_template_jinja": TURNS}
    run_config["loki"]["protect"] = {"anchor": 0.1, "text": "self", "count": 8}
    train(run_config)
    assert seen == [own is not None] * 2
