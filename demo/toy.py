"""`python -m demo --toy`: the whole job on a model that is made here, in a few minutes.

A small Llama learns general knowledge; then it must learn something new, once with plain LoRA and
once with LoKI, both through the real `axolotl train`; LoKI's result is merged and verified.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

from . import running

EPOCHS, BATCH = 8, 20
# benchmarks/forgetting has other rates and quotas; with these both learn about half of the task.
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
LORA |= {"learning_rate": 5e-4, **running.NO_KERNELS}
LOKI: dict[str, Any] = {"plugins": ["loki"], "adapter": "loki", "learning_rate": 2e-3}
LOKI["loki"] = {"quota": 30, "protect": "off", "cache_dir": "cache"}
LOKI["loki"] |= {"calibration": {"source": "knowledge.jsonl"}}


def main(work: Path, fresh: bool = False) -> None:
    """The whole job in `work`; with `fresh` the base is trained again."""
    from . import base, corpus

    started = time.perf_counter()
    if fresh:
        shutil.rmtree(work / "base", ignore_errors=True)
    base.make(work / "base")
    task = corpus.task("train")
    running.write_chats(work / "skill.jsonl", task)
    with (work / "knowledge.jsonl").open("w", encoding="utf-8") as file:
        for question, answer in corpus.questions():
            record = {"subject": "general", "prompt": question, "target": answer}
            file.write(json.dumps(record) + "\n")
    shutil.rmtree(work / "cache", ignore_errors=True)  # to show the analysis at work
    for name, settings in (("lora", LORA), ("loki", LOKI)):
        settings, steps = {"base_model": "base", **settings}, EPOCHS * (len(task) // BATCH)
        running.train(work, name, settings, "skill.jsonl", BATCH, steps, 128)
    running.run(work, "merge", ["axolotl", "loki", "merge", "loki.yaml"])
    proof = running.run(
        work,
        "verify",
        ["loki", "verify", "base", "loki/merged", "--rows", "loki/loki_rows.json"],
    )
    report = _evaluate(work)
    report["verify"] = [line for line in proof.splitlines() if line.startswith("OK")][0]
    report["seconds"] = round(time.perf_counter() - started, 1)
    (work / "demo_report.json").write_text(json.dumps(report, indent=2) + "\n")
    _show(report, work, _page(report, work))


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
