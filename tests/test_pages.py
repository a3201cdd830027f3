"""The pages say what the package does: generated ones are current, and what they quote is true."""

from __future__ import annotations

import ast
import contextlib
import copy
import csv
import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version

import click
import pytest
import torch
import yaml
from axolotl.cli.main import cli as axolotl
from helpers import pages
from helpers.pages import ROOT, TEXTS
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import LlamaConfig, LlamaForCausalLM

from loki_plugin.args import LokiConfig
from loki_plugin.cli import loki
from loki_plugin.host import settings


def each(*kinds: str) -> list:
    """Every fenced block of these kinds, as test parameters."""
    return [pytest.param(b, id=f"{b.page}:{b.number}") for b in pages.blocks(*kinds)]


# --- pages that are written by docs/generate.py ---


@pytest.mark.parametrize("page", ["fields.md", "options.md", "commands.md", "python.md"])
def test_the_page_is_what_the_package_says(page):
    written = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"][page]()
    assert TEXTS[f"docs/{page}"] == written, "run `python docs/generate.py`"


def test_every_field_has_a_description():
    models = [LokiConfig, *(type(v) for _, v in LokiConfig() if hasattr(v, "model_fields"))]
    assert len(models) == 4
    bare = [
        f"{model.__name__}.{name}"
        for model in models
        for name, field in model.model_fields.items()
        if not (field.description or getattr(field.annotation, "__doc__", None))
    ]
    assert not bare


# --- commands ---


COMMANDS = [*pages.shown(), *pages.examples(), *pages.named()]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.page}: {c.text}")
def test_the_command_is_one_that_runs(command):
    """Their words are known; tests/test_pages_run.py runs them."""
    line, whole = command.text, command.whole
    words = [w for w in shlex.split(line) if not w.startswith("CUDA_VISIBLE_DEVICES=")]
    if not pages.STARTS.fullmatch(words[0]):
        raise AssertionError(f"'{line}' is no known command; output is a ```text block")
    if command.why == "theirs":
        return
    if words[0] == "axolotl" and words[1:2] != ["loki"]:
        assert words[1] in axolotl.commands
        assert len(words) > 2 or not whole
    elif words[0] in ("loki", "axolotl"):
        check_ours(words[words.index("loki") + 1 :], whole)
    elif words[0] == "make":
        subprocess.run(["make", "-n", *words[1:2]], cwd=ROOT, check=True, capture_output=True)
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:])
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        check_install(words)


def check_ours(words: list[str], whole: bool) -> None:
    """Parse with click's own parser, without touching the files that are named."""
    command: click.Command = loki
    while isinstance(command, click.Group) and words:
        command, words = command.commands[words[0]], words[1:]
    context = click.Context(command)
    given, left, _ = command.make_parser(context).parse_args(list(words))
    assert not left, f"{left} is too much"
    if whole:
        missing = [p.name for p in command.params if p.required and given.get(p.name) is None]
        assert not missing


def check_module(module: str, words: list[str]) -> None:
    if module == "pytest":
        return
    shown = io.StringIO()
    before = sys.argv
    sys.argv = [module, "--help"]
    try:
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
    assert ended.value.code == 0
    for option in (w.partition("=")[0] for w in words if w.startswith("--")):
        assert option in shown.getvalue(), f"{module} has no {option}"


def check_install(words: list[str]) -> None:
    assert words[:2] == ["pip", "install"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in re.findall(r"\[(.*?)\]", words[2]):
        assert set(extra.split(",")) <= project["optional-dependencies"].keys()


def test_the_reader_of_commands_can_fail():
    with pytest.raises(click.NoSuchOption):
        check_ours(["verify", "BASE", "TUNED", "--row", "FILE", "--nothing"], True)
    with pytest.raises(KeyError):
        check_ours(["verfy"], False)
    with pytest.raises(AssertionError, match="rows"):
        check_ours(["verify", "BASE", "TUNED"], True)
    with pytest.raises(AssertionError):
        check_module("benchmarks.quadrature", ["--no-such-option"])


# --- YAML ---


@pytest.mark.parametrize("block", each("yaml"))
def test_the_yaml_is_accepted(block):
    config = yaml.safe_load(block.text)
    if "plugins" in config:
        settings.prepare(config)
        assert config["adapter"] in ("lora", "qlora")
    else:
        LokiConfig(**config["loki"])


@pytest.mark.parametrize("block", each("diff"))
def test_the_diff_makes_a_lora_yaml_a_loki_yaml(block):
    lines = block.text.splitlines()
    assert {line[0] for line in lines} <= {" ", "+", "-"}
    before, after = (
        yaml.safe_load("\n".join(line[1:] for line in lines if line[0] in kept))
        for kept in (" -", " +")
    )
    assert "plugins" not in before and before["adapter"] in ("lora", "qlora")
    assert after["plugins"] == ["loki"]
    wanted = copy.deepcopy(after)
    settings.prepare(after)
    assert after["adapter"] == before["adapter"]
    dense = wanted["adapter"] == "loki"
    assert after["loki"]["rank"] == (None if dense else before["lora_r"])


def test_there_are_diffs_and_yaml_blocks():
    assert len(pages.blocks("diff")) >= 2 and len(pages.blocks("yaml")) >= 8


# --- Python ---


# Those that load a base and adapters from the disk run among the commands that write them.
@pytest.mark.parametrize("block", [p for p in each("python") if "BASE" not in p.values[0].text])
def test_the_python_runs_on_a_small_model(block):
    assert block.why is None
    # 10 % of its rows are more than 32, the rank that a page asks for.
    config = LlamaConfig(
        hidden_size=352,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=97,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(1, 97, (32, 48), generator=torch.Generator().manual_seed(0))
    names = {"model": model, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exec(compile(block.text, block.page, "exec"), names)


# --- messages ---


def messages() -> list[str]:
    """Every text in the package's source, with `…` for what is filled in."""
    found = []
    for path in sorted((ROOT / "loki_plugin").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted() -> list[str]:
    lines = re.findall(r"^### (.*)$", TEXTS["docs/troubleshooting.md"], re.MULTILINE)
    return [re.fullmatch(r"`` (.*) ``|`(.*)`", line).expand(r"\1\2") for line in lines]


def is_in(message: str, sources: list[str]) -> bool:
    """Whether the pieces of `message` stand in one text of the source, in order."""
    pattern = re.compile(".*".join(re.escape(p) for p in message.split("…")), re.DOTALL)
    return any(pattern.search(source) for source in sources)


@pytest.fixture(scope="module")
def sources():
    return messages()


@pytest.mark.parametrize("message", quoted())
def test_the_message_is_in_the_source(message, sources):
    assert len(message.replace("…", "").strip()) > 10
    assert is_in(message, sources)


def test_the_search_for_messages_can_fail(sources):
    assert len(quoted()) > 40
    assert not is_in("adapter: … cannot be joined with plugins", sources)


# --- versions ---


def test_the_ranges_of_versions_begin_and_end_where_something_was_run():
    """The oldest with Axolotl, the newest without; the installed versions lie between."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["axolotl"]
    ranges = {r.name: r.specifier for r in map(Requirement, [*project["dependencies"], *extra])}
    first = {
        name: next(s for s in specifier if s.operator == ">=").version
        for name, specifier in ranges.items()
    }
    with (ROOT / "benchmarks" / "results" / "compatibility.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    (oldest,) = [r for r in rows if r["axolotl"] == first["axolotl"]]
    assert "passed" in oldest["result"]
    ran = dict(each.split(" ") for each in oldest["with_it"].split(", "))
    for name in ("transformers", "peft", "bitsandbytes"):
        assert first[name] == ran[name]
    assert Version(oldest["torch"]) in SpecifierSet(f"=={first['torch']}.*")
    for name, specifier in ranges.items():
        assert specifier.contains(version(name).split("+")[0])
    alone = [r for r in rows if r["axolotl"] == "none"]
    newest = max(alone, key=lambda r: Version(r["torch"]))
    ran = dict(each.split(" ") for each in newest["with_it"].split(", "))
    ran["torch"] = newest["torch"].split("+")[0]
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        major, minor = Version(ran[name]).release[:2]
        assert ranges[name].contains(ran[name])
        assert not ranges[name].contains(f"{major}.{minor + 1}.0")
