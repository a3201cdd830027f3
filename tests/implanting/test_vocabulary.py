"""Adapters that carry embeddings which grew by added tokens."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.families import tiny
from safetensors.torch import load_file, save_file

from loki_plugin import RowSelection, implant
from loki_plugin.implanting.checkpoint import INDEX
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.verify import verify

ROWS = RowSelection([[3, 1, 40], [0, 47, 5], [7, 8, 9]], 48)
NEW = 3
DOWN = ("mlp.down_proj.weight", "mlp.c_proj.weight", "fc2.weight", "dense_4h_to_h.weight")


def make(tmp_path, family="llama", tied=False, dtype=torch.float32, loaded=None, **saving):
    """A base, and an adapter that was trained after its embeddings got three tokens more."""
    from transformers import AutoModelForCausalLM

    base = tiny(family, dtype=dtype)
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    base.save_pretrained(tmp_path / "base", **saving)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=loaded or dtype)
    torch.manual_seed(2)
    model.resize_token_embeddings(97 + NEW, mean_resizing=False)
    model = implant(model, ROWS, None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ROWS.save(tmp_path / "adapter" / "loki_rows.json")
    return model


def merged(tmp_path):
    return merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", ROWS, False)


def load(folder):
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi", "gpt_neox"])
@pytest.mark.parametrize(
    ("dtype", "loaded", "shard"),
    [
        (torch.float32, torch.float32, "20KB"),
        (torch.bfloat16, torch.bfloat16, "5GB"),
        (torch.float32, torch.bfloat16, "20KB"),
        (torch.float32, torch.float16, "5GB"),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_old_tokens_keep_their_bytes_and_new_ones_come_behind(
    tmp_path, family, shard, dtype, loaded, tied
):
    from transformers import AutoModelForCausalLM

    model = make(tmp_path, family, tied, dtype, loaded, max_shard_size=shard).eval()
    assert merged(tmp_path).new_tokens == NEW
    before, after = load(tmp_path / "base"), load(tmp_path / "out")
    assert before.keys() == after.keys()
    grown = set()
    for key, old in before.items():
        new = after[key]
        if new.shape != old.shape:
            grown.add(key)
            assert torch.equal(new[: len(old)], old) and len(new) == 97 + NEW
        elif not key.endswith(DOWN):
            assert torch.equal(new, old), key
    assert grown
    if (tmp_path / "base" / INDEX).is_file():
        old, new = (
            json.loads((tmp_path / f / INDEX).read_text())["metadata"] for f in ("base", "out")
        )
        more = {k: after[k].numel() - before[k].numel() for k in grown}
        size = sum(t.numel() * t.element_size() for t in after.values())
        assert new["total_size"] == size
        assert new["total_parameters"] == old["total_parameters"] + sum(more.values())
    report = verify(tmp_path / "base", tmp_path / "out", ROWS, False)
    assert report.ok, report.text()
    assert report.new_rows == dict.fromkeys(grown, NEW)
    assert "has 3 new rows, of added tokens" in report.text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 97 + NEW
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    ids = torch.tensor([[5, 97, 98, 99]])
    if dtype == loaded == torch.float32:
        with torch.no_grad():
            assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-4)
    assert plain.get_input_embeddings().weight.shape[0] == 97 + NEW
    wanted = model.get_input_embeddings().weight[97:].to(dtype)
    assert torch.equal(plain.get_input_embeddings().weight[97:], wanted)


def edit(tmp_path, change):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


IN, OUT = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
FAULTS = {
    "fewer": (
        lambda t: t.update({IN: t[IN][:50].clone()}),
        r"is \[50, 48\], the base's \[97, 48\]",
    ),
    "width": (lambda t: t.update({IN: t[IN][:, :40].clone()}), r"is \[100, 40\], the base's"),
    "one only": (lambda t: t.pop(OUT), "but none to lm_head.weight; all of them must grow"),
    "unequal": (lambda t: t.update({OUT: t[OUT][:98].clone()}), "must grow by the same number"),
    "trained": (
        lambda t: t[IN][4].add_(1),
        "other values for tokens 0 to 96 than the base: it was trained on another base",
    ),
    "foreign": (
        lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(48)}),
        "holds base_model.model.model.norm.weight, which is neither",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_embeddings_that_do_not_fit_are_refused(tmp_path, case):
    make(tmp_path)
    change, message = FAULTS[case]
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        merged(tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_beyond_the_embeddings_is_not_merged(tmp_path):
    """Earlier versions did not save new embeddings where the base's size could not be looked up."""
    make(tmp_path)
    told = {"model": {"vocab": {"a": 0, "b": 96}}, "added_tokens": [{"id": 99}]}
    (tmp_path / "adapter" / "tokenizer.json").write_text(json.dumps(told))
    assert merged(tmp_path).new_tokens == NEW
    shutil.rmtree(tmp_path / "out")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if ".lora_" in k}, weights)
    with pytest.raises(ValueError, match="tokens up to id 99, the embeddings 97 rows"):
        merged(tmp_path)
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(told))  # so was the base's own
    assert merged(tmp_path).new_tokens == 0


def test_embeddings_that_did_not_grow_are_the_bases(tmp_path):
    make(tmp_path)
    edit(tmp_path, lambda t: t.update({k: t[k][:97].clone() for k in (IN, OUT)}))
    assert merged(tmp_path).new_tokens == 0
    report = verify(tmp_path / "base", tmp_path / "out", ROWS, False)
    assert report.ok and not report.new_rows


def test_verify_sees_a_changed_old_token_and_a_wrong_vocab_size(tmp_path):
    make(tmp_path)
    merged(tmp_path)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][96, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    report = verify(tmp_path / "base", tmp_path / "out", ROWS, False)
    assert report.faults == ["model.embed_tokens.weight changed"]
    path.write_text(json.dumps(config | {"vocab_size": 97}))
    report = verify(tmp_path / "base", tmp_path / "out", ROWS, False)
    assert report.faults[1:] == ["config.json: vocab_size is 97, the embeddings have {100}"]
