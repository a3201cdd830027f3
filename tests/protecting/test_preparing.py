"""Protected directions of a model: found once, kept in the cache, and found again if damaged."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.runs import configure, model
from helpers.tokenizers import make_tokenizer

from loki_plugin.analysing.calibration.sources import record_of
from loki_plugin.inputs import Inputs
from loki_plugin.model import fingerprint as module
from loki_plugin.protecting.directions import Directions
from loki_plugin.protecting.preparing import choose_directions
from loki_plugin.protecting.texts import anchored, own_texts, protecting_prompts, told_of

PROMPTS = [(1, 2, 3, 4, 5, 6, 7, i) for i in range(8, 12)]


@pytest.fixture
def config(tmp_path):
    return configure("unused.jsonl", tmp_path / "cache", protect={"directions": 3})


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "directions").iterdir())


def test_what_is_kept_is_taken_again_and_what_is_damaged_is_found_again(tmp_path, config, our_log):
    llama = model()
    first = choose_directions(llama, PROMPTS, config)
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    assert choose_directions(llama, PROMPTS, config).made["seconds"] == first.made["seconds"]
    file.write_bytes(whole[:-9])
    again = choose_directions(llama, PROMPTS, config)
    assert "is damaged" in our_log.text and "found again" in our_log.text
    assert len(file.read_bytes()) == len(whole)
    for u, v in zip(again.basis, first.basis, strict=True):  # the same span
        torch.testing.assert_close(u @ u.T, v @ v.T, atol=1e-4, rtol=0)


def test_a_cache_of_another_user_costs_nothing_but_the_next_search(config, monkeypatch, our_log):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    first = choose_directions(model(), PROMPTS, config)
    monkeypatch.setattr(Path, "exists", denied)
    again = choose_directions(model(), PROMPTS, config)
    assert again.counts == first.counts
    assert "Permission denied" in our_log.text and "found again" in our_log.text


def test_a_full_cache_costs_nothing_but_the_next_search(config, monkeypatch, our_log):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Directions, "save", full)
    found = choose_directions(model(), PROMPTS, config)
    assert found.counts == [3] * len(found.basis)
    assert "could not be kept in the cache: [Errno 28] No space left" in our_log.text


def test_a_disk_that_fills_up_costs_nothing_but_the_next_search(config, tmp_path, our_log):
    """safetensors has an error of its own for that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        found = choose_directions(model(), PROMPTS, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.counts == [3] * len(found.basis)
    assert "could not be kept in the cache" in our_log.text
    assert not list(tmp_path.rglob("*.tmp")) and not kept(tmp_path)


def test_the_cache_keeps_to_its_limit(tmp_path):
    config = configure("x.jsonl", tmp_path / "cache", protect={"directions": 3}, cache_limit=1e-9)
    choose_directions(model(), PROMPTS, config)
    (first,) = kept(tmp_path)
    choose_directions(model(), PROMPTS[:3], config)
    assert len(kept(tmp_path)) == 1 and kept(tmp_path) != [first]


def test_a_model_that_was_read_is_not_read_again_unless_it_was_written_to(config, monkeypatch):
    llama = model()
    mark = module.fingerprint(llama)
    read, checksum = [], module._checksum
    monkeypatch.setattr(module, "_checksum", lambda *a: read.append(1) or checksum(*a))
    found = choose_directions(llama, PROMPTS, config)
    assert found.fingerprint == mark and not read
    found.check(llama, unchanged=True)
    assert not read
    found.check(llama)  # by itself it takes nobody's word
    assert read
    read.clear()
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert choose_directions(llama, PROMPTS, config).fingerprint != mark
    assert len(read) == 1


def test_a_launched_rank_that_cannot_talk_to_the_others_is_protected_too(config, monkeypatch):
    alone = choose_directions(model(), PROMPTS, config)
    monkeypatch.setenv("RANK", "1")  # what a launcher sets; no process group stands
    assert choose_directions(model(), PROMPTS, config) == alone


def test_a_models_own_texts_are_written_once_and_again_where_they_are_damaged(
    tmp_path, config, our_log, monkeypatch
):
    protect = config.protect.model_copy(update={"count": 6})
    config = config.model_copy(update={"protect": protect})
    monkeypatch.setattr("loki_plugin.protecting.texts.TEXT_TOKENS", 5)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")

    def written(llama, tokenizer=tokenizer):
        return [(r.text, r.messages) for r in own_texts(llama, tokenizer, config)]

    first = written(model())
    (file,) = (tmp_path / "cache" / "texts").iterdir()
    whole = file.read_bytes()
    with monkeypatch.context() as patched:  # not asked again
        patched.delattr("transformers.GenerationMixin.generate")
        assert written(model()) == first
    file.write_bytes(whole[:-9])
    assert written(model()) == first and file.read_bytes() == whole
    assert "the model writes its texts again" in our_log.text
    assert written(model(seed=1)) != first  # another model
    written(model(), make_tokenizer(tmp_path / "plain", None))  # another way to ask
    assert len(list((tmp_path / "cache" / "texts").iterdir())) == 3
    mended = model()
    mended.generation_config.eos_token_id = 9  # its texts end elsewhere
    written(mended)
    other = make_tokenizer(tmp_path / "other", None)
    other.add_tokens(["answer"])  # the same words in other tokens
    written(model(), other)
    assert len(list((tmp_path / "cache" / "texts").iterdir())) == 5


def test_texts_with_tokens_that_the_model_does_not_know_are_left_out(tmp_path, our_log):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    tokenizer.add_tokens(["<think>"])
    new = frozenset(tokenizer.convert_tokens_to_ids(["<think>"]))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say"}\n')
    config = configure(str(tmp_path / "prompts.jsonl"), tmp_path, protect={"anchor": 1.0})
    written = [record_of({"text": text}, "here") for text in ("the number", "a <think> b")]
    inputs = replace(Inputs.read(config), texts=written)
    everything = protecting_prompts(tokenizer, config, inputs)
    with our_log.at_level("INFO", "loki_plugin"):
        assert protecting_prompts(tokenizer, config, inputs, new) == everything[:2]
    assert len(everything) == 3 and "1 texts with new tokens left out" in our_log.text


@pytest.mark.parametrize("dialogues", [True, False])
def test_an_anchor_holds_texts_with_dialogues_alone_and_prompts_beside_others(tmp_path, dialogues):
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say"}\n')
    config = configure(str(tmp_path / "prompts.jsonl"), tmp_path, protect={"anchor": 1.0})
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    rows = [{"text": "the number"}, *[said] * dialogues]
    texts = [record_of(row, f"text {i}") for i, row in enumerate(rows)]
    inputs = replace(Inputs.read(config), texts=texts)
    prompt, *given = every = protecting_prompts(tokenizer, config, inputs)
    assert len(given) == 1 + dialogues and prompt.starts
    assert anchored(tokenizer, inputs, every) == (given if dialogues else every)
    # What is left out of `among`, as texts that a run is measured on, is not held either.
    assert anchored(tokenizer, inputs, every[::2]) == (given[1:] if dialogues else [prompt])
    assert anchored(tokenizer, replace(inputs, texts=[]), every[:1]) == [prompt]


def test_a_model_that_wrote_no_dialogue_is_said_to_hold_none():
    plain = record_of({"text": "apples"}, "text 1")
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert told_of([plain, record_of(said, "text 2")]) == (
        "the model wrote 1 dialogues and 1 plain texts"
    )
    told = told_of([plain])
    assert told.startswith("the model wrote 0 dialogues and 1 plain texts")
    assert "set `chat_template`, or give some as `protect.text`" in told
