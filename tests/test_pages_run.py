"""Every command that README and docs show runs, in a folder that holds what it names.

A page's blocks run in order, as somebody types them who follows the page; a command in running text
or in a command's `--help` runs alone. What cannot run here is excluded for one of a few reasons
(`CANNOT`), each checked: by what the command itself is, or by a `<!-- not run: ... -->` beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from axolotl.cli.main import cli as axolotl
from click.testing import CliRunner
from helpers import pages
from helpers.axolotl import short_run
from helpers.prompts import LM_EVAL_TASK
from helpers.scores import score_file
from helpers.tokenizers import make_tokenizer

from loki_plugin.analysing.calibration import sources
from loki_plugin.cli import loki
from loki_plugin.protecting import texts

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_plugins")]

# A reason not to run a command, and which commands may have it. The first three can be seen from
# the command itself; the others stand beside it on the page.
CANNOT: dict[str, Callable[[list[str]], bool]] = {
    "installs": lambda w: w[:2] == ["pip", "install"],
    "make": lambda w: (
        w[0] == "make" or w[:3] == ["python", "-m", "demo"]
    ),  # the demo, this suite, and tools on the whole repository
    "a benchmark": lambda w: w[:2] == ["python", "-m"] and w[2].startswith("benchmarks."),
    "theirs": lambda w: w[1] in ("select-nodes", "create-model", "restore-model"),
    "wants a base for images and text": lambda w: w[:2] == ["loki", "export"] and "--names" in w,
    "needs a GPU and downloads": lambda w: any("example_configs/" in x and "gb-" in x for x in w),
}
BY_ITSELF = ("installs", "make", "a benchmark", "wants a base for images and text")

# What a page calls it -> what it is in the folder of these tests.
WORDS = {
    "CONFIG": "config.yaml",
    "OUTPUT_DIR": "outputs",
    "TUNED": "outputs/merged",
    "FILE": "outputs/loki_rows.json",
    "loki_rows.json": "outputs/loki_rows.json",
    "MODEL": "base",
    "BASE": "base",
    "B": "base",
    "T": "out/merged",
    "Qwen/Qwen2.5-0.5B": "base",
    "Qwen/Qwen2.5-0.5B-Instruct": "base",
    "FILE.h5": "kva_mmlu.h5",
    "outputs/loki/loki_directions.safetensors": "out/loki_directions.safetensors",
    "scores.h5": "kva_mmlu.h5",
    "first/loki_rows.json": "outputs/loki_rows.json",
    "ADAPTER": "outputs",
    "OUT": "outputs-r4",
    "R": "4",
    "64": "4",  # a rank: of 12 rows here
    "9e4a4b2b1e4a6fe95856": "KEY",  # of the newest analysis
    # Theirs are downloaded; finding the batch size takes longer than the task.
    "hellaswag,winogrande": "colours --include tasks --batch-size 4",
}
# What running text calls by its name only -> the whole command.
WHOLE = {
    "axolotl train": "axolotl train config.yaml",
    "axolotl loki merge": "axolotl loki merge config.yaml",
    "axolotl merge-lora": "axolotl merge-lora config.yaml",
    "loki analyse": "loki analyse config.yaml",
    "loki estimate": "loki estimate config.yaml",
    "loki export": "loki export outputs outputs-r64 --rank 64",
    "loki forgetting": "loki forgetting config.yaml",
    "loki merge": "loki merge config.yaml",
    "loki report": "loki report outputs",
    "loki suppress": "loki suppress base",
    "loki write": "loki write base --output own.jsonl",
    "loki verify": "loki verify BASE TUNED --rows FILE",
    "loki verify --directions FILE": "loki verify BASE out/merged --rows out/loki_rows.json"
    " --directions out/loki_directions.safetensors",
}
# Through the console script, in a process that takes ten seconds to import; all others run in this
# one. tests/test_short_name.py starts `axolotl` so.
IN_A_PROCESS = ("loki doctor",)


def why_not(line: pages.Line) -> str | None:
    words = shlex.split(line.text)
    return line.why or next((why for why in BY_ITSELF if CANNOT[why](words)), None)


ALL = [*pages.shown(), *pages.examples(), *pages.named()]
NOT_RUN = sorted({(c.text, why) for c in ALL if (why := why_not(c))})


@pytest.mark.parametrize(("line", "why"), NOT_RUN, ids=lambda value: value)
def test_what_is_not_run_cannot_be(line, why):
    assert why in CANNOT, f"known reasons: {', '.join(CANNOT)}"
    assert CANNOT[why](shlex.split(line))


def test_a_reason_does_not_fit_any_command():
    assert not any(fits(shlex.split("loki merge config.yaml")) for fits in CANNOT.values())
    assert not any(fits(shlex.split("python -m demo.tiny base")) for fits in CANNOT.values())
    assert len(NOT_RUN) < len({c.text for c in ALL}) / 3


# --- the folder ---


@pytest.fixture(scope="module", autouse=True)
def few_questions():
    """One in two dozen of the shipped questions, and short own texts, for every command here."""
    read = sources.jsonl

    def some(text, name):
        rows = list(read(text, name))
        return rows[::24] if name == "builtin.jsonl" else rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "jsonl", some)
        patch.setattr(texts, "TEXT_TOKENS", 16)
        yield


def save_base(folder: Path) -> None:
    """A Llama of 128 rows a layer, the fewest of which 1 % is one (`loki suppress` asks for it)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def run_of(output: str, block: dict, **more) -> dict:
    """A run of four steps with the block of a page, in paths as a user writes them."""
    short = short_run("./base", "./chats.jsonl", "", Path("."))
    short |= {"loki": block, "output_dir": f"./{output}", "max_steps": 4}
    return short | {"dataset_prepared_path": None} | more


def write(path: str, run: dict) -> None:
    Path(path).write_text(yaml.safe_dump({k: v for k, v in run.items() if v is not None}))


# A run of rows on the base of the README's YAML, and one with hard directions.
(README,) = (yaml.safe_load(b.text) for b in pages.blocks("yaml") if b.page == "README.md")
CONFIG = run_of("outputs", {"quota": 10, "protect": "auto"}, load_in_4bit=README["load_in_4bit"])
RUN = run_of("out", {"quota": 10, "protect": {"inputs": 0.5}}, save_strategy="epoch")
FIRST = run_of("outputs/first", {"quota": 10})


@pytest.fixture(scope="module")
def kept(tmp_path_factory, few_questions):
    """name -> a folder as it is before a run, after it, and after its merge."""
    root = tmp_path_factory.mktemp("pages")
    new = root / "new"
    new.mkdir()
    with inside(new):
        save_base(Path("base"))
        chat = [{"role": "user", "content": "say one"}, {"role": "assistant", "content": "it is"}]
        Path("chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 16)
        question = {"question": "say", "choices": [" a", " b"], "answer": 1}
        Path("questions.jsonl").write_text((json.dumps(question) + "\n") * 4)
        Path("tasks").mkdir()
        Path("tasks", "colours.yaml").write_text(LM_EVAL_TASK % "questions.jsonl")
        score_file(Path("kva_mmlu.h5"), torch.randn(8, 2, 128))
        for name, run in (("config", CONFIG), ("run", RUN), ("first", FIRST)):
            write(f"{name}.yaml", run)
    trained = Path(shutil.copytree(new, root / "trained"))
    with inside(trained):
        for name in ("config", "run"):  # `loki suppress` takes the newest: of the base itself
            call(f"axolotl train {name}.yaml")
        (checkpoint,) = Path("out").glob("checkpoint-*")
        checkpoint.rename("out/checkpoint-200")
    merged = Path(shutil.copytree(trained, root / "merged"))
    with inside(merged):
        for name in ("config", "run"):
            call(f"loki merge {name}.yaml")
    return {"new": new, "trained": trained, "merged": merged}


@pytest.fixture
def enter(kept, tmp_path, monkeypatch):
    """Go into a fresh copy of the folder as these commands need it."""

    def go(lines: list[str]) -> None:
        state = "merged"
        if any(re.search(r"\bmerge(-lora)?\b", line) for line in lines):
            state = "trained"  # nothing is overwritten
        if any(line.startswith("axolotl train") for line in lines):
            state = "new"
        shutil.copytree(kept[state], tmp_path / "here")
        stack.enter_context(inside(tmp_path / "here"))

    with contextlib.ExitStack() as stack:
        yield go


@contextlib.contextmanager
def inside(folder: Path):
    """The folder is the working directory, and holds the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))
        patch.setattr(sys, "argv", ["axolotl"])  # Axolotl looks at it for a few commands
        yield


# --- running ---


def translate(line: str) -> tuple[dict[str, str], list[str]]:
    """(variables that it sets, its words) of a page's command, as it is here."""
    env, words = {}, []
    for word in shlex.split(WHOLE.get(line, line)):
        if re.match(r"[A-Z_]+=", word):
            env |= [word.split("=")]
        else:
            words += WORDS.get(word, word).split()
    return env, words


def call(line: str) -> None:
    """Run a command, and look at its exit code, at what it says and at what it leaves."""
    env, words = translate(line)
    words = [newest_analysis() if w == "KEY" else w for w in words]
    code, out, said = (in_a_process if line in IN_A_PROCESS else in_here)(words, env)
    if "--max-kl" in words and code == 1:  # such a small model need not keep what the page asks
        assert re.search(r"(more than --max-(kl|drop)|less than --min-kept) [\d.]+$", said, re.M)
    else:
        assert code == 0, f"{shlex.join(words)} ends with {code}\n{said}"
    check(words, out, said)


def newest_analysis() -> str:
    done = CliRunner().invoke(loki, ["cache", "list", "--json"])
    return min(json.loads(done.stdout)["analyses"], key=lambda a: a["age_seconds"])["key"]


def in_here(words: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    """(exit code, what stands on stdout, all that it said)."""
    if words[:2] == ["axolotl", "train"]:
        words = [*words, "--launcher", "python"]  # else a process that takes ten seconds to import
    program = {"loki": loki, "axolotl": axolotl}[words[0]]
    done = CliRunner(env=env).invoke(program, words[1:])
    failed = done.exception is not None and not isinstance(done.exception, SystemExit)
    return done.exit_code, done.stdout, done.output + (repr(done.exception) if failed else "")


def in_a_process(words: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    program = Path(sys.executable).parent / words[0]
    done = subprocess.run(
        [program, *words[1:]], env=os.environ | env, capture_output=True, text=True, timeout=900
    )
    return done.returncode, done.stdout, done.stdout + done.stderr


# What a command that went well has said.
SAID = {
    "analyse": "12 of 128 in each of 2 layers",
    "doctor": "everything that LoKI needs is there",
    "estimate": "card  analysis and training fit",
    "export": "of ‖ΔW‖² is lost",
    "forgetting": "prompts: KL to the base",
    "merge": "OK: nothing outside the selected rows has changed",
    "report": "loki_report.html",
    "select": "rows of 2 layers in",
    "stability": "two halves:",
    "suppress": "highest by |score|",
    "verify": "OK: ",
    "write": " dialogues and ",
    "cache": " analyses ",
}


def check(words: list[str], out: str, said: str) -> None:
    ours = words.index("loki") + 1 if "loki" in words[:2] else None
    for option in ("--output", "--plot", "--pictures"):
        if option in words:
            assert Path(words[words.index(option) + 1]).exists()
    if "--json" in words:
        json.loads(out)
    elif ours:
        assert SAID[words[ours]] in said
    else:
        folder = Path(yaml.safe_load(Path(words[2]).read_text())["output_dir"])
        if words[1] == "train":
            assert json.loads((folder / "loki_report.json").read_text())["verified"]
        assert words[1] == "train" or (folder / "merged" / "config.json").is_file()


def steps(page: str) -> list[pages.Block | str]:
    """What somebody does who follows a page: its commands, and the Python that loads a model."""
    found: list[pages.Block | str] = []
    for block in pages.blocks("", "bash", "python"):
        if block.page != page:
            continue
        if block.kind == "python":
            found += [block] if "BASE" in block.text else []
            continue
        lines = [pages.Line(page, text, block.why) for text in pages.lines_of(block.text)]
        found += [x.text for x in lines if x in ALL and why_not(x) is None]
    return found


STORIES = {page: story for page in pages.TEXTS if (story := steps(page))}
TYPED = {step for story in STORIES.values() for step in story if isinstance(step, str)}
# The other commands, once each, however many names the pages have for what they are given.
ALONE = {
    str(translate(line.text)): line.text
    for line in [*pages.examples(), *pages.named()]
    if why_not(line) is None
}
for _line in TYPED:
    ALONE.pop(str(translate(_line)), None)


@pytest.mark.parametrize("line", ALONE.values())
def test_the_command_runs(line, enter):
    enter([WHOLE.get(line, line)])
    call(line)


def second_run(base: str) -> None:
    """What docs/continual.md says of the second fine-tune: its YAML, then training and merging."""
    (text,) = [b.text for b in pages.blocks("yaml") if b.page == "docs/continual.md"]
    shutil.rmtree("outputs/second", ignore_errors=True)
    write("second.yaml", run_of("outputs/second", yaml.safe_load(text)["loki"], base_model=base))
    call("axolotl train second.yaml")
    call("axolotl loki merge second.yaml")


# What a page tells in words before a command.
BEFORE = {
    "loki verify outputs/first/merged outputs/second/merged --rows outputs/second/loki_rows.json": (
        lambda: second_run("./outputs/first/merged")
    ),
    "axolotl loki merge first.yaml --adapter outputs/first --adapter outputs/second"
    " --output outputs/both": lambda: second_run("./base"),
}


@pytest.mark.parametrize("page", STORIES)
def test_the_blocks_of_a_page_run_in_order(page, enter):
    story = STORIES[page]
    enter([step for step in story if isinstance(step, str)])
    for step in story:
        if isinstance(step, str):
            BEFORE.get(step, lambda: None)()
            call(step)
        else:
            names: dict = {}
            exec(compile(step.text.replace("BASE", WORDS["BASE"]), page, "exec"), names)
            ids = torch.arange(5, 40)[None]
            with torch.no_grad():
                tuned = names["model"](input_ids=ids).logits
                with names["model"].disable_adapter():
                    assert not torch.equal(names["model"](input_ids=ids).logits, tuned)


def test_what_is_told_before_a_command_is_told_of_one_that_is_there():
    assert BEFORE.keys() <= TYPED and len(STORIES) >= 3 and len(ALONE) > 25
    assert {*IN_A_PROCESS, *WHOLE} <= {line.text for line in ALL}


def test_a_run_leaves_the_files_that_the_guide_lists(kept):
    table = pages.TEXTS["docs/guide.md"].split("## What is written")[1].split("\n## ")[0]
    cells = " ".join(re.findall(r"^\| (`.*?) \|", table, re.M))
    listed = {name.rstrip("/") for name in re.findall(r"`([\w./]+)`", cells)}
    left = {p.name for p in (kept["merged"] / "out").iterdir()}
    assert listed - left == {"LOKI_FAILED.txt", "loki_forgetting.svg"}  # it evaluates nothing
    assert {name for name in left if "loki" in name.lower()} <= listed
