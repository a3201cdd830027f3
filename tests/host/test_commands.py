"""Axolotl's other commands with the plugin listed, and several runs in one process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from loki_plugin.rows import RowSelection

pytestmark = pytest.mark.slow


@pytest.fixture
def config_file(run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run_config | {"max_steps": 2}))
    return path


def test_preprocess_needs_no_calibration_and_its_data_train(
    run_config, config_file, train, monkeypatch
):
    from axolotl.cli import preprocess
    from axolotl.loaders.model import ModelLoader

    run_config |= {"max_steps": 2}
    whole = run_config["loki"]
    config_file.write_text(
        yaml.safe_dump(run_config | {"loki": whole | {"calibration": {"source": "later.jsonl"}}})
    )
    monkeypatch.delenv("AXOLOTL_IS_PREPROCESS", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(ModelLoader, "load", lambda self: pytest.fail("the model was loaded"))
        preprocess.do_cli(str(config_file))
    monkeypatch.delenv("AXOLOTL_IS_PREPROCESS", raising=False)
    prepared = sorted(p.name for p in Path(run_config["dataset_prepared_path"]).iterdir())
    assert prepared
    train(run_config)
    assert prepared == sorted(p.name for p in Path(run_config["dataset_prepared_path"]).iterdir())


def test_a_sweep_over_loki_settings_runs_each_of_them(run_config, config_file, tmp_path):
    """In one process, as `axolotl train CONFIG --sweep SWEEP --launcher python` does."""
    from axolotl.cli.train import do_cli
    from axolotl.cli.utils.train import generate_config_files

    sweep = tmp_path / "sweep.yaml"
    blocks = [run_config["loki"] | more for more in ({"quota": 5}, {"quota": 20, "rank": 2})]
    sweep.write_text(yaml.safe_dump({"loki": blocks}))
    found = {}
    for file, _ in generate_config_files(str(config_file), str(sweep)):
        do_cli(file)
        written = yaml.safe_load(Path(file).read_text())
        adapter = json.loads((Path(written["output_dir"]) / "adapter_config.json").read_text())
        counts = RowSelection.load(Path(written["output_dir"]) / "loki_rows.json").counts
        found[written["loki"]["quota"]] = (adapter["r"], counts)
    assert found == {5: (3, [3] * 3), 20: (2, [12] * 3)}


def test_a_plain_lora_run_after_a_loki_run_is_plain(run_config, train, tmp_path):
    """The plugin outlives its run: what follows in the process is as if it had never been."""
    plain = {k: v for k, v in run_config.items() if k not in ("plugins", "loki")}
    plain |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "max_steps": 2}
    plain |= {"lora_target_modules": ["down_proj"]}
    plain |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    adapters = []
    for name in ("before", "after"):
        train(plain | {"output_dir": str(tmp_path / name)})
        assert not list((tmp_path / name).glob("loki*"))
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
        if name == "before":
            train(run_config | {"max_steps": 2})
    assert adapters[0].keys() == adapters[1].keys()
    assert all((adapters[0][k] == adapters[1][k]).all() for k in adapters[0])
