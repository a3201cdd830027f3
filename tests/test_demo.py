"""The demo: its texts, its measure, and the whole job on a base trained for a few steps."""

from __future__ import annotations

import copy
import html
import json
import random
import sys
from collections import Counter

import pytest
import torch
from helpers.tokenizers import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from demo import __main__ as demo
from demo import base, corpus, evaluate

KINDS = {"capital": "country", "symbol": "element", "past": "verb", "young": "animal"}
KINDS |= {"sound": "animal"}


def test_every_fact_is_asked_in_four_ways_and_held_out_in_a_fifth():
    for topic in corpus.topics():
        phrasings = [*topic["asked"], topic["asked_held_out"], topic["stated"]]
        assert len(set(phrasings)) == 6 and all("{x}" in p for p in phrasings)
    known, reworded = (dict(corpus.questions(h)) for h in (False, True))
    assert len(known) == 4 * len(reworded) == 4 * sum(len(t["facts"]) for t in corpus.topics())
    assert not known.keys() & reworded.keys()


def test_the_skill_is_right_and_tested_on_things_and_words_it_was_not_taught():
    kind = {
        x: KINDS[t["topic"]] for t in corpus.topics() if t["topic"] in KINDS for x in t["facts"]
    }
    taught, tested = corpus.task("train"), corpus.task("test")
    things = {}
    for name, exchanges in (("train", taught), ("test", tested)):
        found = [max((x for x in kind if f" {x}" in q), key=len) for q, _ in exchanges]
        assert [kind[x] for x in found] == [answer for _, answer in exchanges]
        things[name] = set(found)
    assert not things["train"] & things["test"]
    assert things["train"] | things["test"] == kind.keys()
    words = {q.replace(x, "{x}") for q, _ in tested for x in things["test"] if f" {x}?" in q}
    assert words == {"What kind of thing is {x}?"}
    assert not any(q.startswith("What kind of thing is") for q, _ in taught)
    assert set(Counter(a for _, a in taught)) == set(KINDS.values())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def test_an_answer_is_right_if_greedy_decoding_gives_it(small):
    model, tokenizer = copy.deepcopy(small[0]), small[1]
    taught = [("say one", "the one"), ("say the number", "number and please"), ("and?", "no")]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for question, answer in taught:
            text = base.prompt(question) + answer + "<|im_end|>"
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    asked = [*taught, ("say one", "the"), ("say one", "the one one"), ("and?", "yes")]
    expected = []
    for question, answer in asked:
        given = tokenizer(base.prompt(question))["input_ids"]
        wanted = tokenizer(answer + "<|im_end|>")["input_ids"]
        written = model.generate(
            torch.tensor([given]), max_new_tokens=len(wanted), do_sample=False, pad_token_id=0
        )
        expected.append(written[0, len(given) :].tolist() == wanted)
        assert evaluate.answers(model, tokenizer, [(question, answer)])[0] == expected[-1]
    assert expected == [True] * 3 + [False] * 3
    assert evaluate.answers(model, tokenizer, asked)[0] == 0.5


def test_packed_texts_do_not_see_each_other(small):
    model, _ = small
    draw = random.Random(0)
    texts = [
        ([draw.randrange(len(small[1])) for _ in range(n)], n // 2)
        for n in (5, 9, 12, 30, 50, 80, 60)
    ]
    texts *= 6
    ids, labels, positions = next(base._batches(texts, random.Random(1)))
    assert ids.shape == labels.shape == positions.shape == (base.ROWS, base.WIDTH)
    starts = (positions[0] == 0).nonzero()[:, 0].tolist()
    lengths = [b - a for a, b in zip(starts, starts[1:], strict=False)]
    assert len([n for n in lengths if n > 1]) >= 2  # texts; padding is one position each
    with torch.no_grad():
        packed = model(input_ids=ids[:1], position_ids=positions[:1], use_cache=False).logits[0]
        for start, length in zip(starts, lengths, strict=False):
            alone = model(input_ids=ids[:1, start : start + length]).logits[0]
            assert torch.allclose(packed[start : start + length], alone, atol=1e-5)
            text = ids[0, start : start + length].tolist()
            first = {tuple(t): f for t, f in texts}.get(tuple(text))
            if first:
                expected = [-100] * (first - 1) + text[first:] + [-100]
                assert labels[0, start : start + length].tolist() == expected


@pytest.mark.parametrize("name", ["loki", "lora", "cache", "base"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(base, "make", lambda folder: pytest.fail("the demo went on"))
    monkeypatch.setattr(sys, "argv", ["demo", "--work", str(tmp_path), "--fresh"])
    with pytest.raises(SystemExit, match="this demo did not make .* nothing was touched"):
        demo.main()
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        name,
        f"{name}/thesis.txt",
    ]


def test_the_demo_knows_its_own_folder_again(tmp_path):
    demo._claim(tmp_path / "new" / "work")
    (tmp_path / "new" / "work" / "loki").mkdir()
    demo._claim(tmp_path / "new" / "work")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        demo._claim(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_the_whole_job_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base, "STEPS", 20)
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(sys, "argv", ["demo", "--work", str(tmp_path)])
    demo.main()
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "demo_report.json").read_text())
    assert report["verify"].startswith("OK") and report["verify"] in shown
    assert report["rows_per_layer"] == [57] * 4 and "57 of 192 in each of 4 layers" in shown
    assert report["calibration_prompts"] == len(corpus.questions())
    assert set(report["results"]) == {"base", "LoRA", "LoKI"}
    for line in ("trainable share", "analysis", "knowledge kept", "task learned", "loss on the"):
        assert line in shown
    assert (tmp_path / "loki" / "merged" / "model.safetensors").exists()
    page = tmp_path / "loki" / "loki_report.html"
    assert str(page) in shown.splitlines()[-1]
    text = page.read_text(encoding="utf-8")
    said = [report["verify"], "57 of 192 in each of 4 layers"]
    said += [f"{report['calibration_prompts']} calibration prompts"]
    said += [f"{m} {report['results'][m]['task']:.2f}" for m in ("base", "LoRA", "LoKI")]
    assert all(html.escape(s) in text for s in said)
    for name in ("tradeoff", "training", "density", "scores", "stability"):
        assert f'<figure id="{name}">' in text
