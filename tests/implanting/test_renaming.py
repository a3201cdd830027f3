"""`loki export --names`: an adapter under the names of the other class of its base."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from helpers.merging import shaken
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.standins import published, shrink
from benchmarks.trial import save_standin, stock_peft
from loki_plugin import RowSelection, implant
from loki_plugin.cli import loki
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.verify import verify
from loki_plugin.model.building import kinds
from loki_plugin.model.fingerprint import fingerprint

# Of different numbers, so that PEFT's configuration holds patterns by name.
ROWS = [[1, 5, 9], [0, 2, 63, 7], [3, 4, 5], [7, 8]]
IDS = torch.arange(5, 15)[None]
# wrapper -> its own text model, where that is not the default's
FAMILIES = {"llama4": None, "qwen3_5": None, "gemma3": None, "mistral3": "ministral3"}
FORMS = {"dense": {}, "all": {"rank": 1, "targets": "all", "linear_rank": 2}}


def wrapped(base):
    return kinds(AutoConfig.from_pretrained(base))[0].loader.from_pretrained(
        base, dtype=torch.float32
    )


def text_alone(whole):
    """The class of the text model alone, with the wrapper's weights."""
    model = AutoModelForCausalLM.from_config(whole.config.get_text_config()).float()
    decoder = whole.model.language_model if hasattr(whole, "model") else whole.language_model.model
    model.model.load_state_dict(decoder.state_dict())
    model.get_output_embeddings().weight.data = whole.get_output_embeddings().weight.data.clone()
    return model.eval()


def tuned(model, folder, form):
    rows = RowSelection(ROWS, 64, fingerprint(model))
    model = shaken(implant(model, rows, **FORMS[form]), 0.1)
    model.save_pretrained(folder)
    return model.eval()


def export(*arguments):
    return CliRunner().invoke(loki, ["export", *map(str, arguments)])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def answers_of(model, folder):
    """Of stock PEFT, which only warns where an adapter fits nothing; the base's own too."""
    plain = logits(model)
    with stock_peft():
        return logits(PeftModel.from_pretrained(model, folder)), plain


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_loads_it_into_the_other_class_and_back(tmp_path, family, form):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_standin(shrink(published(family, FAMILIES[family])), base)
    whole = wrapped(base)
    text = text_alone(whole)
    wanted = logits(tuned(whole, adapter, form))
    done = export(adapter, tmp_path / "text", "--names", "text", "--base", base)
    assert done.exit_code == 0, done.output
    assert f"are named as in {type(text).__name__} now" in done.output
    found, plain = answers_of(text, tmp_path / "text")
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(plain, wanted, atol=1e-2)
    # Back again it is byte by byte what it was.
    done = export(tmp_path / "text", tmp_path / "back", "--names", "wrapper", "--base", base)
    assert done.exit_code == 0, done.output
    torch.testing.assert_close(answers_of(wrapped(base), tmp_path / "back")[0], wanted)
    one, two = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "back"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    # Either merges onto the wrapper's checkpoint.
    rows = RowSelection.load(tmp_path / "text" / "loki_rows.json")
    assert rows.made["export"]["names"] == type(text).__name__
    merge_adapter(base, tmp_path / "text", tmp_path / "merged", rows, progress=False)
    assert verify(base, tmp_path / "merged", rows, progress=False).ok
    torch.testing.assert_close(logits(wrapped(tmp_path / "merged")), wanted, atol=1e-4, rtol=1e-3)


def test_an_adapter_of_the_text_class_gets_the_wrappers_names(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_standin(shrink(published("qwen3_5")), base)
    text = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert type(text).__name__ == "Qwen3_5ForCausalLM"
    wanted = logits(tuned(text, adapter, "dense"))
    done = export(adapter, tmp_path / "out", "--names", "wrapper", "--base", base, "--json")
    facts = json.loads(done.stdout)
    assert facts["fits"] == "Qwen3_5ForConditionalGeneration" and facts["modules"] == 4
    torch.testing.assert_close(answers_of(wrapped(base), tmp_path / "out")[0], wanted)


def test_what_cannot_be_renamed_is_refused(tmp_path, base):
    wrapper, adapter = tmp_path / "base", tmp_path / "adapter"
    save_standin(shrink(published("llama4")), wrapper)
    tuned(wrapped(wrapper), adapter, "dense")
    for arguments, message in (
        (("--names", "wrapper"), "has the names of Llama4ForConditionalGeneration already"),
        (("--names", "text", "--base", base), r"(model_type 'llama') is loaded as one class only"),
        ((), "give --rank or --names, one of them"),
        (("--names", "text", "--no-kl"), "--no-kl is about what a smaller rank loses"),
        (("--names", "text", "--rank", "2"), "for both, export twice, rank first"),
    ):
        done = export(adapter, tmp_path / "out", *arguments)
        assert done.exit_code == 1 and message in done.output, done.output
    other = tmp_path / "other"
    save_standin(shrink(published("gemma3")), other)
    done = export(adapter, tmp_path / "out", "--names", "text", "--base", other)
    assert done.exit_code == 1 and "no counterpart; it is the adapter of another" in done.output
    qwen = tmp_path / "qwen"
    save_standin(shrink(published("qwen2_5_vl")), qwen)
    done = export(adapter, tmp_path / "out", "--names", "text", "--base", qwen)
    assert (
        done.exit_code == 1 and "no class for its text model ('qwen2_5_vl_text') al" in done.output
    )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
