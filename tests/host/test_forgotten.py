"""Every run says how much it forgot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loki_plugin.blocks import CalibrationArgs
from loki_plugin.evaluating import compare, log_probabilities
from loki_plugin.evaluating.forgetting import load_questions

pytestmark = pytest.mark.slow


def forgotten(out):
    return json.loads((Path(out) / "loki_report.json").read_text())["forgetting"]


def test_the_report_says_what_the_saved_adapter_has_changed(run_config, train, base, questions):
    """Against base and saved adapter, loaded anew by stock transformers and PEFT."""
    train(run_config)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    asked = load_questions(
        AutoTokenizer.from_pretrained(base), CalibrationArgs(source=str(questions))
    )
    ids = [p.ids for p in asked]
    before = log_probabilities(model, ids)
    tuned = PeftModel.from_pretrained(model, run_config["output_dir"])
    truth = compare(before, log_probabilities(tuned, ids), [p.target for p in asked])
    found = forgotten(run_config["output_dir"])
    assert truth.kl > 1e-3 and found["kl"] == pytest.approx(truth.kl, rel=1e-3)
    assert found["prompts"] == 8 and found["calibration"] == str(questions)
    assert found["accuracy_before"] == truth.accuracy_before
    assert (found["flips_down"], found["flips_up"]) == (truth.flips_down, truth.flips_up)


def test_a_run_that_reads_no_calibration_says_that_it_has_not_measured(run_config, train, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text("[[1], [2], [3]]")
    run_config["loki"]["rows"] = str(rows)
    train(run_config)
    assert forgotten(run_config["output_dir"]) == {"not_measured": "no calibration was read"}
