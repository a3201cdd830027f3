"""What README and example configurations say is what the package accepts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from loki_plugin.args import LokiConfig
from loki_plugin.cli import loki
from loki_plugin.host import settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(b) for b in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]


def test_the_full_block_in_the_readme_is_every_field_with_its_default():
    (full,) = [b["loki"] for b in BLOCKS if "report" in b["loki"]]
    assert LokiConfig(**full) == LokiConfig()
    assert full.keys() == LokiConfig.model_fields.keys() - {"form"}  # internal
    for part in ("calibration", "attribution", "protect"):
        assert full[part].keys() == type(getattr(LokiConfig(), part)).model_fields.keys()


def test_the_short_block_in_the_readme_is_a_run():
    (short,) = [b for b in BLOCKS if "plugins" in b]
    settings.prepare(short)
    assert short["adapter"] == "qlora"


def test_every_command_in_the_readme_exists():
    commands = re.findall(r"`loki ([a-z]+(?: (?:list|clear))?)", README)
    assert len(set(commands)) >= 5
    for command in commands:
        result = CliRunner().invoke(loki, [*command.split(), "--help"])
        assert result.exit_code == 0, (command, result.output)


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:docs|tests|benchmarks|example_configs)/[\w./-]+)`", text)
    missing = [n for n in named if not (ROOT / n).exists()]
    assert not missing


WITHOUT_AXOLOTL = """
import sys
sys.modules["axolotl"] = sys.modules["bitsandbytes"] = None
import importlib, pkgutil
import loki_plugin
for module in pkgutil.walk_packages(loki_plugin.__path__, "loki_plugin."):
    if module.name != "loki_plugin.plugin":
        importlib.import_module(module.name)
import torch
from helpers.families import tiny
from loki_plugin import attribute, implant, select_rows
model = tiny("llama")
rows = select_rows(attribute(model, torch.arange(1, 9)[None]), 20)
implant(model, rows)(input_ids=torch.arange(1, 9)[None]).logits.sum().backward()
print("ran")
"""


@pytest.mark.slow
def test_the_stages_import_and_run_without_axolotl_and_bitsandbytes():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_AXOLOTL],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0 and done.stdout.split()[-1:] == ["ran"], done.stderr
