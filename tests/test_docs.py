"""What README and docs say is what the package accepts and what the results hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from benchmarks.real import front
from loki_plugin.args import LokiConfig
from loki_plugin.choices import ALL, SELF
from loki_plugin.cli import loki
from loki_plugin.host import settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")


def blocks_of(text: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)


def test_the_full_block_is_every_field_with_its_default():
    (block,) = blocks_of((ROOT / "docs" / "fields.md").read_text(encoding="utf-8"))
    full = yaml.safe_load(block)["loki"]
    assert LokiConfig(**full) == LokiConfig()
    assert full.keys() == LokiConfig.model_fields.keys() - {"form"}  # internal
    for part in ("calibration", "attribution", "protect"):
        assert full[part].keys() == type(getattr(LokiConfig(), part)).model_fields.keys()


def test_the_block_in_the_readme_is_a_protected_run_in_six_lines():
    (block,) = blocks_of(README)
    assert len(block.splitlines()) == 6
    short = yaml.safe_load(block)
    settings.prepare(short)
    assert short["adapter"] == "qlora" and short["lora_r"] == 16
    block = LokiConfig(**short["loki"])
    protect = block.protect
    assert block.targets == ALL and block.quota == 100 and not block.needs_scores
    assert protect.auto and protect.anchor and protect.soft and protect.inputs
    assert protect.text == SELF


def section(title: str) -> str:
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def test_the_front_page_is_short():
    assert len(README.splitlines()) <= 150
    assert len(re.findall(r"^- ", section("Limits"), re.M)) == 10
    (commands,) = re.findall(r"```\n(.*?)```", section("Two commands"), re.DOTALL)
    assert [c.split("  ")[0] for c in commands.splitlines()] == ["make demo", "make test"]
    table = re.findall(r"^\|.*\|$", section("What is kept"), re.M)
    assert len(table) <= 2 + 6 and all(line.count("|") <= 4 + 1 for line in table)


@pytest.mark.parametrize("page", front.PAGES)
def test_what_a_page_says_of_real_models_is_read_from_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.search("<!-- real:(table|demo) -->", text)
    again = front.filled(text, page, front.kept())
    assert text == again, "run `python -m benchmarks.real report`"


def test_every_command_in_the_readme_and_the_guide_exists():
    commands = re.findall(r"`loki ([a-z]+(?: (?:list|clear))?)", README + GUIDE)
    assert {c.split()[0] for c in commands} >= set(loki.commands)
    for command in set(commands):
        result = CliRunner().invoke(loki, [*command.split(), "--help"])
        assert result.exit_code == 0, (command, result.output)


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_file_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:docs|tests|benchmarks|example_configs)/[\w./-]+)`", text)
    missing = [n for n in named if not (ROOT / n).exists()]
    assert not missing


def test_the_map_shows_the_rooms_that_there_are():
    """Every folder of the package, and no module that is gone."""
    text = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    tree = text.split("```\n")[1]
    package = ROOT / "loki_plugin"
    there = {p.name for p in package.rglob("*.py")} | {p.name for p in (ROOT / "docs").glob("*.py")}
    gone = set(re.findall(r"\b\w+\.py\b", tree)) - there
    assert not gone
    rooms = {p.parent.name for p in package.rglob("__init__.py")}
    missing = {room for room in rooms if f"{room}/" not in tree}
    assert not missing
    journeys = re.findall(r"^## (From .*)$", text, re.M)
    assert len(journeys) == 3


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


def test_no_page_names_a_folder_of_the_machine_that_wrote_it():
    texts = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    results = (f for f in (ROOT / "benchmarks" / "results").iterdir() if f.suffix != ".png")
    found = {
        f"{path.name}: {place}"
        for path in [*texts, *results]
        for place in re.findall(
            r"(?<![\w.])/(?:data|home|mnt|opt|root|tmp|work)/[\w./-]+", path.read_text("utf-8")
        )
    }
    assert not found
