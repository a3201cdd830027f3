"""The demo: its texts, its measures, and the whole job, of few steps, on small models.

What only the pretrained base can show is asked of it where it can be had.
"""

from __future__ import annotations

import copy
import html
import io
import json
import random
import re
import sys
from collections import Counter

import pytest
import torch
from helpers.tokenizers import make_tokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.real import bases
from demo import __main__ as demo
from demo import asking, base, corpus, evaluate, orders, rates, real, running, showing, toy
from loki_plugin.analysing.calibration.prompts import load_prompts
from loki_plugin.analysing.calibration.sources import load_records

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
@pytest.mark.parametrize("more", [[], ["--toy"]])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, monkeypatch, name, more):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")
    for module in (toy, real):
        monkeypatch.setattr(module, "main", lambda *_: pytest.fail("the demo went on"))
    monkeypatch.setattr(sys, "argv", ["demo", "--work", str(tmp_path), "--fresh", *more])
    with pytest.raises(SystemExit, match="this demo did not make .* nothing was touched"):
        demo.main()
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        name,
        f"{name}/thesis.txt",
    ]


def test_the_demo_knows_its_own_folder_again(tmp_path):
    running.claim(tmp_path / "new" / "work")
    (tmp_path / "new" / "work" / "loki").mkdir()
    running.claim(tmp_path / "new" / "work")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        running.claim(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# Commands, with a bar for each bar of theirs.


def log_of_bars() -> str:
    """What a run prints: our bars, a library's, and the training's, which has no name."""
    log = io.StringIO()
    for about, total, done in (
        ("loki: the model writes", 240, 240),
        ("Loading weights", 7, 7),
        ("loki: input directions", 57, 20),
        (None, 40, 3),
        (None, 99, 1),
    ):
        log.write(f"[INFO] 50% | of | 4/7 is no bar, {about}\n")
        with tqdm(total=total, desc=about, file=log, mininterval=0) as bar:
            for _ in range(done):
                bar.update()
    return log.getvalue()


def test_bars_of_a_log_are_found():
    found = running.phases(log_of_bars(), steps=40)
    assert found == [
        ("the model writes", 240, 240),
        ("input directions", 20, 57),
        ("training", 3, 40),
    ]
    assert [about for about, *_ in running.phases(log_of_bars())] == [
        "the model writes",
        "input directions",
    ]


def test_a_command_shows_its_bars_and_says_why_it_failed(tmp_path, capsys):
    (tmp_path / "bars.txt").write_text(log_of_bars())
    program = "import sys, time; sys.stderr.write(open('bars.txt').read()); sys.stderr.flush();"
    program += "time.sleep(1.5); sys.exit(len(sys.argv) - 1)"
    text = running.run(tmp_path, "fine", [sys.executable, "-c", program], 40)
    assert text == (tmp_path / "fine.log").read_text()
    shown = capsys.readouterr().err
    for about, done, total in running.phases(text, 40):
        assert shown.count(f"  {about}:   0%") == 1  # no bar begins again
        assert re.search(rf"{about}: *\d+%.*{done}/{total} \[[\d:]+<", shown)
    with pytest.raises(SystemExit, match="-c .* 7 failed; the whole log is .*bad.log"):
        running.run(tmp_path, "bad", [sys.executable, "-c", program, "7"], 40)


# The toy.


@pytest.mark.slow
def test_the_whole_job_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base, "STEPS", 20)
    monkeypatch.setattr(toy, "EPOCHS", 1)
    monkeypatch.setattr(sys, "argv", ["demo", "--toy", "--work", str(tmp_path)])
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


# On a pretrained model: what is asked and taught.


def test_orders_say_what_messages_say_and_held_out_ones_share_no_part_with_what_is_taught():
    taught, held_out = orders.taught(), orders.held_out()
    assert len(dict(taught)) == orders.TAUGHT and len(dict(held_out)) == orders.HELD_OUT
    assert not dict(taught).keys() & dict(held_out).keys()
    for message, order in taught + held_out:
        said = json.loads(order)
        assert list(said) == ["item", "color", "quantity", "city", "name"]
        assert all(said[key] in message for key in ("color", "city", "name"))
        assert said["item"][:-1] in message  # a scarf, scarves
        number = (str(said["quantity"]), orders.NUMBERS[said["quantity"] - 1])
        assert sum(bool(re.search(rf"\b{n}\b", message, re.IGNORECASE)) for n in number) == 1
    for field in ("things", "cities", "names", "wordings"):
        assert not set(getattr(orders.LEARNED, field)) & set(getattr(orders.NEW, field))
    assert orders.taught() == taught and orders.taught(seed=1) != taught


def test_an_answer_is_right_if_it_has_the_word_and_is_no_order():
    for said, expected in (
        ("The capital is Paris.", True),
        ("paris", True),
        ("Parisians live there", False),
        (' {"item": "Paris", "color": "Paris"}', False),
        ("", False),
    ):
        assert asking.right(said, ["Paris"]) is expected
    assert asking.right("It is 100 degrees.", ["100"]) and not asking.right("1000", ["100"])


def test_twenty_questions_and_sixty_facts_that_no_calibration_has():
    questions, facts = asking.questions(), asking.facts()
    assert len({q["question"] for q in questions}) == 20
    assert len({f["prompt"] for f in facts}) == 60
    calibration = {" ".join([r.question, *r.choices]).lower() for r in load_records("builtin")}
    for q in questions:
        assert not any(q["question"].lower().rstrip("?") in text for text in calibration)
    for f in facts:
        assert not any(f["prompt"].lower() in text for text in calibration)


def test_multiple_choice_is_of_questions_that_the_run_does_not_see(small):
    tokenizer = small[1]
    asked = asking.choices(tokenizer, real.CALIBRATION)
    seen = load_prompts(tokenizer, **real.LOKI["loki"]["calibration"]).prompts
    told = "\n".join(tokenizer.decode(p.ids) for p in seen)
    assert len(asked) == 29 and len(seen) == 57 * real.CALIBRATION["samples_per_subject"]
    assert not any(q["question"] in told for q in asked)
    every = {r.question: r for r in load_records("builtin")}
    assert all(every[q["question"]].answer == q["answer"] for q in asked)
    assert any(r.question in told for r in every.values())


def test_the_time_of_the_set_up_is_told_where_make_took_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert real.setup_seconds() is None
    report = {"seconds": 720.0, "setup_seconds": None}
    assert showing._times(report, "minutes", 60) == "12 minutes"
    for said, seconds in (("", None), ("180\n", 180)):  # an older Makefile left an empty stamp
        (tmp_path / ".installed").write_text(said)
        assert real.setup_seconds() == seconds
    report["setup_seconds"] = real.setup_seconds()
    assert showing._times(report, "minutes", 60) == "12 minutes and 3 for its set-up"


def test_protection_is_auto_and_nothing_else():
    protected = {name for name in real.LOKI["loki"] if name.startswith("protect")}
    assert protected == {"protect"} and real.LOKI["loki"]["protect"] == "auto"
    shared = {"base_model", "learning_rate", "adapter", "plugins", "loki", "gradient_checkpointing"}
    assert real.LOKI.keys() <= shared and real.LORA["lora_r"] == real.LOKI["loki"]["rank"]


def test_rates_are_those_that_forget_least_when_the_job_is_learned():
    """Of what was measured, for both ways alike."""
    found = rates.best(rates.read())
    assert {"lora", "loki"} <= found.keys()
    for way, settings in (("lora", real.LORA), ("loki", real.LOKI)):
        assert found[way]["rate"] == settings["learning_rate"]
        assert found[way]["step"] == real.STEPS[way]


def test_the_first_point_with_the_score_counts_and_a_rate_that_misses_it_does_not():
    def row(way, rate, step, orders, kl):
        return {"way": way, "rate": rate, "step": step, "orders": orders, "kl_answers": kl}

    rows = [
        row("a", 1, 30, 0.95, 0.9),
        row("a", 1, 15, 0.91, 0.5),
        row("a", 2, 15, 0.50, 0.0),
        row("a", 3, 15, 0.10, 0.0),
        row("a", 3, 30, 1.00, 0.4),
        row("b", 1, 60, rates.TARGET - 0.01, 0.0),
    ]
    assert rates.reached(rows) == {("a", 1): rows[1], ("a", 3): rows[4]}
    assert rates.best(rows) == {"a": rows[4]}


def test_without_a_network_the_toy_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_BASES", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit) as stopped:
        real.base_folder()
    said = str(stopped.value)
    assert "python -m demo --toy" in said and "LOKI_BASES" in said and str(tmp_path) in said
    assert not list(tmp_path.iterdir())


# The whole job on a small stand-in, and the pretrained base itself.


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A tiny Llama that knows nothing, where the pretrained base is looked for."""
    folder = tmp_path / "bases" / real.BASE
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        initializer_range=0.3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    monkeypatch.setenv("LOKI_BASES", str(tmp_path / "bases"))
    monkeypatch.setattr(real, "LENGTH", 512)  # a letter is a token
    return folder


@pytest.mark.slow
def test_the_whole_job_runs_on_a_stand_in(stand_in, tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    monkeypatch.setattr(real, "STEPS", {"lora": 8, "loki": 12})
    monkeypatch.setattr(sys, "argv", ["demo", "--work", str(work)])
    demo.main()
    shown = capsys.readouterr()
    report = json.loads((work / "demo_report.json").read_text())
    assert report["results"].keys() == real.MODELS.keys() == {"base", "lora", "loki"}
    base_result, lora, loki = report["results"].values()
    assert abs(base_result["kl_answers"]) < 1e-6 < lora["kl_answers"] and loki["kl_text"] > 0
    assert loki["loss_orders"] != base_result["loss_orders"] != lora["loss_orders"]
    assert report["verify"].startswith("OK") and report["verify"] in shown.out
    assert list(report["stages"]) and report["gigabytes"] > 0.1
    assert len(report["beginnings"]) == len(asking.questions())
    for q, (likely, next_best) in zip(asking.questions(), report["beginnings"], strict=True):
        assert q["question"] in shown.out and 1 > likely >= next_best > 0
        said = shown.out.split(q["question"])[1].splitlines()[1]
        assert said.startswith("  base") and said.endswith(
            f"({100 * likely:.0f} %, {100 * next_best:.0f} %)"
        )
    for title, values in showing.compared(report, real.MODELS):
        line = next(x for x in shown.out.splitlines() if x.startswith(title))
        assert line.removeprefix(title).split() == values
    for about in (
        "the model writes",
        "what updates read",
        "training",
        "merging linears",
        "asking LoKI",
    ):
        assert f"  {about}: 100%" in shown.err
    written = json.loads((work / "loki" / "loki_report.json").read_text())
    assert written["settings"]["protect"]["auto"] is True and written["protection"]["soft"]
    page = (work / "loki" / "loki_report.html").read_text(encoding="utf-8")
    assert "facts, sentences ended rightly, of 60" in page and html.escape(report["verify"]) in page


@pytest.fixture(scope="module")
def pretrained():
    try:
        folder = bases.path(real.BASE)
    except RuntimeError as error:
        pytest.skip(f"the pretrained base cannot be had here: {error}")
    return asking.load(folder)


@pytest.mark.slow
def test_the_pretrained_base_answers_and_is_no_further_from_itself_than_rounding(pretrained):
    model, tokenizer = pretrained
    probes = asking.Probes.of(model, tokenizer, real.CALIBRATION)
    found = probes.measure(model, "base")
    # On France it is unsure whether to answer in English.
    with torch.no_grad():
        logits = model(torch.tensor(probes.asked[:1])).logits[0, -1]
    expected = logits.softmax(-1).topk(2).values.tolist()
    assert probes.beginnings()[0] == pytest.approx(expected, abs=1e-3)
    assert sum(found["right"]) >= 19 and "Paris" in found["answers"][0]
    assert sum(found["facts"]) >= 57 and 7 <= sum(found["choices"]) <= 20
    assert found["kl_answers"] == pytest.approx(0, abs=1e-6)
    assert found["kl_text"] == pytest.approx(0, abs=1e-6)
    assert 1 < found["loss_text"] < 6 and not any(found["orders"])
