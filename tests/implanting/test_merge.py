"""Merging and verifying on checkpoints that transformers and PEFT write."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from helpers.families import tiny
from helpers.room import little_room
from safetensors.torch import load_file, save_file

from loki_plugin import RowSelection, implant
from loki_plugin.cli import loki
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.selected import RowFactor
from loki_plugin.implanting.verify import verify

ROWS = RowSelection([[3, 1, 40], [0, 47, 5], [7, 8, 9]], 48)


def make(tmp_path, family="llama", dtype=torch.float32, rank=None, **saving):
    """A base folder and an adapter with non-trivial values; returns the PEFT model too."""
    base = tiny(family, dtype=dtype)
    base.save_pretrained(tmp_path / "base", **saving)
    (tmp_path / "base" / "tokenizer_config.json").write_text('{"of": "base"}')
    model = implant(base, ROWS, rank)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" in name:
                parameter.normal_()
        for module in model.modules():
            if isinstance(module, RowFactor):
                module.values.normal_()
    model.save_pretrained(tmp_path / "adapter")
    ROWS.save(tmp_path / "adapter" / "loki_rows.json")
    return model


def load(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def merged(tmp_path, **kwargs):
    return merge_adapter(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", ROWS, False, **kwargs
    )


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_selected_rows_get_the_update_and_no_other_byte_changes(
    tmp_path, family, dtype, rank, shard
):
    model = make(tmp_path, family, dtype, rank, max_shard_size=shard)
    report = merged(tmp_path)
    assert (report.layers, report.rows) == (3, 9)
    before, after = load(tmp_path / "base"), load(tmp_path / "out")
    assert before.keys() == after.keys()
    found = 0
    for key, old in before.items():
        new = after[key]
        layer = next((i for i in range(3) if f".{i}." in key), None)
        is_down = key.endswith(("mlp.down_proj.weight", "mlp.c_proj.weight", "fc2.weight"))
        if not is_down:
            assert torch.equal(old, new), key
            continue
        found += 1
        module = next(
            m
            for n, m in model.named_modules()
            if hasattr(m, "lora_A") and n.endswith(key.removesuffix(".weight"))
        )
        delta = module.get_delta_weight("default").float()
        if family == "gpt2":
            old, new, delta = old.T, new.T, delta.T
        rows = ROWS.rows[layer]
        frozen = [j for j in range(48) if j not in rows]
        assert torch.equal(new[frozen], old[frozen])
        wanted = (old[rows].float() + delta[rows]).to(dtype).float()
        # A product of two matrices may round its last bit by its shape; a one-hot one does not.
        tolerance = 0 if rank is None else 2 * torch.finfo(dtype).eps
        assert torch.allclose(new[rows].float(), wanted, rtol=tolerance, atol=tolerance)
        assert (new[rows] != old[rows]).any(1).all()
    assert found == 3
    assert verify(tmp_path / "base", tmp_path / "out", ROWS, False).ok


def test_the_merged_model_answers_as_the_adapter_does(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make(tmp_path, "llama", rank=2, max_shard_size="20KB").eval()
    merged(tmp_path)
    ids = torch.arange(1, 9)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        assert torch.allclose(plain(input_ids=ids).logits, wanted, atol=1e-4)


def test_companion_files_come_along_and_a_tokenizer_that_cannot_be_read_is_the_runs(tmp_path):
    make(tmp_path)
    (tmp_path / "adapter" / "tokenizer_config.json").write_text('{"of": "training"}')
    assert "tokenizer: the files are the run's, for it cannot be read" in merged(tmp_path).text()
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "loki_rows.json"} <= files
    assert "adapter_config.json" not in files
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["of"] == "training"


def test_an_interrupted_merge_leaves_nothing_at_the_output(tmp_path, monkeypatch):
    from loki_plugin.implanting import merge

    make(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(merge, "_write_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merged(tmp_path)
    with little_room(10_000), pytest.raises(OSError, match="File too large"):
        merged(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]  # the disk is free
    merged(tmp_path)
    assert verify(tmp_path / "base", tmp_path / "out", ROWS, False).ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "out"]


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSALS = {
    "output is base": (lambda p: shutil.rmtree(p / "adapter"), "is the base model itself"),
    "output exists": (
        lambda p: ((p / "out").mkdir(), (p / "out" / "notes.txt").write_text("mine")),
        "exists and is not empty",
    ),
    "no adapter": (
        lambda p: (p / "adapter" / "adapter_config.json").unlink(),
        "has no adapter_config.json",
    ),
    "dora": (
        lambda p: edit_json(p / "adapter" / "adapter_config.json", use_dora=True),
        r"not a plain LoRA adapter .*\['use_dora'\]",
    ),
    "quantised base": (
        lambda p: edit_json(
            p / "base" / "config.json",
            quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        ),
        "is a quantised checkpoint",
    ),
    "bin base": (
        lambda p: (p / "base" / "model.safetensors").rename(p / "base" / "pytorch_model.bin"),
        r"has no model.safetensors.*\['pytorch_model.bin'\]: convert it",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_why_and_change_nothing(tmp_path, case):
    make(tmp_path)
    spoil, message = REFUSALS[case]
    spoil(tmp_path)
    output = tmp_path / ("base" if case == "output is base" else "out")
    with pytest.raises(ValueError, match=message):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", output, ROWS, False)
    if case == "output exists":
        assert (output / "notes.txt").read_text() == "mine"


def test_an_adapter_of_other_rows_or_modules_is_refused(tmp_path):
    make(tmp_path)
    other = RowSelection([[3, 1, 41], *ROWS.rows[1:]], 48)
    with pytest.raises(ValueError, match="layer 0: the adapter changes row 40"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", other, False)
    with pytest.raises(ValueError, match="2 layers x 48 rows, this model has 3 x 48"):
        short = RowSelection(ROWS.rows[:2], 48)
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", short, False)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    foreign = {k.replace("down_proj", "up_proj"): v.clone() for k, v in tensors.items()}
    save_file(tensors | foreign, file)
    with pytest.raises(ValueError, match="3 modules that the rows file does not name.*up_proj"):
        merged(tmp_path)


def flip(tensors, key, *index):
    """Flip the lowest bit of one number."""
    tensors[key].view(torch.int32)[index] ^= 1


TAMPERINGS = {
    "frozen row": (
        lambda t: flip(t, "model.layers.1.mlp.down_proj.weight", 6, 3),
        "1 rows outside the selection changed, such as row 6",
    ),
    "norm": (lambda t: flip(t, "model.norm.weight", 0), "model.norm.weight changed"),
    "embedding": (
        lambda t: flip(t, "model.embed_tokens.weight", 5, 5),
        "model.embed_tokens.weight changed",
    ),
    "missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    "extra": (
        lambda t: t.update(extra=torch.zeros(2)),
        "extra is not in the base model",
    ),
    "dtype": (
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}),
        r"model.norm.weight is F16 \[48\], in the base F32",
    ),
}


@pytest.mark.parametrize("case", TAMPERINGS)
def test_verify_sees_every_tampering(tmp_path, case):
    make(tmp_path)
    merged(tmp_path)
    assert verify(tmp_path / "base", tmp_path / "out", ROWS, False).ok
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    change, message = TAMPERINGS[case]
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    rows = tmp_path / "adapter" / "loki_rows.json"
    arguments = ["verify", str(tmp_path / "base"), str(tmp_path / "out"), "--rows", str(rows)]
    result = CliRunner().invoke(loki, arguments)
    assert result.exit_code == 1
    import re

    assert re.search(message, result.output), result.output
    assert "FAILED: 1 differences" in result.output


def test_the_command_line_explains_mistakes_in_one_line(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 1")
    result = CliRunner().invoke(loki, ["merge", str(config)])
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and "it has no base_model" in result.output
    config.write_text(json.dumps({"base_model": "x", "output_dir": str(tmp_path)}))
    result = CliRunner().invoke(loki, ["merge", str(config)])
    assert "loki_rows.json' cannot be read" in result.output
    assert CliRunner().invoke(loki, ["verify", "a"]).exit_code == 2
