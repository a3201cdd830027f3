"""What both demos share: their folder, and real commands with a bar that says the time left."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import yaml
from tqdm import tqdm

COMMANDS = Path(sys.executable).parent
MARKER = ".loki_demo"
# A bar as tqdm draws it: what it is about, how far it is, of how much.
_BAR = re.compile(r"(?:^|[\r\n])([^\r\n%|]*?)(?:: *| *)\d+%\|[^|\r\n]*\| *(\d+)/(\d+) \[")
# Axolotl turns its Triton kernels on for LoRA, also where there is no GPU.
NO_KERNELS = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}


def claim(work: Path) -> None:
    """Make `work`, or see that it is ours: the demo deletes and overwrites what lies there."""
    if work.exists() and not (work / MARKER).exists():
        if not work.is_dir() or any(work.iterdir()):
            sys.exit(
                f"'{work}' holds something that this demo did not make (it has no {MARKER});"
                " nothing was touched. Give --work an empty or a new folder"
            )
    work.mkdir(parents=True, exist_ok=True)
    (work / MARKER).write_text("Made by `python -m demo`, which may delete what lies here.\n")


def environment() -> None:
    """Offline, and with the commands of this interpreter's environment."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
    # Without it accelerate's launcher gives the training one core.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    os.environ["PATH"] = f"{COMMANDS}{os.pathsep}{os.environ.get('PATH', '')}"


def write_chats(path: Path, exchanges: Iterable[tuple[str, str]]) -> None:
    """Questions and answers as a chat data set."""
    with path.open("w", encoding="utf-8") as file:
        for question, answer in exchanges:
            said = (("user", question), ("assistant", answer))
            messages = [{"role": role, "content": content} for role, content in said]
            file.write(json.dumps({"messages": messages}) + "\n")


def train(
    work: Path, name: str, settings: dict, data: str, batch: int, steps: int, length: int
) -> None:
    """One run of the real command on the chats in `data`; YAML, log and result are called `name`.

    Args:
        settings: base, adapter, rate, and whatever else is not the same in every run.
        length: tokens of a record at most.
    """
    shutil.rmtree(work / name, ignore_errors=True)
    shared = {
        "datasets": [
            {
                "path": data,
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
                "message_property_mappings": {"role": "role", "content": "content"},
            }
        ],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": f"prepared/{name}",
        "output_dir": name,
        "sequence_len": length,
        "micro_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "max_steps": steps,
        "optimizer": "adamw_torch",
        "lr_scheduler": "linear",
        "warmup_steps": 10,
        "logging_steps": 5,
        "save_strategy": "no",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "seed": 0,
    }
    config = settings | {k: v for k, v in shared.items() if k not in settings}
    (work / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    run(work, name, ["axolotl", "train", f"{name}.yaml"], steps)


def run(work: Path, name: str, command: list[str], steps: int | None = None) -> str:
    """Run a command in `work`; returns what it printed, which also stands in NAME.log.

    Its bars are shown as they go, each by itself.

    Args:
        steps: of a training, whose bar has no name.
    """
    log, shown = work / f"{name}.log", " ".join(command)
    print(f"$ {shown}", flush=True)
    bars: dict[str, tqdm] = {}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=work, stdout=file, stderr=subprocess.STDOUT)
        while True:
            over = process.poll() is not None
            for about, done, total in phases(log.read_text(errors="replace"), steps):
                if about not in bars:
                    _close(bars)
                    bars[about] = tqdm(total=total, desc=f"  {about}")
                bars[about].update(done - bars[about].n)
            if over:
                break
            time.sleep(0.5)
    _close(bars)
    text = log.read_text(errors="replace")
    if process.returncode:
        sys.exit(f"{text[-3000:]}\n{shown} failed; the whole log is {log}")
    return text


def phases(log: str, steps: int | None = None) -> list[tuple[str, int, int]]:
    """(what, done, of how many) of every bar of ours in a log, and of the training's, in order."""
    found: dict[str, tuple[int, int]] = {}
    for about, done, total in _BAR.findall(log):
        if not about.strip() and int(total) == steps:
            about = "training"
        elif not about.startswith("loki: "):
            continue
        found[about.removeprefix("loki: ").strip()] = (int(done), int(total))
    return [(about, *far) for about, far in found.items()]


def _close(bars: dict[str, tqdm]) -> None:
    for bar in bars.values():
        bar.close()
