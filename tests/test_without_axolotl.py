"""The wheel in an environment that holds what it requires, and no Axolotl."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from helpers import wheels
from helpers.without_axolotl import asks_for_it
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Imported where they are there, or where somebody asks for what only they can do.
OPTIONAL = {"axolotl", "flash_attn", "h5py", "lm_eval", "wandb"}
NEEDS = "needs Axolotl, which is not installed here: pip install 'loki_plugin[axolotl]'"


def third_party() -> set[str]:
    found: set[str] = set()
    for path in (ROOT / "loki_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - OPTIONAL


def test_every_import_comes_with_a_dependency():
    """Also those that Axolotl would bring; what a dependency itself requires counts."""
    from importlib.metadata import requires

    wanted = [Requirement(r).name for r in PROJECT["dependencies"]]
    near = [Requirement(r) for name in wanted for r in requires(name) or []]
    there = {w.lower().replace("_", "-") for w in wanted}
    there |= {r.name.lower().replace("_", "-") for r in near if r.marker is None}
    names = packages_distributions()
    missing = {
        module
        for module in third_party()
        if not {d.lower().replace("_", "-") for d in names[module]} & there
    }
    assert not missing and "axolotl" not in there


STORY = """
import sys
from importlib.util import find_spec
from click.testing import CliRunner
base, out, prompts, config = sys.argv[1:]
assert find_spec("axolotl") is None
import loki_plugin, torch
from loki_plugin import attribute, implant, input_directions, select_rows
from loki_plugin.cli import loki
from transformers import AutoModelForCausalLM
print("package:", loki_plugin.__file__)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
ids = torch.randint(5, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
rows = select_rows(attribute(model, ids), quota=10)
tuned = implant(model, rows, protect=input_directions(model, ids, directions=8))
training = [p for p in tuned.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(training, lr=0.01)
for _ in range(3):
    loss = tuned(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
tuned.save_pretrained(out)
def say(code, *words):
    done = CliRunner().invoke(loki, list(words))
    print("$", *words, "\\n", done.output)
    assert done.exit_code == code, repr(done.exception)
say(0, "merge", config)
say(0, "verify", base, f"{out}/merged", "--rows", f"{out}/loki_rows.json")
say(0, "verify", base, out, "--rows", f"{out}/loki_rows.json")
say(0, "forgetting", config, "--prompts", prompts)
say(0, "write", base, "--output", f"{out}/own.jsonl", "--count", "2", "--tokens", "4")
say(0, "doctor", "--dir", f"{out}/cache")
say(1, "doctor", config)
say(1, "analyse", config)
say(1, "estimate", config)
say(1, "forgetting", config, "--tasks", "hellaswag")
try:
    loki_plugin.LokiPlugin
except ImportError as error:
    print("plugin:", error)
"""


def run(python: Path, *words: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(python), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The Python of an environment with the wheel, what it requires, TRL, and pytest."""
    folder = tmp_path_factory.mktemp("without")
    there = wheels.link(folder / "packages", [*PROJECT["dependencies"], "trl", "pytest"])
    assert "peft" in there and "axolotl" not in there
    return wheels.environment(folder / "venv", wheels.build(folder), folder / "packages")


@pytest.mark.slow
def test_the_stages_and_the_commands_run(installed, base, questions, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"base_model": str(base), "output_dir": str(tmp_path / "out")}))
    said = run(installed, "-c", STORY, base, tmp_path / "out", questions, config, cwd=tmp_path)
    package, plugin = (
        next(line for line in said.splitlines() if line.startswith(f"{name}:"))
        for name in ("package", "plugin")
    )
    assert "site-packages" in package and str(installed.parents[1]) in package
    assert plugin == f"plugin: LokiPlugin {NEEDS}"
    assert said.count("OK: ") >= 2
    assert "axolotl       is not installed; the stages" in said
    assert "is there, but for Axolotl, which only the plugin needs" in said
    for command in ("`loki analyse`", "`loki estimate`", "`loki doctor` with a CONFIG"):
        assert f"Error: {command} {NEEDS}\n" in said
    assert "Error: --tasks hellaswag needs lm-eval, which is not installed here: pip" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_trl_trains_it(installed, tmp_path):
    """SFT and DPO, by the tests that run beside Axolotl too."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: takes seconds\n")
    said = run(
        installed,
        *("-m", "pytest", "-q", "-c", tmp_path / "pytest.ini", "-p", "no:cacheprovider"),
        *("-k", "dense and (sft or fresh)", ROOT / "tests" / "implanting" / "test_trl.py"),
        cwd=tmp_path,
    )
    assert "2 passed" in said, said


def test_only_what_may_know_axolotl_is_excused(monkeypatch):
    """In an environment without it (helpers/without_axolotl.py), a stage that asks is a fault."""
    monkeypatch.setattr("helpers.without_axolotl.find_spec", lambda name: None)

    def excused(file: str, module: str) -> bool:
        """Is it, when `file` has imported `module` in vain?"""
        error = ModuleNotFoundError(f"No module named '{module}'", name=module)
        with pytest.raises(ImportError) as caught:
            exec(compile("raise error", str(ROOT / file), "exec"), {"error": error})
        return asks_for_it(caught.value)

    assert excused("tests/analysing/x.py", "axolotl.cli")
    assert excused("loki_plugin/host/run.py", "axolotl")
    assert not excused("loki_plugin/implanting/adapter.py", "axolotl")
    assert not excused("tests/x.py", "x")
