"""What Axolotl does since 0.20 and 0.21, played to the installed one where that is older."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from axolotl.integrations import base as axolotl
from axolotl.loaders.model import ModelLoader
from peft.tuners.lora import LoraLayer
from torch import nn

from loki_plugin.host.listed import OWN_NAME, wanted
from loki_plugin.plugin import LokiPlugin


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 3], ids=["dense", "low-rank"])
def test_an_adapter_that_is_drawn_again_after_our_hook_still_starts_as_the_base(
    run_config, train, monkeypatch, rank
):
    """0.20 seeds every lora_A by its module's name, after `post_lora_load`."""
    drawn = []

    def draw(loader):
        for module in loader.model.modules():
            if isinstance(module, LoraLayer):
                nn.init.kaiming_uniform_(module.lora_A["default"].weight)
                drawn.append(module)

    monkeypatch.setattr(ModelLoader, "_materialize_trainable_meta_params", draw)
    run_config |= {"val_set_size": 0.2, "eval_steps": 1, "max_steps": 1}
    run_config["loki"]["rank"] = rank
    train(run_config)
    assert len(drawn) == 3
    report = json.loads((Path(run_config["output_dir"]) / "loki_report.json").read_text())
    start, after = report["forgetting_while_training"]["path"]
    assert start["step"] == 0 and start["kl"] == 0 < after["kl"]


@pytest.fixture
def loads_by_itself(monkeypatch):
    """0.21 registers what the entry points name before it reads a configuration."""
    monkeypatch.setattr(axolotl, "get_builtin_plugins", lambda: (OWN_NAME,), raising=False)
    manager = axolotl.PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", dict(manager.plugins))
    manager.plugins.pop(OWN_NAME, None)
    manager.register(OWN_NAME)
    return manager.plugins


@pytest.mark.parametrize(
    "cfg", [{"loki": {}}, {"adapter": "loki"}, {"loki": {}, "plugins": ["a.B"]}]
)
def test_where_axolotl_loads_us_unasked_a_block_of_ours_is_enough(loads_by_itself, cfg):
    """It would pass the validation, and train plain LoRA."""
    assert LokiPlugin.of(cfg) is loads_by_itself[OWN_NAME]


@pytest.mark.parametrize("cfg", [{}, {"adapter": "lora"}, {"loki": None, "plugins": ["a.B"]}])
def test_whoever_does_not_ask_for_us_is_left_alone(loads_by_itself, cfg):
    assert LokiPlugin.of(cfg) is None


@pytest.mark.parametrize("name", ["loki", "loki_plugin.LokiPlugin", "loki_plugin:LokiPlugin"])
def test_of_two_names_the_listed_one_acts(loads_by_itself, name):
    listed = LokiPlugin()
    loads_by_itself[name.replace(":", ".")] = listed
    cfg = {"plugins": [name], "loki": {}}
    assert LokiPlugin.of(cfg) is listed
    asked = [plugin.get_input_args() for plugin in loads_by_itself.values()]
    assert asked.count("loki_plugin.args.LokiArgs") == 1


def test_an_older_axolotl_loads_what_is_listed_and_nothing_else(monkeypatch):
    monkeypatch.delattr(axolotl, "get_builtin_plugins", raising=False)
    assert wanted({"loki": {}, "plugins": ["a.B"]}) == ["a.B"]
    assert wanted({"adapter": "loki"}) == []


def test_plugins_are_told_of_our_merge_where_axolotl_tells_them_of_its_own(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from axolotl.cli import merge_lora

    from loki_plugin.host import patches

    told = []
    monkeypatch.setattr(
        axolotl.PluginManager,
        "post_lora_merge",
        lambda manager, cfg, adapter, output: told.append((adapter, output)),
        raising=False,
    )
    merged = SimpleNamespace(output=tmp_path / "merged")
    monkeypatch.setattr("loki_plugin.implanting.proven.merge_run", lambda *given: (merged, None))
    monkeypatch.setattr("loki_plugin.picturing.card.write_merged_card", lambda *given: None)
    cfg = SimpleNamespace(
        loki={}, lora_model_dir="adapter", output_dir=str(tmp_path), base_model="base"
    )
    new = patches.take_over_merge()  # an earlier run of this process may have taken it over
    try:
        merge_lora.do_merge_lora(cfg=cfg)
    finally:
        if new:
            patches.give_back_merge()
    assert told == [("adapter", str(tmp_path / "merged"))]
