"""What README and example configurations say is what the package accepts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from loki_plugin import carrier
from loki_plugin.args import LokiConfig
from loki_plugin.cli import loki

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]


def test_the_full_block_in_the_readme_is_every_field_with_its_default():
    (full,) = [b["loki"] for b in BLOCKS if "report" in b["loki"]]
    assert LokiConfig(**full) == LokiConfig()
    assert full.keys() == LokiConfig.model_fields.keys()
    for part in ("calibration", "attribution"):
        assert full[part].keys() == type(getattr(LokiConfig(), part)).model_fields.keys()


def test_the_short_block_in_the_readme_is_a_run():
    (short,) = [b for b in BLOCKS if "plugins" in b]
    carrier.prepare(short)
    assert short["adapter"] == "qlora"


@pytest.mark.parametrize("path", sorted((ROOT / "example_configs").glob("*.yaml")), ids=str)
def test_example_configurations_are_accepted(path, tmp_path, monkeypatch):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert config["plugins"] == ["loki"]
    for rows in config["loki"].get("exclude", []):  # made by an earlier run
        monkeypatch.chdir(tmp_path)
        (tmp_path / rows).parent.mkdir(parents=True)
        (tmp_path / rows).write_text("[[1], [2]]")
    carrier.prepare(config)
    assert config["adapter"] in ("lora", "qlora")


def test_every_command_in_the_readme_exists():
    commands = re.findall(r"`loki ([a-z]+(?: (?:list|clear))?)", README)
    assert len(set(commands)) >= 5
    for command in commands:
        result = CliRunner().invoke(loki, [*command.split(), "--help"])
        assert result.exit_code == 0, (command, result.output)
