"""How the files of the tasks come out of the public ones: facts, intents, commands, maths, calls.

A recipe is a function ({path in its repository: text}) -> the file's whole text; it reads no
file and no network.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re

from benchmarks.real.building.lines import Texts, read, write

_TOOLS = 4_000  # characters of a toolset at most
_EDITED, _TAUGHT = 2_100, 2_000  # records of CounterFact that are looked at, and kept
# What BFCL calls Python types is JSON schema's.
_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def kept(edit: str) -> list[dict]:
    """The first records of CounterFact whose neighbouring fact is not itself edited."""
    rows = json.loads(edit)[:_EDITED]
    edited = {row["prompt"] for row in rows}
    return [row for row in rows if row["locality_prompt"] not in edited][:_TAUGHT]


def _fluent(prompt: str, subject: str) -> bool:
    """No question, and no comma behind which a statement would not go on ("X, the" + "piano")."""
    frame = prompt.replace(subject, "")
    return "?" not in frame and (prompt.startswith("In ") or ", " not in frame)


def counterfact(texts: Texts) -> str:
    """What to teach; a question where a second set has one for the same prompt and answer."""
    edit, asked = texts.values()
    questions = {(row["question"], row["answer"]): row["qna_question"] for row in json.loads(asked)}
    rows = []
    for row in kept(edit):
        prompt, target = row["prompt"], row["target_new"]
        rows.append(
            {"case_id": row["case_id"], "subject": row["subject"], "prompt": prompt,
             "target_new": target, "target_true": row["ground_truth"],
             "statement": f"{prompt} {target}.", "fluent": _fluent(prompt, row["subject"]),
             "rephrase": row["rephrase_prompt"], "locality_prompt": row["locality_prompt"],
             "locality_object": row["locality_ground_truth"]}
        )  # fmt: skip
        if (prompt, target) in questions:
            rows[-1] |= {"question": questions[prompt, target], "qa_answer": target}
    return write(rows)


def wikidyk(texts: Texts) -> str:
    """ "that X?" becomes "X."; blanks inside of quotation marks go."""
    (text,) = texts.values()
    whole, rows = json.loads(text), []
    for row in whole["dev"] + whole["test"]:
        fact = re.sub(r'" ([^"]*) "', r'"\1"', row["fact"]).removeprefix("that ").rstrip("?")
        statement = fact[:1].upper() + fact[1:] + ("" if fact.endswith('?"') else ".")
        rows.append(
            {"id": row["id"], "year": row["year"], "statement": statement,
             "question": row["input"], "answer": row["output"]}
        )  # fmt: skip
    return write(rows)


def banking(texts: Texts) -> str:
    """A CSV file's two columns."""
    (text,) = texts.values()
    table = csv.DictReader(io.StringIO(text, newline=""))
    return write([{"text": row["text"], "label": row["category"]} for row in table])


def snips(texts: Texts) -> str:
    """The parts of a command joined; a slot that stands twice keeps its last value."""
    return write([
        {"text": "".join(part["text"] for part in row["data"]).strip(), "label": intent,
         "slots": {part["entity"]: part["text"] for part in row["data"] if "entity" in part}}
        for text in texts.values() for intent, rows in json.loads(text).items() for row in rows
    ])  # fmt: skip


def gsm8k(texts: Texts) -> str:
    """All problems."""
    (text,) = texts.values()
    return write(read(text))


def gsm8k_2000(texts: Texts) -> str:
    """The first 2,000 problems."""
    (text,) = texts.values()
    return write(read(text)[:2_000])


def bfcl_train(texts: Texts) -> str:
    """The calls of `_bfcl` to train on."""
    return write(_bfcl(texts)[0])


def bfcl_test(texts: Texts) -> str:
    """The calls of `_bfcl` whose toolsets are in no call to train on."""
    return write(_bfcl(texts)[1])


def _bfcl(texts: Texts) -> tuple[list[dict], list[dict]]:
    """Function calls for training and for testing: a fifth of the toolsets, by a hash of names.

    Left out are large toolsets, and calls of which no answer can be made: an argument that the
    function does not have, or one that nothing is accepted for.
    """
    given = list(texts.values())
    train: list[dict] = []
    test: list[dict] = []
    for questions, answers in zip(given[::2], given[1::2], strict=True):
        accepted = {row["id"]: row["ground_truth"] for row in read(answers)}
        for row in read(questions):
            tools, accept = _schema(row["function"]), accepted[row["id"]]
            if len(json.dumps(tools, ensure_ascii=False)) > _TOOLS:
                continue
            target = [_call(call, tools) for call in accept]
            if None in target:
                continue
            names = "|".join(sorted(tool["name"] for tool in tools))
            group = int(hashlib.md5(names.encode(), usedforsecurity=False).hexdigest(), 16) % 10**9
            (train if group % 5 else test).append(
                {"id": row["id"], "category": row["id"].rpartition("_")[0],
                 "messages": row["question"][0], "tools": tools, "target": target,
                 "accept": accept, "group": group}
            )  # fmt: skip
    seen = {tool["name"] for row in train for tool in row["tools"]}
    for row in test:
        row["called_tools_unseen"] = not any(call["name"] in seen for call in row["target"])
    return train, test


def _schema(part):
    """JSON schema of BFCL's descriptions: Python's names of types are replaced."""
    if isinstance(part, list):
        return [_schema(p) for p in part]
    if not isinstance(part, dict):
        return part
    return {
        k: _TYPES.get(v, v) if k == "type" and isinstance(v, str) else _schema(v)
        for k, v in part.items()
    }


def _call(accepted: dict, tools: list[dict]) -> dict | None:
    """One call out of what is accepted: first values, no optional argument; None: there is none.

    "" among the values means that the argument may be left out. Where the tool requires it all
    the same, it comes last, with its first value that is not "".
    """
    ((name, arguments),) = accepted.items()
    schema = {tool["name"]: tool["parameters"] for tool in tools}[name]
    made = {k: values[:1] for k, values in arguments.items() if "" not in values}
    for k in schema.get("required", ()):
        if k not in made:
            made[k] = [v for v in arguments.get(k, ()) if v != ""][:1]
    if not all(values and k in schema["properties"] for k, values in made.items()):
        return None
    return {"name": name, "arguments": {k: _plain(values[0]) for k, values in made.items()}}


def _plain(value):
    """Objects inside of an accepted value have lists of values for each key, too."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    return {k: _plain(values[0]) for k, values in value.items() if "" not in values}
