"""What a run opens, whom it calls, and whose code it runs: seen by the interpreter's own audit."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from loki_plugin.cli import loki
from loki_plugin.evaluating.forgetting import load_model
from loki_plugin.rows import FILE_NAME

ROOT = Path(__file__).parents[1]
SOURCES = {p: ast.parse(p.read_text(encoding="utf-8")) for p in ROOT.glob("loki_plugin/**/*.py")}

# A hook of sys.addaudithook sees every connection, look-up of a host and class that a pickle asks
# for, whatever library does it. The network is cut: each such call raises, and is noted where a
# function of ours has led to it. (Axolotl's model card asks the hub on its own where no offline
# setting says otherwise; it goes on without an answer.)
RUN = """
import importlib.util, json, sys, traceback
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname")
SENDS = ("socket.connect", "socket.sendto", "socket.sendmsg")
PACKAGE = importlib.util.find_spec("loki_plugin").submodule_search_locations[0]
seen = {"network": [], "pickle": [], "opened": []}
def ours():
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
    return [f"{f.filename[len(PACKAGE):]}:{f.lineno}" for f in frames]
def watch(event, args):
    # A path, or none, is the address of a socket between this machine's processes.
    if event in LOOKUPS or event in SENDS and isinstance(args[1], tuple):
        seen["network"] += ours()
        raise OSError("the network is cut off")
    if event == "pickle.find_class":
        seen["pickle"] += ours()
    if event == "open" and isinstance(args[0], str) and "canary" in args[0]:
        seen["opened"].append(args[0])
sys.addaudithook(watch)

from pathlib import Path
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train
from axolotl.utils.dict import DictDefault
import bitsandbytes  # asks the hub for a kernel on some CPUs as it is imported, whoever imports it
from loki_plugin.implanting.proven import merge_run

config, canary = json.loads(sys.argv[1]), sys.argv[2]
do_train(load_cfg(DictDefault(json.loads(sys.argv[1]))), TrainerCliArgs())
folder = Path(config["output_dir"])
report = json.loads((folder / "loki_report.json").read_text())

# A rows file from elsewhere may say anything.
rows = folder / "loki_rows.json"
content = json.loads(rows.read_text())
content["made"] |= {"scores": canary, "exclude": [canary], "calibration": {"source": canary}}
rows.write_text(json.dumps(content))
_, proof = merge_run(config, [folder], folder / "merged")
open(canary).close()  # the watcher sees what it is to see
print(json.dumps(seen | {"verified": report["verified"], "proven": proof.ok}))
"""


@pytest.mark.slow
def test_a_whole_run_calls_nobody_and_reads_no_pickle_and_follows_no_path(run_config, tmp_path):
    """Analysing, training, checking, merging and proving, without any offline setting."""
    canary = tmp_path / "canary.json"
    canary.write_text("[]")
    config = run_config | {"max_steps": 2, "dataloader_num_workers": 0}
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "AXOLOTL_DO_NOT_TRACK": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment |= {"AXOLOTL_DATASET_NUM_PROC": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(config), str(canary)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["network"] == []
    assert seen["pickle"] == []
    assert seen["opened"] == [str(canary)]  # by the script itself, at its end
    assert seen["verified"] and seen["proven"]


def calls() -> list[tuple[Path, str, ast.Call]]:
    return [
        (path, ast.unparse(node.func), node)
        for path, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def imports() -> set[str]:
    found = set()
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((node.module or "").split(".")[0])
    return found


def test_the_package_has_no_reader_or_writer_of_pickles_and_no_evaluation_of_text():
    runs = {"torch.load", "torch.save", "eval", "exec", "yaml.load", "np.load", "numpy.load"}
    assert [(p.name, name) for p, name, _ in calls() if name in runs] == []
    assert not imports() & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert {"json", "safetensors"} <= imports()  # the reader of imports reads


def test_the_package_opens_no_connection_of_its_own():
    """Models and data sets come through huggingface_hub and datasets; nothing is sent."""
    network = {"socket", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib"}
    assert not imports() & (network | {"posthog", "sentry_sdk", "smtplib"})


def test_no_call_trusts_remote_code_by_itself():
    trusting = [
        (path.name, node.lineno)
        for path, _, node in calls()
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code" and isinstance(keyword.value, ast.Constant)
        if keyword.value.value
    ]
    assert trusting == []


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(base, tmp_path):
    """A checkpoint that brings code, and the file that its code makes when it is run."""
    folder, marker = tmp_path / "with_code", tmp_path / "code_ran"
    shutil.copytree(base, folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config |= {"model_type": "own", "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, marker


def test_code_of_a_checkpoint_runs_only_where_the_user_says_so(with_code, tmp_path, monkeypatch):
    folder, marker = with_code
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    rows = tmp_path / FILE_NAME
    rows.write_text("[[1], [2], [3]]")
    command = ["verify", str(folder), str(folder), "--rows", str(rows)]
    refused = CliRunner().invoke(loki, command)
    assert refused.exit_code == 1 and "trust_remote_code" in refused.output
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(folder), None, "cpu", "auto", trust_remote_code=False)
    assert not marker.exists()
    trusted = CliRunner().invoke(loki, [*command, "--trust-remote-code"])
    assert marker.exists(), trusted.output
