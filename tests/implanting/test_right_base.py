"""Is it the base that the rows were made on, and what of it is fetched and left as it was?"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from helpers.families import FAMILIES, tiny
from helpers.merging import POSITIONS, make, merged
from safetensors.torch import load_file, save_file

from loki_plugin import RowSelection
from loki_plugin.cli import loki
from loki_plugin.implanting import checkpoint
from loki_plugin.implanting.checkpoint import Base, open_checkpoint
from loki_plugin.implanting.identity import check_base
from loki_plugin.implanting.merge import merge_adapter, merge_adapters
from loki_plugin.implanting.verify import verify
from loki_plugin.model.fingerprint import fingerprint


def change(folder, key, index, by=1e-3):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[key][index] += by
    save_file(tensors, file, {"format": "pt"})


def test_the_merged_rows_file_keeps_fingerprint_and_origin(tmp_path):
    rows = make(tmp_path)
    merged(tmp_path, rows)
    kept = RowSelection.load(tmp_path / "out" / "loki_rows.json")
    assert kept == rows and kept.hidden_size == 48
    assert kept.fingerprint == rows.fingerprint
    assert {k: v for k, v in kept.made.items() if k != "merge"} == rows.made
    assert kept.made["merge"]["base"] == "architecture and every weight"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_streamed_fingerprint_is_that_of_the_loaded_model(tmp_path, family):
    model = tiny(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        said = check_base(open_checkpoint(tmp_path), fingerprint(loaded), False)
        # transformers stores most routed experts one by one; Llama 4's as the model holds them, and
        # Granite's under other names. OLMo hybrid's convolutions are stored apart.
        fused = any("experts" in n and p.dim() == 3 for n, p in model.named_parameters())
        whole = family == "llama4" or family.startswith("granitemoe")
        if (fused and not whole) or family == "olmo_hybrid":
            assert said.startswith("architecture only: the checkpoint stores model.layers.")
        else:
            assert said == "architecture and every weight"


WRONG = {
    "fine-tune": (
        lambda b: change(b, "model.layers.1.mlp.up_proj.weight", (3, 5)),
        "weights have other values",
    ),
    "embedding": (
        lambda b: change(b, "model.embed_tokens.weight", (3, 5), 1.0),
        "embeddings or norms have other values",
    ),
    "architecture": (
        lambda b: (b / "config.json").write_text(
            (b / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-5')
        ),
        "its architecture differs",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_another_base_of_the_same_shape_is_refused(tmp_path, case):
    rows = make(tmp_path)
    right = tmp_path / "right"
    shutil.copytree(tmp_path / "base", right)
    merged(tmp_path, rows)
    spoil, message = WRONG[case]
    before = (tmp_path / "base" / "config.json").read_text()
    spoil(tmp_path / "base")
    if case == "architecture":
        assert before != (tmp_path / "base" / "config.json").read_text()
    with pytest.raises(ValueError, match=f"made on another model.*{message}"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "two", rows, False)
    assert not (tmp_path / "two").exists()
    report = verify(tmp_path / "base", tmp_path / "base", rows, False)
    assert any(message in fault for fault in report.faults)
    assert verify(right, tmp_path / "out", rows, False).ok


def test_a_quantised_analysis_compares_what_quantisation_leaves_alone(tmp_path):
    rows = make(tmp_path)
    mark = rows.fingerprint | {"quantisation": "bnb-nf4-64", "weights": "of 4 bits"}
    folder = tmp_path / "base"
    said = check_base(open_checkpoint(folder), mark, False)
    assert said == "architecture, embeddings, norms and biases"
    change(folder, "model.norm.weight", 3, 1.0)
    with pytest.raises(ValueError, match="embeddings or norms"):
        check_base(open_checkpoint(folder), mark, False)


def test_fingerprints_of_version_0_1_1_are_known_from_a_cpu_and_from_a_gpu(tmp_path):
    from transformers import AutoModelForCausalLM

    make(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for block in (1 << 15, 1 << 24):
        mark = fingerprint(model, block)
        del mark["half"]
        found = open_checkpoint(tmp_path / "base")
        assert check_base(found, mark, False) == "architecture and every weight"
        with pytest.raises(ValueError, match="weights have other values"):
            check_base(found, mark | {"weights": "x"}, False)


def test_rows_without_a_fingerprint_merge_and_it_is_said(tmp_path):
    make(tmp_path)
    bare = RowSelection(POSITIONS)
    assert merged(tmp_path, bare).base == "not compared: the rows file holds no fingerprint"
    text = verify(tmp_path / "base", tmp_path / "out", bare, False).text()
    assert f"base: {tmp_path / 'base'}; compared with the rows file: not compared" in text


def test_verify_compares_the_configuration(tmp_path):
    rows = make(tmp_path)
    merged(tmp_path, rows)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_cache": False, "eos_token_id": 5}))
    assert verify(tmp_path / "base", tmp_path / "out", rows, False).ok
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    report = verify(tmp_path / "base", tmp_path / "out", rows, False)
    assert report.faults == ["config.json: rms_norm_eps is 0.5, in the base 1e-06"]
    path.write_text(json.dumps(config | {"vocab_size": 98}))
    report = verify(tmp_path / "base", tmp_path / "out", rows, False)
    assert report.faults == ["config.json: vocab_size is 98, in the base 97"]


def test_the_command_proves_what_it_wrote_and_fails_if_it_cannot(tmp_path, monkeypatch):
    from loki_plugin.implanting import proven

    make(tmp_path)
    config = tmp_path / "run.yaml"
    run = {"base_model": str(tmp_path / "base"), "output_dir": str(tmp_path / "adapter")}
    config.write_text(json.dumps(run))

    def spoiled(*args):
        report = merge_adapters(*args)
        change(report.output, "model.norm.weight", 0)
        return report

    with monkeypatch.context() as patch:
        patch.setattr(proven, "merge_adapters", spoiled)
        result = CliRunner().invoke(loki, ["merge", str(config)])
    assert result.exit_code == 1
    assert "do not use the merged model" in result.output
    assert "model.norm.weight changed" in result.output
    shutil.rmtree(tmp_path / "adapter" / "merged")
    result = CliRunner().invoke(loki, ["merge", str(config)])
    assert result.exit_code == 0, result.output
    assert "OK: nothing outside" in result.output and "rounded away" in result.output


def test_revision_and_code_of_the_run_are_honoured(tmp_path, monkeypatch):
    import huggingface_hub

    make(tmp_path)
    calls = []

    def snapshot_download(name, **kwargs):
        calls.append({"name": name, **kwargs})
        return str(tmp_path / "base")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    run = {"base_model": "some/model", "revision_of_model": "abc", "trust_remote_code": True}
    base = Base.of_run(run | {"overrides_of_model_config": {"rms_norm_eps": 0.5}})
    assert open_checkpoint(base).folder == tmp_path / "base"
    assert open_checkpoint(base).model.config.rms_norm_eps == 0.5
    assert base.trust_remote_code and len(calls) == 4
    assert all((asked["name"], asked["revision"]) == ("some/model", "abc") for asked in calls)
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "modeling_own.py",
        "tokenizer.model.v3",
        "additional_chat_templates/tool_use.jinja",
    ]
    unwanted = [
        "original/consolidated.00.pth",
        "original/params.json",
        "model-Q4.gguf",
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "pytorch_model.bin",
        "onnx/model.onnx",
    ]
    chosen = [
        file
        for asked in calls[:2]
        for file in huggingface_hub.utils.filter_repo_objects(
            wanted + unwanted,
            allow_patterns=asked["allow_patterns"],
            ignore_patterns=asked.get("ignore_patterns"),
        )
    ]
    assert chosen == wanted


def test_code_of_the_checkpoint_runs_only_where_the_run_trusts_it(tmp_path, monkeypatch):
    from transformers import AutoConfig

    make(tmp_path)
    seen = []
    load = AutoConfig.from_pretrained

    def from_pretrained(*args, **kwargs):
        seen.append(kwargs.get("trust_remote_code"))
        return load(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "AutoConfig", AutoConfig, raising=False)
    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    for trust in (False, True):
        open_checkpoint(Base(tmp_path / "base", trust_remote_code=trust))
    assert seen == [False, True]


def test_a_run_with_overrides_is_verified_with_the_merged_rows_file(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = make(tmp_path)
    overrides = {"rms_norm_eps": 0.5}
    config = AutoConfig.from_pretrained(tmp_path / "base", **overrides)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=config)
    rows = RowSelection(rows.rows, 48, fingerprint(model))
    base = Base(tmp_path / "base", overrides=overrides)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out", rows, False)
    kept = RowSelection.load(tmp_path / "out" / "loki_rows.json")
    report = verify(tmp_path / "base", tmp_path / "out", kept, False)
    assert report.ok, report.text()
    report = verify(tmp_path / "base", tmp_path / "out", rows, False)
    assert not report.ok and "overrides_of_model_config" in report.text()
    # Of an earlier version, whose merged models did not say it themselves.
    shutil.copyfile(tmp_path / "base" / "config.json", tmp_path / "out" / "config.json")
    assert verify(tmp_path / "base", tmp_path / "out", kept, False).ok
    # Another value than either has.
    said = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps(said | {"rms_norm_eps": 0.4}))
    report = verify(tmp_path / "base", tmp_path / "out", kept, False)
    assert report.faults == ["config.json: rms_norm_eps is 0.4, in the base 0.5"]


@pytest.mark.parametrize(
    "overrides",
    [
        {"rms_norm_eps": 0.5},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ],
    ids=["number", "rope"],
)
def test_a_merged_model_computes_what_trained_under_overrides(tmp_path, overrides):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = make(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path / "base")
    for key, value in overrides.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", config=config)
    rows = RowSelection(rows.rows, 48, fingerprint(model))
    base = Base(tmp_path / "base", overrides=overrides)
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "out", rows, False)
    assert f"overrides_of_model_config ({', '.join(overrides)})" in report.text()
    kept = RowSelection.load(tmp_path / "out" / "loki_rows.json")
    proof = verify(tmp_path / "base", tmp_path / "out", kept, False)
    assert proof.ok, proof.text()
    trained = PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted, found, without = (m(input_ids=ids).logits for m in (trained, merged, plain))
    assert torch.allclose(found, wanted, atol=1e-4) and not torch.allclose(
        without, wanted, atol=0.1
    )
