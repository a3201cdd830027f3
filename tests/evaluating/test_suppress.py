"""Silenced rows: the same as zeroed weights, and gone afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import tiny
from helpers.prompts import pad, prompts

from loki_plugin import attribute
from loki_plugin.evaluating import log_probabilities
from loki_plugin.evaluating.curve import curve, text
from loki_plugin.evaluating.suppress import suppressed
from loki_plugin.model.anatomy import find_anatomy

ROWS = [torch.tensor(r) for r in ([0, 5], [], [47])]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_silenced_row_is_a_zeroed_row_of_the_weight(family):
    model = tiny(family)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        anatomy = find_anatomy(zeroed)
        for module, rows, dim in zip(anatomy.down, ROWS, anatomy.row_dims, strict=True):
            module.weight.index_fill_(dim, rows.long(), 0)
            if module.bias is not None:
                module.bias.index_fill_(0, rows.long(), 0)
    ids = [p.tolist() for p in prompts()]
    before = log_probabilities(model, ids)
    with suppressed(model, ROWS):
        silenced = log_probabilities(model, ids)
    assert torch.allclose(silenced, log_probabilities(zeroed, ids), atol=1e-5)
    assert not torch.allclose(silenced, before, atol=1e-3)
    assert torch.equal(log_probabilities(model, ids), before)


def test_other_layers_than_the_models_are_refused():
    with pytest.raises(ValueError, match="rows of 2 layers given, the model has 3"):
        with suppressed(tiny("llama"), ROWS[:2]):
            pass


def test_the_curve_holds_every_case_once_and_all_rows_silence_the_mlp():
    model = tiny("llama")
    ids = prompts()
    scores = attribute(model, *pad(ids, "left"))
    found = curve(model, [p.tolist() for p in ids], scores, quotas=(10, 100))
    cases = [(s.quota, s.which, s.magnitude) for s in found]
    assert len(cases) == len(set(cases)) == 10
    everything = [s.effect.kl for s in found if s.quota == 100]
    assert max(everything) == pytest.approx(min(everything))  # whoever ranks them, all are silent
    assert all(s.effect.kl < everything[0] for s in found if s.quota == 10)
    assert len(text(found).splitlines()) == 11


@pytest.mark.slow
def test_the_command_takes_an_analysis_of_this_model_only(tmp_path):
    from click.testing import CliRunner
    from helpers.runs import configure, model
    from helpers.tokenizers import make_tokenizer

    from loki_plugin.cli import loki
    from loki_plugin.pipeline import choose_rows

    tokenizer = make_tokenizer(tmp_path / "base")
    analysed = model()
    analysed.save_pretrained(tmp_path / "base")
    model(seed=1).save_pretrained(tmp_path / "other")
    make_tokenizer(tmp_path / "other")
    source = tmp_path / "prompts.jsonl"
    source.write_text(
        '{"prompt": "say one", "target": "1"}\n{"prompt": "say two", "target": "2"}\n'
    )
    choose_rows(analysed, tokenizer, configure(str(source), tmp_path / "cache"))

    def run(folder):
        command = ["suppress", str(tmp_path / folder), "--dir", str(tmp_path / "cache")]
        command += ["--quotas", "10", "--prompts", str(source), "--device", "cpu"]
        return CliRunner().invoke(loki, command)

    done = run("base")
    assert done.exit_code == 0, done.output
    cases = [line for line in done.output.splitlines() if line.startswith("   10  ")]
    assert "2 prompts" in done.output and len(cases) == 5
    refused = run("other")
    assert refused.exit_code == 1 and "its embeddings or norms have other values" in refused.output
