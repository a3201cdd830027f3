"""Forgetting while it trains, through Axolotl's own keys, trainer and logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.axolotl import load
from helpers.torchrun import two_ranks
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loki_plugin.cli import loki
from loki_plugin.host.files import Files
from loki_plugin.rows import RowSelection

EVALUATED = {"val_set_size": 0.2, "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}


def run_report(config):
    return json.loads((Path(config["output_dir"]) / "loki_report.json").read_text())


def written_config(config, folder):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def logged(folder):
    """step -> what an evaluation has logged, as the trainer keeps it beside a checkpoint."""
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return {e["step"]: e for e in history if "eval_loss" in e}


@pytest.fixture
def started(monkeypatch):
    """The runs that were started."""
    from loki_plugin.host.run import Run

    runs, start = [], Run.start.__func__

    def begin(cls, *given):
        runs.append(start(cls, *given))
        return runs[-1]

    monkeypatch.setattr(Run, "start", classmethod(begin))
    return runs


def distance(base, adapter, watch):
    """Of a saved adapter, by stock transformers and PEFT, text after text."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, adapter).eval()
    total = tokens = 0
    same = []
    with torch.no_grad():
        for text in watch.prompts + watch.own:
            ids = torch.tensor([text.ids])
            with model.disable_adapter():
                before = model(input_ids=ids).logits[0].double().log_softmax(-1)
            after = model(input_ids=ids).logits[0].double().log_softmax(-1)
            total += float((before.exp() * (before - after)).sum())
            tokens += len(text.ids)
            same.append(bool(before[-1].argmax() == after[-1].argmax()))
    return total / tokens, sum(same[: len(watch.prompts)]) / len(watch.prompts)


@pytest.mark.slow
@pytest.mark.parametrize("protect", [{}, {"directions": 5, "soft": True, "anchor": 0.1}])
def test_a_run_that_forgets_too_much_is_stopped_and_saves_the_checkpoint_that_it_names(
    run_config, train, base, started, our_log, protect, tmp_path, monkeypatch
):
    run_config |= EVALUATED | {"max_steps": 12, "use_tensorboard": True, "save_total_limit": 1}
    run_config["loki"]["protect"] = protect or "off"
    train(run_config | {"max_steps": 4, "output_dir": run_config["output_dir"] + "-measured"})
    measured = logged(Path(run_config["output_dir"] + "-measured") / "checkpoint-4")
    at = {step: entry["eval_loki_kl"] for step, entry in measured.items()}
    assert at[0] == 0 < at[2] < at[4]
    limit = (at[2] + at[4]) / 2
    run_config["loki"]["stop_forgetting"] = limit
    train(run_config)
    out, watch = Path(run_config["output_dir"]), started[-1].watch
    report = run_report(run_config)
    found = report["forgetting_while_training"]
    assert found["stopped"] == {
        "step": 4,
        "kl": pytest.approx(at[4], rel=1e-4),
        "threshold": limit,
        "saved": "checkpoint-2",
        "saved_kl": pytest.approx(at[2], rel=1e-4),
    }
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"]  # none over it is kept
    assert report["verified"] and [p["step"] for p in found["path"]] == [0, 2, 4]
    kept = out / "checkpoint-2"
    saved, of_checkpoint = (load_file(f / "adapter_model.safetensors") for f in (out, kept))
    for name, tensor in saved.items():
        assert torch.allclose(tensor, of_checkpoint[name], atol=1e-7), name
    truth = distance(base, kept, watch)
    assert truth[0] > 1e-4 and found["stopped"]["saved_kl"] == pytest.approx(truth[0], rel=1e-3)
    assert distance(base, out, watch)[0] == pytest.approx(truth[0], rel=1e-3)
    entry = logged(kept)[2]
    assert (entry["eval_loki_kl"], entry["eval_loki_kept"]) == pytest.approx(truth, rel=1e-3)
    loss = {"loss": entry["eval_loss"]}
    assert found["path"][1] == {"step": 2, "kl": entry["eval_loki_kl"], "kept": truth[1]} | loss
    # And by the command, of the checkpoint as of what was saved; paths may begin at home.
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_config["loki"]["cache_dir"] == str(tmp_path / "cache")
    run_config["loki"]["cache_dir"] = "~/cache"
    for tuned in (["--tuned", str(kept)], []):
        asked = [
            "forgetting",
            written_config(run_config, tmp_path),
            "--held-back",
            "--json",
            *tuned,
        ]
        result = CliRunner().invoke(loki, asked)
        assert result.exit_code == 0, result.output
        again = json.loads(result.stdout)
        assert (again["eval_loki_kl"], again["eval_loki_kept"]) == pytest.approx(truth, rel=1e-3)
    gate = CliRunner().invoke(loki, [*asked, "--max-kl", str(truth[0] / 2)])
    assert gate.exit_code == 1 and "more than --max-kl" in gate.output
    said = f"stopped at step 4: eval_loki_kl is {at[4]:.4f} nats, more than stop_forgetting"
    assert said in our_log.text and f"saved is checkpoint-2, with {at[2]:.4f}" in our_log.text
    assert found["evaluations"] == 3 and 0 < found["percent_of_training"] < 100
    assert f"took {found['seconds']:.1f} s in 3 evaluations" in our_log.text
    assert len(watch.prompts) == 1 and found["prompts"] + found["own_texts"] == 4  # a short run
    held = {text.ids for text in watch.prompts + watch.own}
    if protect:
        drawn = {tuple(ids) for ids in started[-1].anchor.prompts}
        assert len(drawn) == 7 and not drawn & held
    assert told_to_tensorboard(out) == pytest.approx([at[0], at[2], at[4]], rel=1e-4)


def told_to_tensorboard(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (f for f in out.rglob("events.out.tfevents.*"))
    events = EventAccumulator(str(file))
    events.Reload()
    return [event.value for event in events.Scalars("eval/loki_kl")]


@pytest.mark.slow
def test_without_a_checkpoint_under_the_threshold_the_run_says_so(run_config, train, our_log):
    run_config |= EVALUATED | {"save_strategy": "no"}
    del run_config["save_steps"]
    run_config["loki"]["stop_forgetting"] = 1e-9
    train(run_config)
    report = run_report(run_config)
    stopped = report["forgetting_while_training"]["stopped"]
    assert stopped["step"] == 2 and stopped["saved"] is None and report["verified"]
    assert "no checkpoint under it was kept, so what is saved is over it" in our_log.text


@pytest.mark.slow
@pytest.mark.parametrize("better", [None, False, True])
def test_the_best_checkpoint_and_early_stopping_go_by_it(run_config, train, better):
    """It rises, so the first checkpoint is the best; where more is better, each one is."""
    run_config |= EVALUATED | {"metric_for_best_model": "loki_kl", "early_stopping_patience": 1}
    run_config |= {"save_total_limit": 3, "max_steps": 6, "greater_is_better": better}
    train(run_config)
    out, path = Path(run_config["output_dir"]), run_report(run_config)["forgetting_while_training"]
    steps = [p["step"] for p in path["path"]]
    assert steps == ([0, 2, 4, 6] if better else [0, 2, 4]) and path["stopped"] is None
    best = out / ("checkpoint-6" if better else "checkpoint-2")
    saved, chosen = (load_file(f / "adapter_model.safetensors") for f in (out, best))
    assert all(torch.equal(saved[name], chosen[name]) for name in chosen)
    state = json.loads((sorted(out.glob("checkpoint-*"))[-1] / "trainer_state.json").read_text())
    assert state["best_metric"] == path["path"][3 if better else 1]["kl"]


@pytest.mark.slow
def test_a_run_that_does_not_report_measures_nothing_unless_it_is_asked(run_config, train):
    run_config |= EVALUATED | {"max_steps": 2}
    run_config["loki"]["report"] = False
    train(run_config)
    folder = Path(run_config["output_dir"]) / "checkpoint-2"
    assert "eval_loss" in logged(folder)[2] and "eval_loki_kl" not in logged(folder)[2]
    run_config["metric_for_best_model"] = "eval_loki_kept"
    train(run_config)
    assert logged(folder)[2]["eval_loki_kept"] in (0.0, 1.0)


@pytest.mark.slow
def test_preferences_have_it_too(run_config, train, base, started, tmp_path):
    data = tmp_path / "pairs.jsonl"
    pairs = [(f"say {i}", f"number {i} it is", f"no, {i} it is not") for i in range(20)]
    records = [{"prompt": q, "chosen": y, "rejected": n} for q, y, n in pairs]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    what = {"path": str(data), "ds_type": "json", "type": "chatml.default", "split": "train"}
    run_config |= EVALUATED | {"datasets": [what], "rl": "dpo", "chat_template": "chatml"}
    run_config |= {"dataloader_num_workers": 0, "max_steps": 4}
    run_config["loki"]["protect"] = {"anchor": 0.1}
    train(run_config)
    found = logged(Path(run_config["output_dir"]) / "checkpoint-4")[4]
    truth = distance(base, run_config["output_dir"], started[-1].watch)
    assert truth[0] > 1e-6 and found["eval_loki_kl"] == pytest.approx(truth[0], rel=1e-3)
    assert started[-1].watch.row > 10


RANKS = """
import sys

if __name__ == "__main__":  # data sets are tokenised in processes that import this file
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    do_train(load_cfg(sys.argv[1]), TrainerCliArgs())
"""


@pytest.mark.slow
def test_two_ranks_stop_together(run_config, tmp_path):
    run_config |= EVALUATED
    run_config["loki"] |= {"stop_forgetting": 1e-9, "protect": {"anchor": 0.5}}
    (tmp_path / "rank.py").write_text(RANKS)
    (tmp_path / "config.yaml").write_text(json.dumps(run_config))
    two_ranks(tmp_path / "rank.py", tmp_path / "config.yaml")
    report = run_report(run_config)
    assert report["verified"]
    stopped = report["forgetting_while_training"]["stopped"]
    assert stopped["step"] == 2 and stopped["saved"] is None


@pytest.mark.parametrize(
    ("more", "block", "message"),
    [
        ({}, {"stop_forgetting": "much"}, r"loki.stop_forgetting: .*number .*\(got 'much'\)"),
        ({}, {"stop_forgetting": True}, r"loki.stop_forgetting: .*got True, expected a number"),
        ({}, {"stop_forgetting": 0}, r"loki.stop_forgetting: .*greater than 0 \(got 0\)"),
        ({}, {"stop_forgetting": -0.1}, r"loki.stop_forgetting: .*greater than 0"),
        ({}, {"stop_forgetting": "nan"}, r"loki.stop_forgetting: "),
        (
            {},
            {"stop_forgetting": 0.05},
            "stop_forgetting: 0.05 goes by evaluations, and this run makes none; set `val",
        ),
        ({"val_set_size": 0.2}, {"stop_forgetting": 0.05}, "this run makes none; set"),
        (
            {"metric_for_best_model": "loki_kl"},
            {},
            "metric_for_best_model: loki_kl goes by evaluations, and this run makes none",
        ),
        (EVALUATED | {"metric_for_best_model": "loki_k"}, {}, "there are loki_kl and loki_kept"),
        (
            EVALUATED | {"metric_for_best_model": "eval_loki_kl", "rl": "dpo"},
            {},
            "metric_for_best_model: eval_loki_kl does not reach the trainers of `rl: dpo`",
        ),
    ],
)
def test_faulty_settings_are_named_before_anything_is_loaded(run_config, more, block, message):
    run_config |= more
    run_config["loki"] |= block
    with pytest.raises(ValueError, match=message):
        Files.read(load(run_config))


def test_the_calibration_is_read_where_the_run_goes_by_it(run_config, tmp_path):
    rows = RowSelection([[1], [2], [3]], 64).save(tmp_path / "rows.json")
    run_config["loki"] |= {"rows": str(rows)}
    run_config |= EVALUATED
    assert not Files.read(load(run_config)).inputs.records
    run_config["loki"] |= {"stop_forgetting": 0.05}
    assert len(Files.read(load(run_config)).inputs.records) == 8
