"""What tools that know nothing of this package make of a saved adapter."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.families import FAMILIES, tiny
from helpers.laws import adapter_of, modules_of
from helpers.tokenizers import make_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loki_plugin import RowSelection, implant
from loki_plugin.implanting.exporting import export
from loki_plugin.implanting.merge import merge_adapter

ROWS = [[3, 1, 40], [0, 47, 5], [7, 8, 33]]
STOCK = """
import sys
sys.modules["loki_plugin"] = None
import torch
from peft import AutoPeftModelForCausalLM
from transformers import pipeline
adapter, base, out = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
merged = model.merge_and_unload()
merged.save_pretrained(out)
say = pipeline("text-generation", model=out, tokenizer=base, dtype=torch.float32, device="cpu")
words = say("say the number", max_new_tokens=4, do_sample=False, return_full_text=False)
print(words[0]["generated_text"], end="")
"""


def trained(model, rows, rank=None, protect=None, **more):
    model = implant(model, rows, rank, protect, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.slow
def test_stock_peft_merges_a_dense_adapter_to_the_bytes_of_loki_merge(tmp_path):
    base, adapter, theirs, ours = (str(tmp_path / n) for n in ("base", "adapter", "a", "b"))
    settings = FAMILIES["llama"][1] | {"vocab_size": 320}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings, initializer_range=0.1)).save_pretrained(base)
    tokenizer = make_tokenizer(base)
    trained(AutoModelForCausalLM.from_pretrained(base), ROWS).save_pretrained(adapter)
    run = [sys.executable, "-c", STOCK, adapter, base, theirs]
    said = subprocess.run(run, check=True, capture_output=True, text=True, timeout=300).stdout
    merge_adapter(base, adapter, ours, RowSelection(ROWS, 48), progress=False)
    a, b = (load_file(f"{folder}/model.safetensors") for folder in (theirs, ours))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    ids = tokenizer("say the number", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(ours, dtype=torch.float32)
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert said == tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("rank", [None, 2], ids=["dense", "rank2"])
@pytest.mark.parametrize("protected", [False, True])
def test_readers_that_know_one_rank_and_one_alpha_scale_by_one(tmp_path, rank, protected):
    """llama.cpp's converter keeps one alpha of `adapter_config.json` and no patterns."""
    protect = [torch.linalg.qr(torch.randn(80, 4)).Q for _ in ROWS] if protected else None
    trained(tiny("llama"), ROWS, rank, protect).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    assert {config["lora_alpha"] / b.shape[1] for _, b in adapter_of(tmp_path).values()} == {1}
    for name in ("use_rslora", "use_dora", "lora_bias"):
        assert not config[name], name
    assert config["bias"] == "none" and not config["modules_to_save"]


def one_alpha(folder):
    """Name of a linear -> ΔW, as llama.cpp has it: one alpha, and the rank of each tensor."""
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    return {
        name: (alpha / b.shape[1] if alpha else 1) * (b @ a)
        for name, (a, b) in modules_of(folder).items()
    }


@pytest.mark.parametrize(
    ("settings", "fullest"),
    [
        ({"rows": [[3, 1, 40], [0, 47, 5, 6, 9], [7, 8, 33]]}, 5),
        ({"rows": ROWS, "targets": "all", "linear_rank": 4}, 4),
        ({"rows": ROWS, "targets": "all", "linear_rank": 3, "rank": 2}, 3),
    ],
    ids=["uneven rows", "dense beside linears", "another rank for linears"],
)
def test_several_ranks_in_one_adapter_need_patterns_and_an_exported_one_does_not(
    tmp_path, settings, fullest
):
    """The way out for llama.cpp, at the largest rank of the adapter, which loses nothing; and
    alpha 0 in a copy."""
    before, after, zero = (tmp_path / name for name in ("before", "after", "zero"))
    trained(tiny("llama"), **settings).save_pretrained(before)
    config = json.loads((before / "adapter_config.json").read_text())
    assert config["alpha_pattern"] == config["rank_pattern"] != {}
    meant = {name: b @ a for name, (a, b) in modules_of(before).items()}
    assert any(not torch.allclose(one_alpha(before)[name], meant[name]) for name in meant)

    export(before, after, fullest, progress=False)
    assert not json.loads((after / "adapter_config.json").read_text())["alpha_pattern"]
    shutil.copytree(before, zero)
    (zero / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    for folder in (after, zero):
        found = one_alpha(folder)
        assert found.keys() == meant.keys()
        for name in meant:
            torch.testing.assert_close(found[name], meant[name])
