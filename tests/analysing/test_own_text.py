"""What a model writes by itself: it is what the model has learned, and writing leaves no trace."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from helpers.runs import model
from helpers.tokenizers import CHATML, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loki_plugin.analysing import own_text
from loki_plugin.analysing.calibration.prompts import load_texts
from loki_plugin.analysing.calibration.sources import load_records, record_of
from loki_plugin.analysing.own_text import user_turn, write_texts
from loki_plugin.cli import loki
from loki_plugin.model.fingerprint import fingerprint

SAID = [("say the number", "the answer, please"), ("and the number", "say and say")]
DIALOGUES = [[{"role": "user", "content": u}, {"role": "assistant", "content": a}] for u, a in SAID]
TEXTS = ["please say the answer and the number", "the number and the answer"]
ANSWERS = dict(SAID)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def learned(tokenizer):
    """A Llama that has learned these dialogues, users' words too, and these texts, and no more."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    ids = [tokenizer.apply_chat_template(d)["input_ids"] for d in DIALOGUES]
    ids += [tokenizer("<s>" + t + "<|im_end|>")["input_ids"] for t in TEXTS]
    optimizer = torch.optim.AdamW(llama.parameters(), 5e-3)
    for _ in range(120):
        loss = sum(llama(input_ids=i, labels=i).loss for i in map(torch.tensor, [[x] for x in ids]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return llama


def test_it_writes_what_it_has_learned_and_both_kinds_of_it(learned, tokenizer):
    written = write_texts(learned, tokenizer, 40, 24)
    dialogues = [row["messages"] for row in written if "messages" in row]
    texts = [row["text"] for row in written if "text" in row]
    # Repeated ones are left out, so that few are left; nearly all are the learned ones.
    assert sum(d in DIALOGUES for d in dialogues) == 2 and len(dialogues) <= 5
    assert set(TEXTS) <= set(texts) and len(texts) <= 5
    assert write_texts(learned, tokenizer, 40, 24, kind="text") != written
    assert all("text" in row for row in write_texts(learned, tokenizer, 9, 24, kind="text"))
    assert all("messages" in r for r in write_texts(learned, tokenizer, 9, 24, kind="dialogues"))


def test_padding_changes_nothing(learned, tokenizer):
    """Prompts of several lengths in one batch are each answered as if they were alone."""
    starts = [
        tokenizer.apply_chat_template(d[:1], add_generation_prompt=True)["input_ids"]
        for d in [*DIALOGUES, [{"role": "user", "content": "say the number and the number"}]]
    ]
    stop = own_text._ends(learned, tokenizer)
    together = own_text._continued(learned, starts, 24, stop, 3, lambda n: None)
    assert len({len(s) for s in starts}) > 1
    assert [tokenizer.decode(t) for t in together[:2]] == list(ANSWERS.values())


def test_the_same_seed_writes_the_same_and_nothing_is_left_changed(tokenizer):
    llama = model().train()
    llama.model.layers[0].eval()
    modes = [m.training for m in llama.modules()]
    mark, state = fingerprint(llama), torch.get_rng_state()
    first = write_texts(llama, tokenizer, 8, 6)
    assert (
        first == write_texts(llama, tokenizer, 8, 6) != write_texts(llama, tokenizer, 8, 6, seed=1)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in llama.modules()] == modes and fingerprint(llama) == mark
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())
    for i, row in enumerate(first):  # nothing that is no text
        said = json.dumps(row)
        assert not any(token in said for token in ("<|im_", "<s>", "</s>", "<pad>")), said
        assert load_texts(tokenizer, [record_of(row, f"{i}")])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_writes_and_keeps_every_byte(base, tokenizer, bits):
    from transformers import BitsAndBytesConfig

    how = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=how).eval()
    mark = fingerprint(quantised)
    assert write_texts(quantised, tokenizer, 6, 5)
    assert fingerprint(quantised) == mark


TEMPLATES = {
    "chatml": (CHATML, ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant")),
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        ("<s>[INST]", "[/INST]"),
    ),
    "system": (
        "<s>You are helpful.\n{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n"
        "{% endfor %}",
        ("<s>You are helpful.\n[user]", ""),
    ),
    "none": (None, None),
    "other words": ("<s>{% for m in messages %}{{ m.content | lower }}{% endfor %}", None),
    "bare": ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
}


@pytest.mark.parametrize(("template", "turn"), TEMPLATES.values(), ids=TEMPLATES)
def test_what_stands_around_a_users_words(tmp_path, template, turn):
    assert user_turn(make_tokenizer(tmp_path, template)) == turn


def test_words_end_where_the_template_ends_them_in_plain_letters(tmp_path):
    tokenizer = make_tokenizer(tmp_path, TEMPLATES["llama2"][0])
    ids = tokenizer(" say the number [/INST] 7")["input_ids"]
    assert own_text._words(tokenizer, ids, "[/INST]") == "say the number"


def test_without_a_users_turn_all_is_plain_text_and_dialogues_are_refused(tmp_path):
    plain = make_tokenizer(tmp_path, None)
    assert all("text" in row for row in write_texts(model(), plain, 6, 5))
    with pytest.raises(ValueError, match="no chat template that begins a user's turn"):
        write_texts(model(), plain, 6, 5, kind="dialogues")


def test_a_text_begins_behind_the_token_that_ends_one_where_none_begins_one(tmp_path):
    tokenizer, llama = make_tokenizer(tmp_path), model()
    assert own_text._beginning(llama, tokenizer) == tokenizer.bos_token_id
    tokenizer.bos_token = None
    llama.generation_config.bos_token_id = None
    llama.generation_config.eos_token_id = [7, 8]
    assert own_text._beginning(llama, tokenizer) == 7
    assert {7, 8} <= set(own_text._ends(llama, tokenizer))
    llama.generation_config.eos_token_id = None
    assert own_text._beginning(llama, tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names a token that begins or ends a text"):
        write_texts(llama, tokenizer, 6, 5)


def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(tokenizer, monkeypatch, our_log):
    llama, sizes = model(), []
    generate = own_text._generate

    def small(model, starts, tokens, stop):
        sizes.append(len(starts))
        if len(starts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(model, starts, tokens, stop)

    monkeypatch.setattr(own_text, "_generate", small)
    starts = [[tokenizer.bos_token_id]] * 7
    with our_log.at_level("INFO", "loki_plugin"):
        written = own_text._continued(llama, starts, 4, [], 64, lambda n: None)
    assert len(written) == 7 and sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "going on with 1 texts at once" in our_log.text
    monkeypatch.setattr(own_text, "_generate", lambda *a: (_ for _ in ()).throw(RuntimeError("x")))
    with pytest.raises(RuntimeError, match="x"):
        own_text._continued(llama, starts, 4, [], 64, lambda n: None)


def test_a_model_that_writes_nothing_is_told(tokenizer, monkeypatch):
    monkeypatch.setattr(own_text, "_generate", lambda model, starts, *rest: [[]] * len(starts))
    with pytest.raises(ValueError, match="wrote nothing but empty texts"):
        write_texts(model(), tokenizer, 6, 5)


def test_the_command_writes_a_file_that_calibration_reads_and_refuses_others(base, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(loki, ["write", str(base), *map(str, arguments)])

    file = tmp_path / "new" / "own.jsonl"
    result = run("--output", file, "--count", 8, "--tokens", 6)
    assert result.exit_code == 0, result.output
    rows = load_records(str(file))
    dialogues = sum(r.messages is not None for r in rows)
    assert f"{dialogues} dialogues and {len(rows) - dialogues} texts in {file}" in result.output
    assert 0 < dialogues < len(rows)
    found = run("--output", file, "--count", 8, "--tokens", 6, "--seed", 1, "--json")
    assert json.loads(found.stdout)["file"] == str(file) and load_records(str(file)) != rows
    for options, message in (
        (["--output", tmp_path / "own.txt"], "own.txt' must be a .jsonl file"),
        (["--output", file, "--kind", "poems"], "is not one of 'both', 'dialogues', 'text'"),
    ):
        result = run(*options)
        assert result.exit_code and message in result.output
