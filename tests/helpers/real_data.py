"""A data folder in the shapes of benchmarks/real/README.md, with lines of our own."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.real.data import TEXTS

NAME = "smollm2-135m-instruct"
FACTS = [(f"The word of {i} is", w) for i, w in enumerate(("the", "and", "answer", "say"))]


def write(folder: Path, facts: list[tuple[str, str]]) -> Path:
    """`facts`: (prompt, object) pairs; what they say need not be true."""
    folder.mkdir(parents=True, exist_ok=True)

    def put(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    for name in TEXTS.values():
        lines = [f"Line {i} of {name} says the number {i * i}." for i in range(80)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    put("facts_relations", [
        {"relation": f"r{i % 3}", "prompt": p, "object": o} for i, (p, o) in enumerate(facts)
    ])  # fmt: skip
    put("facts_known_1000", [
        {"relation": "P1", "prompt": "Never asked:", "object": "x", "in_newfacts": True}
    ])  # fmt: skip
    put("chat_userinstr_252", [
        {"messages": [{"role": "user", "content": f"Say {i}"},
                      {"role": "assistant", "content": f"The number is {i}, please."}]}
        for i in range(30)
    ])  # fmt: skip
    put("chat_oasst1_en_valid", [])
    choice = [{"question": f"Which is {i}?", "choices": [f"{i}", f"{i + 1}"], "answer": 0}
              for i in range(20)]  # fmt: skip
    for name in ("mc_arc_easy_test", "mc_piqa_valid", "mc_hellaswag_1000"):
        put(name, choice)
    put("mc_blimp_40x67", [{"good": f"The {i} is here.", "bad": f"The {i} are here."}
                           for i in range(20)])  # fmt: skip
    commands = [{"text": f"play song {i}", "label": "PlayMusic", "slots": {"song": f"{i}"}}
                for i in range(40)]  # fmt: skip
    put("cls_snips_train", commands[:30])
    put("cls_snips_test", commands[25:])  # five also stand in train
    return folder
