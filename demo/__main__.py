"""`python -m demo`: the whole job on a model that is made here, in a few minutes.

A small Llama learns general knowledge; then it must learn something new, once with plain LoRA and
once with LoKI, both through the real `axolotl train`; LoKI's result is merged and verified.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from importlib import resources
from pathlib import Path

import yaml
from tqdm import tqdm

COMMANDS = Path(sys.executable).parent
MARKER = ".loki_demo"
EPOCHS, BATCH = 8, 20
# benchmarks/forgetting has other rates and quotas; with these both learn about half of the task.
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
LORA |= {"learning_rate": 5e-4}
# Axolotl turns its Triton kernels on for LoRA, also where there is no GPU.
LORA |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
LOKI = {"plugins": ["loki"], "adapter": "loki", "learning_rate": 2e-3}
LOKI |= {"loki": {"quota": 30, "calibration": {"source": "knowledge.jsonl"}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="where everything goes")
    parser.add_argument("--fresh", action="store_true", help="train the base model again")
    options = parser.parse_args()
    started = time.perf_counter()
    work = options.work.resolve()
    _claim(work)
    os.environ |= {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"}
    os.environ["PATH"] = f"{COMMANDS}{os.pathsep}{os.environ.get('PATH', '')}"

    from . import base

    if options.fresh:
        shutil.rmtree(work / "base", ignore_errors=True)
    base.make(work / "base")
    _write_data(work)
    shutil.rmtree(work / "cache", ignore_errors=True)  # to show the analysis at work
    for name, settings in (("lora", LORA), ("loki", LOKI)):
        _train(work, name, settings)
    _run(work, "merge", ["axolotl", "loki", "merge", "loki.yaml"])
    proof = _run(
        work,
        "verify",
        ["loki", "verify", "base", "loki/merged", "--rows", "loki/loki_rows.json"],
    )
    report = _evaluate(work)
    report["verify"] = [line for line in proof.splitlines() if line.startswith("OK")][0]
    report["seconds"] = round(time.perf_counter() - started, 1)
    (work / "demo_report.json").write_text(json.dumps(report, indent=2) + "\n")
    _show(report, work, _page(report, work))


def _claim(work: Path) -> None:
    """Make `work`, or see that it is ours: the demo deletes and overwrites what lies there."""
    if work.exists() and not (work / MARKER).exists():
        if not work.is_dir() or any(work.iterdir()):
            sys.exit(
                f"'{work}' holds something that this demo did not make (it has no {MARKER});"
                " nothing was touched. Give --work an empty or a new folder"
            )
    work.mkdir(parents=True, exist_ok=True)
    (work / MARKER).write_text("Made by `python -m demo`, which may delete what lies here.\n")


def _write_data(work: Path) -> None:
    """The new skill as a chat data set, and what the base knows as calibration prompts."""
    from . import corpus

    data = resources.files("demo") / "data" / "skill_train.jsonl"
    (work / "skill.jsonl").write_text(data.read_text(encoding="utf-8"), encoding="utf-8")
    with (work / "knowledge.jsonl").open("w", encoding="utf-8") as file:
        for question, answer in corpus.questions():
            record = {"subject": "general", "prompt": question, "target": answer}
            file.write(json.dumps(record) + "\n")


def _train(work: Path, name: str, settings: dict) -> None:
    """One run of the real command, with its output in a log and a live bar."""
    shutil.rmtree(work / name, ignore_errors=True)
    count = len((work / "skill.jsonl").read_text().splitlines())
    steps = EPOCHS * (count // BATCH)
    config = {
        "base_model": "base",
        **settings,
        "datasets": [
            {
                "path": "skill.jsonl",
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
                "message_property_mappings": {"role": "role", "content": "content"},
            }
        ],
        "chat_template": "tokenizer_default",
        "dataset_prepared_path": f"prepared/{name}",
        "output_dir": name,
        "sequence_len": 128,
        "micro_batch_size": BATCH,
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
    if "loki" in settings:
        config["loki"] = settings["loki"] | {"cache_dir": "cache"}
    (work / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    _run(work, name, ["axolotl", "train", f"{name}.yaml"], steps)


def _run(work: Path, name: str, command: list[str], steps: int | None = None) -> str:
    """Run a command in `work`; returns what it printed, which also stands in NAME.log."""
    log = work / f"{name}.log"
    title = " ".join(command[: 3 if steps is None else 2]) + (f" ({name})" if steps else "")
    with log.open("w") as file, tqdm(total=steps or 1, desc=title, leave=True) as bar:
        process = subprocess.Popen(command, cwd=work, stdout=file, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            if steps:
                logged = log.read_text(errors="replace").count("'loss': ")
                bar.update(min(5 * logged, steps) - bar.n)
        if process.returncode == 0:
            bar.update(bar.total - bar.n)
    text = log.read_text(errors="replace")
    if process.returncode:
        sys.exit(f"{text[-3000:]}\n{' '.join(command)} failed; the whole log is {log}")
    return text


def _evaluate(work: Path) -> dict:
    from transformers.utils.logging import disable_progress_bar

    from . import evaluate

    disable_progress_bar()
    # PEFT imports bitsandbytes, which reports kernels that only 4-bit models want.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="bitsandbytes")
    results = {"base": evaluate.evaluate(work / "base")}
    results["LoRA"] = evaluate.evaluate(work / "base", work / "lora")
    results["LoKI"] = evaluate.evaluate(work / "loki" / "merged")
    loki = json.loads((work / "loki" / "loki_report.json").read_text())
    return {
        "results": results,
        "rows_per_layer": loki["rows_per_layer"],
        "hidden_size": loki["hidden_size"],
        "trainable_percent": loki["trainable_percent"],
        "analysis_seconds": loki["selection"]["analysis_seconds"],
        "calibration_prompts": loki["selection"]["calibration"]["prompts"],
        "learning_rates": {"LoRA": LORA["learning_rate"], "LoKI": LOKI["learning_rate"]},
    }


def _facts(report: dict) -> list[tuple[str, str]]:
    """What was trained, in words."""
    rows = report["rows_per_layer"]
    analysis = f"{report['analysis_seconds']:.1f} s for {report['calibration_prompts']}"
    return [
        ("rows that train", f"{rows[0]} of {report['hidden_size']} in each of {len(rows)} layers"),
        ("trainable share", f"{report['trainable_percent']:.2f} % of the parameters"),
        ("analysis", f"{analysis} calibration prompts"),
    ]


def _compared(report: dict) -> list[tuple[str, list[str]]]:
    """What base, LoRA and LoKI make of every measure; the base is the model before training."""
    rows = []
    for key, title in (
        ("knowledge", "knowledge kept, %"),
        ("reworded", "  in words it never saw, %"),
        ("perplexity", "general text, perplexity"),
        ("task", "task learned, %"),
        ("task_loss", "loss on the task"),
    ):
        values = [report["results"][m][key] for m in ("base", "LoRA", "LoKI")]
        rows.append((title, [f"{v:.2f}" for v in values]))
    return rows


def _page(report: dict, work: Path) -> Path:
    """The report of the LoKI run, with what the terminal says of all three models."""
    from loki_plugin.picturing.page import rebuild

    titles = ("base", "LoRA", "LoKI")
    compared = [
        (title.strip(), ",  ".join(f"{t} {v}" for t, v in zip(titles, values, strict=True)))
        for title, values in _compared(report)
    ]
    facts = [*_facts(report), ("verify", report["verify"])]
    return rebuild(
        work / "loki",
        work / "cache",
        [{"title": "The demo: base, LoRA and LoKI", "rows": [*compared, *facts]}],
    )[0]


def _show(report: dict, work: Path, page: Path) -> None:
    print()
    for title, text in _facts(report):
        print(f"{title:21s}{text}")
    print("\n                              base    LoRA    LoKI")
    for title, values in _compared(report):
        print(f"{title:26s}" + "".join(f"{v:>8s}" for v in values))
    print(f"\nverify               {report['verify']}")
    print(f"merged model         {work / 'loki' / 'merged'}")
    print(f"all figures          {work / 'demo_report.json'} ({report['seconds']:.0f} s in all)")
    print(f"report               {page}")


if __name__ == "__main__":
    main()
