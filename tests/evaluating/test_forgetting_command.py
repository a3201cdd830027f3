"""`loki forgetting` with lm-eval's own evaluator on a task of our own, offline."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.prompts import LM_EVAL_TASK

from loki_plugin import implant
from loki_plugin.cli import loki
from loki_plugin.evaluating import Forgetting, TaskChange
from loki_plugin.evaluating.forgetting import ForgettingReport, load_model, measure
from loki_plugin.evaluating.gate import Gate
from loki_plugin.evaluating.harness import changes, check_tasks, evaluate_tasks
from loki_plugin.evaluating.quick import compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a copy with another head, and a task of 12 questions."""
    from helpers.tokenizers import make_tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("forgetting")
    tokenizer = make_tokenizer(folder / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
        )
    ).save_pretrained(folder / "base")
    tuned = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        tuned.lm_head.weight.neg_()  # what was likely is unlikely now
    tuned.save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    data = folder / "questions.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": f"say {i}", "choices": [" a", " b"], "answer": i % 2}) + "\n"
            for i in range(12)
        )
    )
    (folder / "tasks").mkdir()
    (folder / "tasks" / "colours.yaml").write_text(LM_EVAL_TASK % data)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(5)))
    return folder


@pytest.mark.slow
def test_tasks_are_compared_item_by_item(folder):
    """Flips, counted by hand from lm-eval's own per-item record."""
    before, after = (
        evaluate_tasks(
            folder / which, ["colours"], include=str(folder / "tasks"), device="cpu", batch_size=4
        )
        for which in ("base", "tuned")
    )
    (change,) = changes(before, after)
    right = [
        [s["acc"] for s in sorted(r["samples"]["colours"], key=lambda s: s["doc_id"])]
        for r in (before, after)
    ]
    assert change.items == 12 and change.metric == "acc,none"
    assert change.before == pytest.approx(sum(right[0]) / 12)
    assert change.flips_down == sum(a > b for a, b in zip(*right, strict=True))
    assert change.flips_up == sum(b > a for a, b in zip(*right, strict=True))
    assert change.flips_down + change.flips_up > 0  # another head answers otherwise
    (nothing,) = changes(before, before)
    assert nothing.flips_down == nothing.flips_up == 0 and nothing.relative_drop == 0


@pytest.mark.slow
def test_the_command_reports_and_writes_json(folder, tmp_path):
    command = ["forgetting", "--base", str(folder / "base"), "--tuned", str(folder / "tuned")]
    command += ["--tasks", "colours", "--include", str(folder / "tasks"), "--noise-floor"]
    command += ["--prompts", str(folder / "prompts.jsonl"), "--output", str(tmp_path / "f.json")]
    command += ["--plot", str(tmp_path / "f.png")]  # no --device: where there is no GPU, the CPU
    result = CliRunner().invoke(loki, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "5 prompts: KL to the base" in result.output
    assert "noise floor of colours" in result.output and " 0 + 0 flips" in result.output
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["prompts"]["kl"] > 0.01 and found["tasks"][0]["items"] == 12
    assert (tmp_path / "f.png").stat().st_size > 5000


def test_an_unknown_task_is_named(folder):
    result = CliRunner().invoke(
        loki,
        ["forgetting", "--base", str(folder / "base"), "--tuned", str(folder / "tuned")]
        + ["--tasks", "no_such_task", "--prompts", str(folder / "prompts.jsonl")],
    )
    assert result.exit_code == 1
    assert "lm-eval knows no task no_such_task" in result.output


def test_tasks_that_run_the_models_code_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="humaneval_instruct: runs code .*--confirm-run-unsafe"):
        check_tasks(["hellaswag", "humaneval_instruct", "mmlu"])
    assert check_tasks(["humaneval_instruct"], unsafe=True)
    result = CliRunner().invoke(
        loki, ["forgetting", "--base", "none", "--tuned", "none", "--tasks", "humaneval"]
    )
    assert result.exit_code == 1 and "runs code that the model writes" in result.output


def test_where_figures_cannot_be_written_is_said_before_anything_is_loaded(tmp_path):
    nothing = ["forgetting", "--base", "none", "--tuned", "none"]
    result = CliRunner().invoke(loki, [*nothing, "--plot", str(tmp_path / "f.foo")])
    assert result.exit_code == 1 and "must end in a format of pictures: " in result.output
    (tmp_path / "file").touch()
    result = CliRunner().invoke(loki, [*nothing, "--output", str(tmp_path / "file" / "f.json")])
    assert result.exit_code == 1 and f"exists: '{tmp_path / 'file'}'" in result.output
    CliRunner().invoke(loki, [*nothing, "--output", str(tmp_path / "not" / "yet" / "f.json")])
    assert (tmp_path / "not" / "yet").is_dir()  # although there is no such base


@pytest.mark.slow
def test_an_adapter_with_tokens_of_its_own_is_evaluated_as_it_was_trained(folder, tmp_path):
    """lm-eval takes the base's tokenizer for an adapter, and would cut its embeddings back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens(["<|new|>"])
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    implant(model, [[0, 1]] * 2).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = measure(
        str(folder / "base"),
        tmp_path,
        ["colours"],
        str(folder / "prompts.jsonl"),
        include=str(folder / "tasks"),
        batch_size=4,
        device="cpu",
    )
    assert found.prompts.same_answer == 1 and found.prompts.kl < 0.01  # the new token's own share
    (task,) = found.tasks
    assert task.items == 12 and task.before == task.after and not task.flips_down + task.flips_up


def test_a_run_without_anything_to_compare_says_what_is_missing(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"base_model": "b", "output_dir": str(tmp_path / "out")}))
    result = CliRunner().invoke(loki, ["forgetting", str(config)])
    assert result.exit_code == 1
    assert "neither an adapter nor a merged model" in result.output
    result = CliRunner().invoke(loki, ["forgetting"])
    assert result.exit_code == 1 and "give a CONFIG, or --base and --tuned" in result.output


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        ("foo", "auto", "device 'foo' cannot be used: "),
        ("cpu", "foo", "dtype 'foo' is unknown; give auto"),
        ("cpu", "nn", "dtype 'nn' is unknown; give auto"),
    ],
)
def test_a_device_or_dtype_that_there_is_not_is_named_before_the_model_loads(
    device, dtype, message
):
    with pytest.raises(ValueError, match=message):
        load_model("nowhere", None, device, dtype)


def judge(folder, prompts, *thresholds, tuned="tuned"):
    command = ["forgetting", "--base", str(folder / "base"), "--tuned", str(folder / tuned)]
    command += ["--prompts", prompts, "--device", "cpu", *thresholds]
    return CliRunner().invoke(loki, command, catch_exceptions=False)


def test_each_broken_threshold_is_a_sentence_and_the_exit_code_one(folder, tmp_path):
    prompts = str(folder / "prompts.jsonl")
    free = judge(folder, prompts, "--json")
    figures = json.loads(free.stdout)
    assert free.exit_code == 0 and not {"passed", "broken"} & figures.keys()
    kl, kept = figures["prompts"]["kl"], 100 * figures["prompts"]["same_answer"]
    assert kl > 0.01 and kept < 50
    narrow = ["--max-kl", repr(kl * 0.99), "--min-kept", repr(kept + 1.5)]
    wide = ["--max-kl", repr(kl * 1.01), "--min-kept", "1"] if kept >= 1 else ["--max-kl", "99"]
    out = str(tmp_path / "gate.json")
    result = judge(folder, prompts, *narrow, "--output", out)
    assert result.exit_code == 1
    assert f"KL to the base is {kl:.4g} nats, more than --max-kl {kl * 0.99:g}\n" in result.output
    assert "% of the prompts are answered as the base does, less than --min-kept" in result.output
    told = json.loads((tmp_path / "gate.json").read_text())
    assert told["passed"] is False and len(told["broken"]) == 2
    as_json = judge(folder, prompts, *narrow, "--json")
    facts = json.loads(as_json.stdout)
    assert as_json.exit_code == 1 and facts["broken"] == told["broken"]
    passed = judge(folder, prompts, *wide)
    assert passed.exit_code == 0 and "every threshold is kept" in passed.output
    same = judge(folder, prompts, "--max-kl", "0", "--min-kept", "100", tuned="base")
    assert same.exit_code == 0, same.output


def test_a_gain_hides_no_loss():
    prompts = Forgetting(9, 0.0, 1.0, accuracy_before=0.5, accuracy_after=0.49)
    tasks = [TaskChange("a", "acc", 0.5, 0.6), TaskChange("b", "acc", 0.8, 0.76)]
    tasks.append(TaskChange("c", "ppl", 10.0, 10.1, higher_is_better=False))
    report = ForgettingReport(prompts, tasks)
    assert not Gate(max_drop=5.0001).broken(report)
    (said,) = Gate(max_drop=1.5).broken(report)
    assert said == (
        "b lost 5 %, the share of prompts answered right lost 2 %, more than --max-drop 1.5"
    )
    assert len(Gate(max_drop=0.9).broken(report)) == 1 and Gate(0.0, 100.0, 5.1).given
    nothing = Forgetting(9, float("nan"), float("nan"))
    assert len(Gate(0.05, 95).broken(ForgettingReport(nothing))) == 2
    # What is exactly allowed is allowed, whatever dividing counts rounds to.
    base, tuned = torch.eye(20), torch.eye(20).index_copy(0, torch.tensor([7]), torch.eye(20)[[8]])
    exact = compare(base.log(), (tuned + 1e-3).log(), list(range(20)))
    assert not Gate(min_kept=95, max_drop=5).broken(ForgettingReport(exact))
    assert len(Gate(min_kept=95.001, max_drop=4.999).broken(ForgettingReport(exact))) == 2
    assert not Gate().given and Gate().to_json(report) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-kl", "much"], "'much' is not a valid float"),
        (["--max-kl", "-1"], "got -1, expected a number of at least 0"),
        (["--max-kl", "nan"], "got nan, expected a number of at least 0"),
        (["--max-drop", "inf"], "got inf, expected a number of at least 0"),
        (["--min-kept", "0.95"], "got 0.95, expected percent from 1 to 100, such as 95"),
        (["--min-kept", "101"], "got 101, expected percent from 1 to 100"),
        (["--max-drop", "1"], "--max-drop goes by right answers, and "),
    ],
)
def test_faulty_thresholds_are_named_before_the_models_load(folder, options, message):
    command = ["forgetting", "--base", "none", "--tuned", "none"]
    command += ["--prompts", str(folder / "prompts.jsonl"), *options]
    result = CliRunner().invoke(loki, command)
    assert result.exit_code in (1, 2) and message in " ".join(result.output.split())


def test_a_run_under_overrides_is_measured_under_them(folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from loki_plugin.evaluating import forgetting

    seen, load = [], forgetting.load

    def watched(*args, **more):
        model = load(*args, **more)
        seen.append(model.config.rms_norm_eps)
        return model

    monkeypatch.setattr(forgetting, "load", watched)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    implant(model, [[0, 1]] * 2).save_pretrained(tmp_path / "out")
    run = {
        "base_model": str(folder / "base"),
        "output_dir": str(tmp_path / "out"),
        "overrides_of_model_config": {"rms_norm_eps": 0.5},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    asked = ["forgetting", str(tmp_path / "run.yaml"), "--prompts", str(folder / "prompts.jsonl")]
    result = CliRunner().invoke(loki, [*asked, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert seen == [0.5, 0.5]
    result = CliRunner().invoke(loki, [*asked, "--tasks", "colours"])
    assert result.exit_code and "lm-eval loads models without `overrides" in result.output
    assert len(seen) == 2


def test_texts_that_no_run_held_back_cannot_be_measured_again(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    run = {"base_model": str(folder / "base"), "output_dir": str(tmp_path / "out")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "out").mkdir()

    def said(*asked):
        result = CliRunner().invoke(loki, ["forgetting", *asked, "--held-back"])
        assert result.exit_code
        return result.output

    config = str(tmp_path / "run.yaml")
    assert "needs the CONFIG of the run" in said("--base", "a", "--tuned", "b")
    assert "leave --tasks, --max-drop out" in said(config, "--tasks", "a", "--max-drop", "1")
    assert "names no texts that were held back: no evaluation" in said(config)
    report = {"forgetting_while_training": {"texts": "0" * 20}}
    (tmp_path / "out" / "loki_report.json").write_text(json.dumps(report))
    assert "has no adapter_model.safetensors; the adapter is measured" in said(config)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    implant(model, [[0, 1]] * 2).save_pretrained(tmp_path / "out")
    assert "are not in the cache any more" in said(config)
