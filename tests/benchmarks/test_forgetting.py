"""The forgetting benchmark: its world, its measures by hand, and one small run from end to end."""

from __future__ import annotations

import csv
import random

import pytest
import torch
from helpers.families import tiny

from benchmarks.forgetting import base as bases
from benchmarks.forgetting import choosing, overlap, report, silencing, sweep
from benchmarks.forgetting.arms import ARMS, passes
from benchmarks.forgetting.building import Context, lora_protected
from benchmarks.forgetting.measures import flips, kl
from benchmarks.forgetting.sweep import (
    Key,
    Sweep,
    about,
    finals,
    join,
    keep_about,
    rate,
    results,
    screening,
)
from benchmarks.forgetting.tasks import TASKS
from benchmarks.forgetting.world import COVERED, HELD_OUT, make
from benchmarks.writer import RESULTS


def test_the_world_and_its_tasks_are_the_same_every_time_and_follow_the_seed():
    first, again, other = make(20), make(20), make(20, seed=1)
    assert first.items == again.items and first.sentences == again.sentences
    assert first.items != other.items
    for task in TASKS.values():
        known = task(first, 0, 10)
        assert known == task(first, 0, 10) == task(again, 0, 10)  # asking changes nothing
        assert known != task(first, 1, 10)


def test_what_is_measured_was_never_calibrated_on():
    world = make(20)
    calibrated = {(i.prompt, i.answer) for i in world.calibration()}
    assert {i.kind for i in world.calibration()} == set(COVERED)
    for kind, items in world.measured().items():
        assert items and not calibrated & {(i.prompt, i.answer) for i in items}, kind
        if kind in HELD_OUT:
            assert items == world.items[kind]


def test_new_facts_are_about_new_people_and_other_tasks_test_what_they_did_not_teach():
    world = make(20)
    asked = {i.prompt for items in world.items.values() for i in items}
    learned, tested = TASKS["facts"](world, 0, 10)
    assert learned == tested and not asked & {i.prompt for i in learned}
    for name in ("calls", "classes"):
        learned, tested = TASKS[name](world, 0, 10)
        assert tested and not {i.prompt for i in learned} & {i.prompt for i in tested}
        assert {i.answer.split()[0] for i in learned} >= {i.answer.split()[0] for i in tested}


def test_calls_are_made_of_tokens_that_the_base_has_seen(tmp_path):
    base = bases.load(tmp_path, "brief", 1)
    seen = {i for ids, _ in Context(base, 0).pretraining for i in ids}
    learned, tested = TASKS["calls"](base.world, 0, 40)
    assert {t for i in [*learned, *tested] for t in bases.encode(base.tokenizer, i)[0]} <= seen


def test_no_two_questions_of_a_kind_are_the_same():
    for kind, items in make(60).items.items():
        prompts = [i.prompt for i in items]
        assert len(prompts) == len(set(prompts)), kind


def test_flips_and_kl_by_hand():
    assert flips([True, True, False, False], [True, False, True, False]) == (1, 1)
    base, tuned = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    by_hand = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert kl(base, tuned) == pytest.approx(float(by_hand), rel=1e-5)


def test_packing_keeps_prompts_unlearned_and_sequences_apart():
    sequences = [([1, 2, 3, 4], 2), ([5, 6], 1), ([7, 8, 9], 2)]
    stream = bases.packed(iter([sequences] * 9), rows=2, width=6, pad=0, seed=0)
    ids, labels, positions = next(stream)
    assert ids.shape == labels.shape == positions.shape == (2, 6)
    for line, wanted, place in zip(ids.tolist(), labels.tolist(), positions.tolist(), strict=True):
        starts = [i for i, p in enumerate(place) if p == 0 and line[i]]
        for start in starts:
            (sequence,) = [s for s in sequences if s[0][0] == line[start]]
            n, first = len(sequence[0]), sequence[1]
            assert line[start : start + n] == sequence[0]
            expected = [-100] * (first - 1) + sequence[0][first:] + [-100]
            assert wanted[start : start + n] == expected


def test_replay_is_drawn_anew_for_each_pass_in_its_share():
    class Known:
        pretraining = [([i], 1) for i in range(1000)]

    learned = [([-1], 1)] * 190
    stream = passes(learned, ARMS["lora_replay5"], Known(), 0)
    first, second = next(stream), next(stream)
    assert len(first) == len(second) == 200 and first[:190] == learned
    assert first[190:] != second[190:]
    assert next(passes(learned, ARMS["lora_all_r16"], Known(), 0)) == learned


def test_every_arm_is_screened_and_finals_have_five_rates():
    keys = list(screening())
    assert {k.arm for k in keys} == set(ARMS) and len(keys) == len(set(keys)) == 3 * len(ARMS)
    five = {k.lr for k in finals(["loki_q30"], 1, ["facts"])}
    lowest = ARMS["loki_q30"].lowest
    assert sorted(five) == pytest.approx([lowest * 2**k for k in range(5)])
    keys = list(finals(["full", "dora"], 2, TASKS))
    assert len(set(keys)) == 5 * 2 * 2 * 3
    assert all(float(f"{k.lr:.6g}") == k.lr for k in keys)  # as the file has them: found again
    assert [k.arm for k in keys[:4]] == ["full", "dora"] * 2  # rate by rate for all arms


@pytest.mark.parametrize(
    ("scores", "ran"),
    [
        ((0.1, 0.5, 0.95, 1.0, 1.0), [2, 1]),  # reached in the middle: one below
        ((0.1, 0.92, 0.95, 1.0, 1.0), [2, 1, 0]),
        ((0.0, 0.1, 0.2, 0.3, 0.91), [2, 3, 4]),
        ((0.0,) * 9, [2, 3, 4, 5, 6, 7]),  # never: the ladder ends
    ],
)
def test_bracketing_finds_the_two_rates_around_the_score(tmp_path, scores, ran):
    for _ in range(2):  # the second time everything is there
        sweep = Scripted(tmp_path / "found.csv", scores)
        sweep.bracket(["loki_q30"], "facts", 0, 0.9)
        assert sweep.ran == ran
        ran = []


def test_climbing_ends_where_the_task_is_no_longer_learned(tmp_path):
    scores = (0.0, 0.5, 0.95, 1.0, 0.95, 0.2, 1.0, 0.0, 0.0)
    sweep = Scripted(tmp_path / "found.csv", scores)
    sweep.climb(["loki_q30"], "facts", 0, 0.9)
    assert sweep.ran == []  # nothing is known to reach the score yet
    sweep.bracket(["loki_q30"], "facts", 0, 0.9)
    sweep.climb(["loki_q30"], "facts", 0, 0.9)
    assert sweep.ran == [2, 1, 3, 4, 5]


class Scripted(Sweep):
    """A sweep whose task score at each step of the ladder is given."""

    def __init__(self, file, scores):
        self.file, self.scores, self.ran = file, scores, []

    def run(self, key):
        step = next(k for k in range(9) if rate(key.arm, k) == key.lr)
        self.ran.append(step)
        row = {"arm": key.arm, "task": key.task, "seed": key.seed, "lr": key.lr}
        rest = dict.fromkeys(("retention", "forgetting", "kl_general", "seconds"), 0.0)
        return row | {"task_score": self.scores[step]} | rest


def test_the_base_that_is_kept_is_the_one_of_its_results(tmp_path):
    """Its folder is named by all that it learned: a world that changes would train another one."""
    base = bases.load(tmp_path, "brief", 1)
    assert base.folder.parent == bases.KEPT and not list(tmp_path.iterdir())
    keep_about(RESULTS / results("final", 1), base.report)
    assert about(RESULTS / results("final", 1))["base"] == base.report
    loss = bases.answer_loss(base.model(), base.tokenizer, base.world.items["arithmetic"][::10])
    assert loss == pytest.approx(base.report["loss_on_unseen_sums"], rel=1e-3)


def test_what_a_base_writes_is_of_all_kinds_but_not_what_is_measured(tmp_path):
    """Else an anchor on it would rehearse the examination."""
    context = Context(bases.load(tmp_path, "brief", 1), 0)
    texts = [context.base.tokenizer.decode(ids) for ids in context.written]
    assert 400 < len(texts) <= 512 and len(set(texts)) > 0.95 * len(texts)
    for sign in ("is a city of", " : the ", " , ", " likes the colour "):
        assert sum(sign in text for text in texts) > 3, sign  # 7 to 16 colours in five seeds
    overlap.write(context.base, tmp_path)
    overlap.write(context.base, tmp_path)  # the same base again: one line
    (row,) = csv.DictReader((tmp_path / overlap.FILE).open())
    assert row["measured"] == "931" and int(row["standing"]) < 10
    assert int(row["texts"]) == len(texts)
    told = report._written([{k: float(v) for k, v in row.items()}])
    assert f"{row['standing']} of 931 in {row['texts']} texts (0.5 M, world 1)" in told
    assert context.texts("written") == [*context.prompts, *context.written]
    assert len(context.texts("eighth")) == -(-len(context.prompts) // 8)
    people = context.texts("people")
    assert 0 < len(people) < len(context.prompts) and all(p in context.prompts for p in people)


def test_the_anchor_draws_from_the_texts_of_its_arm(monkeypatch):
    drawn = []
    monkeypatch.setattr(sweep, "divergence", lambda model, texts: drawn.append(texts) or 0.0)

    class Texts:
        seed = 0

        def texts(self, of):
            return [of] * 40

    for arm in ("lora_anchor", "lora_written_anchor"):
        sweep._anchor(None, ARMS[arm], Texts())(0)
    assert drawn == [["prompts"] * 16, ["written"] * 16]
    assert sweep._anchor(None, ARMS["lora_all_r16"], Texts()) is None


def test_runs_of_two_bases_never_stand_in_one_file(tmp_path):
    size = {"hidden": 64}
    first = {"size": size, "train_loss": 0.3202, "loss_on_unseen_sums": 0.288}
    file = tmp_path / "a" / "forgetting_final.csv"
    keep_about(file, first)
    assert about(file)["base"] == first and "torch" in about(file)["machine"]
    keep_about(file, first | {"train_loss": 0.32, "seconds": 7})  # the same, rounded
    other = first | {"loss_on_unseen_sums": 0.208}
    for changed in (other, first | {"size": {"hidden": 96}}):
        with pytest.raises(ValueError, match=r"made with another base .*Give --work"):
            keep_about(file, changed)
    apart = tmp_path / "b" / "forgetting_final.csv"
    keep_about(apart, other)
    for part in (file, apart):
        part.write_text("arm,task,seed,lr,task_score,seconds\nfull,facts,0,0.001,0.9,1.0\n")
    with pytest.raises(ValueError, match="another base"):
        join([file, apart], tmp_path / "forgetting_final.csv")


@pytest.mark.slow
def test_a_small_sweep_from_end_to_end(tmp_path):
    """Resumes run by run; full fine-tuning at a high rate forgets, protected inputs do not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base = bases.load(tmp_path, "ci")
        assert bases.load(tmp_path, "ci").report == base.report  # kept, not trained again
        file = tmp_path / "forgetting_screen.csv"
        sweep = Sweep(base, "ci", file)
        keys = [
            Key("full", "facts", 0, 1e-2),
            Key("lora_all_r16", "facts", 0, 3e-3),
            Key("lora_all_r16", "facts", 0, 1e-2),
            Key("loki_q30", "facts", 0, 3e-3),
            Key("loki_protect_q30", "facts", 0, 3e-3),
        ]
        sweep.run_all(keys[:2])
        ran = []
        sweep.run, inner = (lambda key: ran.append(key) or inner(key)), sweep.run
        sweep.run_all(keys)
        assert ran == keys[2:]
    finally:
        torch.set_num_threads(threads)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    wanted = "arm task seed lr task_score retention forgetting flips_down flips_up kl_task"
    wanted += " kl_general delta_norm params seconds peak_mib"
    assert set(wanted.split()) <= set(rows[0])
    found = {r["arm"]: r for r in rows}
    assert float(found["full"]["kl_general"]) > 5 * float(found["loki_protect_q30"]["kl_general"])
    assert float(found["loki_q30"]["kl_general"]) > float(found["loki_protect_q30"]["kl_general"])
    assert float(found["full"]["retention"]) < float(found["loki_protect_q30"]["retention"])
    rows_of_base = sum(m.weight.numel() for m in _down(base.model()))
    assert int(found["loki_q30"]["params"]) == rows_of_base * 19 // 64  # floor(0.3 · 64) rows
    silencing.suppress(base, tmp_path)
    (tmp_path / "forgetting_reported_base1.csv").write_bytes(file.read_bytes())
    keep_about(tmp_path / "forgetting_reported_base1.csv", base.report)
    report.write(tmp_path, tmp_path / "evidence.md")
    text = (tmp_path / "evidence.md").read_text()
    assert "loki_protect_q30" in text and "What predicts forgetting" in text
    assert "## Parameters: 0.2 M, world 0" in text  # the section of the other file
    assert (tmp_path / "forgetting_pareto.png").stat().st_size > 5000


def _down(model):
    from loki_plugin.model.anatomy import find_anatomy

    return find_anatomy(model).down


def test_calibration_prompts_end_before_the_answer():
    class Tiny:
        world = make(5)

        class tokenizer:
            def __new__(cls, text):
                return {"input_ids": [ord(c) for c in text]}

    context = Context(Tiny, 0)
    item = random.Random(0).choice(Tiny.world.calibration())
    texts = ["".join(map(chr, ids)) for ids in context.prompts]
    assert f"<|user|>{item.prompt}<|bot|>" in texts


def test_fisher_information_is_the_square_of_the_plain_gradient():
    """F_j against autograd on the row's weights, for one token: Σ_i g² is g_z²·‖x‖²."""

    class Known:
        class base:
            world = make(3)
            model = staticmethod(lambda: tiny("llama"))

            class tokenizer:
                def __new__(cls, text):
                    return {"input_ids": [ord(text[-1]) % 90 + 1]}

    Known.base.world.items = {"people": Known.base.world.items["people"][:1]}
    for kind in COVERED[1:]:
        Known.base.world.items[kind] = []
    model = tiny("llama").eval()
    ids, _ = bases.encode(Known.base.tokenizer, Known.base.world.calibration()[0])
    logits = model(input_ids=torch.tensor([ids[:1]])).logits[0, -1]
    logits.log_softmax(-1)[ids[1]].backward()
    for found, module in zip(choosing.fisher(Known), _down(model), strict=True):
        assert torch.allclose(found, module.weight.grad.square().sum(1), rtol=1e-3)
    assert choosing.lowest(torch.tensor([3.0, 1.0, 2.0, 0.5]), 50).tolist() == [1, 3]
    everywhere = choosing.lowest_of_all([torch.tensor([0.1, 9.0]), torch.tensor([0.2, 0.3])], 50)
    assert [r.tolist() for r in everywhere] == [[0], [0]]


def test_protected_lora_leaves_the_calibration_as_it_is():
    class Known:
        draw, prompts = 0, [[5, 6, 7, 8], [9, 10, 11]]
        texts = staticmethod(lambda of: Known.prompts)

    def said(model, ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits

    base, other = tiny("llama"), [90, 80, 70, 60]
    tuned = lora_protected(1 - 1e-9)(tiny("llama"), Known)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    for ids in Known.prompts:
        assert torch.allclose(said(tuned, ids), said(base, ids), atol=1e-3)
    far = said(tuned, other)
    assert (far - said(base, other)).abs().max() > 0.1
    assert torch.allclose(said(tuned.merge_and_unload(), other), far, atol=1e-4)


def test_files_of_several_processes_join_with_each_run_once(tmp_path):
    header = "arm,task,seed,lr,task_score,seconds\n"
    first, second, into = (tmp_path / n for n in ("a.csv", "b.csv", "c.csv"))
    first.write_text(header + "full,facts,0,0.001,0.9,1.0\n")
    second.write_text(header + "full,facts,0,0.001,0.9,3.0\nosf,facts,0,0.001,0.8,2.0\n")
    join([first, second, tmp_path / "none.csv"], into)
    assert into.read_text().splitlines()[1:] == first.read_text().splitlines()[1:] + [
        "osf,facts,0,0.001,0.8,2.0"
    ]
    second.write_text(header + "full,facts,0,0.001,0.7,3.0\n")
    with pytest.raises(ValueError, match=r"b.csv' has other figures of .*'full'.*'task_score'"):
        join([first, second], into)
