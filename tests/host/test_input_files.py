"""The files of a run: read once, before the model loads, and by training only."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers.axolotl import load
from safetensors.torch import load_file, save_file

from loki_plugin.host.files import Files
from loki_plugin.rows import RowSelection


@pytest.fixture
def no_model(monkeypatch):
    """A model must not be loaded."""
    from axolotl.loaders.model import ModelLoader

    def fail(self):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(ModelLoader, "load", fail)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"rows": "nowhere.json"}, "rows file 'nowhere.json' cannot be read"),
        ({"exclude": ["nowhere.json"]}, "rows file 'nowhere.json' cannot be read"),
        ({"calibration": {"source": "nowhere.jsonl"}}, "'nowhere.jsonl' does not exist"),
    ],
)
def test_a_missing_file_ends_training_before_the_model_loads(
    run_config, train, no_model, block, message
):
    run_config["loki"] = block
    with pytest.raises(ValueError, match=message):
        train(run_config)


@pytest.mark.parametrize("case", ["below a file", "a file", "not ours"])
def test_a_cache_that_cannot_be_written_is_named_before_the_model_loads(
    run_config, train, no_model, tmp_path, case
):
    (tmp_path / "file").write_text("mine")
    # Root may write into every folder but this one.
    place = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "cache"}
    folder = place.get(case, Path("/proc"))
    run_config["loki"]["cache_dir"] = str(folder)
    with pytest.raises(
        ValueError, match=f"cache folder '{folder}' cannot be written .*set `loki.cache_dir`"
    ):
        train(run_config)


AS_ANOTHER_USER = """
import os, sys
from pathlib import Path
from loki_plugin.analysing.calibration.prompts import Calibration
from loki_plugin.analysing.scores.cache import check_cache, open_log

os.umask(0o022)
folder, mark = Path(sys.argv[1]), dict.fromkeys(("config", "identity", "weights", "quantisation"))
open_log(folder, mark, Calibration([], 0, "x"), {}, 2, 8, "m")
folder.chmod(0o555)
if os.getuid() == 0:
    os.setuid(65534)
check_cache(str(folder))
open_log(folder, mark, Calibration([], 0, "x"), {}, 2, 8, "m")
print("served")
open_log(folder, mark, Calibration([], 0, "x"), {"steps": 3}, 2, 8, "m")
"""


def test_a_cache_that_can_only_be_read_serves_what_is_in_it():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        Path(folder).chmod(0o755)
        command = [sys.executable, "-c", AS_ANOTHER_USER, f"{folder}/cache"]
        done = subprocess.run(command, capture_output=True, text=True)
        Path(folder, "cache").chmod(0o755)
    assert done.stdout == "served\n"
    assert f"ValueError: the cache folder '{folder}/cache' cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Q?", "choices": ["a", "b", "c", "d"]}', "q.jsonl:1: missing field answer"),
        ("{", "q.jsonl:1: not JSON"),
        ("", "q.jsonl' is empty; it needs at least one record"),
    ],
)
def test_a_faulty_calibration_file_ends_training_before_the_model_loads(
    run_config, train, no_model, tmp_path, line, message
):
    path = tmp_path / "q.jsonl"
    path.write_text(line + "\n")
    run_config["loki"]["calibration"] = {"source": str(path)}
    with pytest.raises(ValueError, match=message):
        train(run_config)


def test_the_caller_of_axolotls_train_function_gets_the_same_faults(run_config, no_model):
    """Notebooks call `axolotl.train.train`, which is not preceded by the hook `load_datasets`."""
    from axolotl.integrations.base import PluginManager

    run_config["loki"] = {"calibration": {"source": "nowhere.jsonl"}}
    cfg = load(run_config)
    with pytest.raises(ValueError, match="'nowhere.jsonl' does not exist"):
        PluginManager.get_instance().pre_model_load(cfg)


def adapter_with_rows(folder: Path, first: int) -> str:
    RowSelection([range(first, first + 6)] * 3, 64).save(folder / "loki_rows.json")
    return str(folder)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"exclude": ["{dir}/other.json"]},
            r"trains 6 rows .*other.json.*\(layer 0: \[8, 9\]",
        ),
        ({"exclude": ["{dir}/deep.json"]}, "deep.json' has 4 layers, but the adapter .* has 3"),
        ({"rows": "{dir}/other.json"}, "other.json' are not the rows of lora_model_dir"),
    ],
)
def test_an_adapter_goes_on_with_its_own_rows_or_not_at_all(
    run_config, train, no_model, tmp_path, block, message
):
    RowSelection([range(8, 14)] * 3, 64).save(tmp_path / "other.json")
    RowSelection([[1]] * 4, 64).save(tmp_path / "deep.json")
    run_config["lora_model_dir"] = adapter_with_rows(tmp_path / "first", 4)
    run_config["loki"] = json.loads(json.dumps(block).replace("{dir}", str(tmp_path)))
    with pytest.raises(ValueError, match=message):
        train(run_config)


@pytest.mark.parametrize(
    ("had", "rank", "message"),
    [
        (2, None, r"has rank 2 in its down-projections, and this run is dense; .*\{rank: 2\}"),
        (2, 4, r"has rank 2 in its down-projections, and this run is of rank 4"),
        (6, 4, r"is dense, and this run has `loki.rank: 4`.*take `rank` out"),
        (6, None, None),
        (4, 4, None),
    ],
)
def test_an_adapter_goes_on_in_its_own_form(run_config, tmp_path, had, rank, message):
    folder = adapter_with_rows(tmp_path / "first", 4)
    names = [f"base_model.model.model.layers.{i}.mlp.down_proj" for i in range(3)]
    shapes = {"A": (had, 128), "B": (64, had)}
    stored = {f"{n}.lora_{x}.weight": torch.zeros(*s) for n in names for x, s in shapes.items()}
    save_file(stored, Path(folder) / "adapter_model.safetensors")
    run_config["lora_model_dir"] = folder
    run_config["loki"] = {"rank": rank}
    if message is None:
        assert Files.read(load(run_config)).goes_on
        return
    with pytest.raises(ValueError, match=message):
        Files.read(load(run_config))


@pytest.mark.parametrize(("rank", "fits"), [(8, False), (4, True), (None, False)])
def test_an_adapter_goes_on_with_its_own_rank_in_further_linears(run_config, tmp_path, rank, fits):
    name = "model.layers.0.self_attn.q_proj"
    folder = tmp_path / "first"
    RowSelection([range(4, 10)] * 3, 64, linears=[name]).save(folder / "loki_rows.json")
    stored = {f"base_model.model.{name}.lora_A.weight": torch.zeros(4, 64)}
    save_file(stored, folder / "adapter_model.safetensors")
    run_config["lora_model_dir"] = str(folder)
    run_config["loki"] = {"targets": ["q_proj", "down_proj"], "linear_rank": rank}
    if fits:
        assert Files.read(load(run_config)).goes_on
        return
    said = rf"has rank 4 in its further linears, and this run is of rank {rank or 16} there"
    with pytest.raises(ValueError, match=said + r".*\{linear_rank: 4\}"):
        Files.read(load(run_config))


def test_an_adapter_may_go_on_beside_disjoint_rows(run_config, tmp_path):
    RowSelection([range(20, 26)] * 3, 64).save(tmp_path / "other.json")
    run_config["lora_model_dir"] = adapter_with_rows(tmp_path / "first", 4)
    run_config["loki"] = {"exclude": [str(tmp_path / "other.json")]}
    files = Files.read(load(run_config))
    assert [r.tolist() for r in files.rows.rows] == [list(range(4, 10))] * 3


def test_an_adapter_without_rows_is_refused(run_config, tmp_path):
    run_config["lora_model_dir"] = str(tmp_path)
    with pytest.raises(ValueError, match="has no loki_rows.json, so it cannot be told") as error:
        Files.read(load(run_config))
    said = "copy the rows file of its run there, and with it loki_directions.safetensors where that"
    assert said in str(error.value)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_a_base_that_rows_cannot_be_merged_into_is_refused(
    run_config, train, no_model, base, tmp_path, method
):
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    for file in base.glob("*.json"):
        (quantised / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    run_config["base_model"] = str(quantised)
    with pytest.raises(ValueError, match=f"is quantised with '{method}': rows cannot be merged"):
        train(run_config)


@pytest.fixture
def trained(run_config, train, questions, tmp_path):
    """A run whose calibration file and excluded rows were deleted when it had read them."""
    from loki_plugin.plugin import LokiPlugin

    calibration, other = tmp_path / "questions.jsonl", tmp_path / "other.json"
    calibration.write_text(questions.read_text())
    RowSelection([[0]] * 3, 64).save(other)
    run_config["loki"] |= {"calibration": {"source": str(calibration)}, "exclude": [str(other)]}
    read = LokiPlugin.pre_model_load

    def pre_model_load(self, cfg):
        read(self, cfg)
        calibration.unlink(missing_ok=True)  # plugins of earlier tests are called too
        other.unlink(missing_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LokiPlugin, "pre_model_load", pre_model_load)
        train(run_config)
    assert not calibration.exists() and not other.exists()
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_config))
    return config


@pytest.mark.slow
def test_after_training_no_command_needs_the_files(trained, run_config, monkeypatch, base):
    """Training itself reads them once; merge-lora, evaluate and inference not at all."""
    import io
    import sys

    from axolotl.cli import evaluate, inference, merge_lora

    import loki_plugin.host.run as run

    def analyse(*args):
        raise AssertionError("nothing is to be analysed")

    out = Path(run_config["output_dir"])
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    monkeypatch.setattr(run.Run, "start", analyse)
    merge_lora.do_cli(str(trained))
    before, after = (
        load_file(next(f.glob("model*1-of*.safetensors"))) for f in (base, out / "merged")
    )
    assert before.keys() == after.keys()

    losses = {}
    for name, more in (("base", {}), ("adapter", {"lora_model_dir": str(out)})):
        evaluate.do_cli(str(trained), **more)
        summary = (out / "eval_summary.csv").read_text()
        losses[name] = float(summary.split("loss,")[1].split(",")[0])
    assert losses["adapter"] < losses["base"] - 0.05

    seen = []
    load_both = inference.load_model_and_tokenizer

    def load_and_see(**kwargs):
        model, *rest = load_both(**kwargs)
        seen.append(model)
        return model, *rest

    monkeypatch.setattr(inference, "load_model_and_tokenizer", load_and_see)
    ids = torch.arange(3, 20)[None]
    answers = []
    for more in ({}, {"lora_model_dir": str(out)}):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        inference.do_cli(str(trained), **more)
        with torch.no_grad():
            answers.append(seen[-1].eval()(input_ids=ids).logits)
    with torch.no_grad(), seen[-1].disable_adapter():
        assert torch.equal(seen[-1](input_ids=ids).logits, answers[0])
    assert not torch.allclose(answers[0], answers[1], atol=1e-3)


def copied(base: Path, target: Path, weights: bool = True) -> Path:
    target.mkdir()
    for file in base.glob("*"):
        if weights or "safetensors" not in file.name:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_base_without_safetensors_is_refused(run_config, train, no_model, base, tmp_path):
    old = copied(base, tmp_path / "old", weights=False)
    torch.save({}, old / "pytorch_model.bin")
    run_config["base_model"] = str(old)
    message = "could not be merged into it afterwards: .*has no model.safetensors.*pytorch_model"
    with pytest.raises(ValueError, match=message):
        train(run_config)


def test_a_base_whose_down_projections_have_other_keys_is_refused(
    run_config, train, no_model, base, tmp_path
):
    """As in wrappers that store their text model under names of their own."""
    from safetensors.torch import save_file

    other = copied(base, tmp_path / "other", weights=False)
    (other / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = {}
    for file in base.glob("*.safetensors"):
        tensors |= {n.replace("down_proj", "w2"): t for n, t in load_file(file).items()}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    run_config["base_model"] = str(other)
    with pytest.raises(ValueError, match="afterwards: .*down_proj.weight matches 0 tensors"):
        train(run_config)


def test_calibration_is_spelled_as_axolotls_datasets_are(run_config, tmp_path):
    """The block goes through Axolotl's own schema, and comes out of it as a run reads it."""
    said = [{"from": "asker", "value": "Is it cold?"}, {"from": "gpt", "value": "Yes."}]
    (tmp_path / "said.json").write_text(
        json.dumps(
            [{"turns": said, "fns": None}] * 3
            + [{"turns": said, "fns": [{"type": "function", "function": {"name": "f"}}]}]
        )
    )
    run_config["loki"]["calibration"] = {
        "source": str(tmp_path / "said.json"),
        "split": "train[1:]",
        "field_messages": "turns",
        "field_tools": "fns",
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles": {"user": ["asker"], "assistant": ["gpt"]},
    }
    records = Files.read(load(run_config)).inputs.records
    assert [[m["role"] for m in r.messages] for r in records] == [["user", "assistant"]] * 3
    assert [bool(r.tools) for r in records] == [False, False, True]
