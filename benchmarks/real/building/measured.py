"""How the files that are measured come out of the public ones: choices, facts, texts, dialogues.

A recipe is a function ({path in its repository: text}) -> the file's whole text; it reads no
file and no network.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath

from benchmarks.real.building.lines import Texts, read, write
from benchmarks.real.building.taught import kept

_CUT = 200_000  # bytes of a text at most
_ANSWER = re.compile(r" Answer\d: ")
_ARC = re.compile(
    r"Please choose the correct answer to the question: (.*?)\n\n"
    r"Answer1: (.*)\n\nAnswer format: .*",
    re.DOTALL,
)


def _cut(text: str, most: int = _CUT) -> str:
    """The whole lines of `text` that fit into `most` bytes of UTF-8; all of it where it fits."""
    raw = text.encode()
    return text if len(raw) <= most else raw[: raw.rindex(b"\n", 0, most) + 1].decode()


# Multiple choice.


def arc_easy(texts: Texts) -> str:
    """LLM-Adapters has question and choices in one instruction; they are taken apart."""
    ((path, text),) = texts.items()
    rows = []
    for i, row in enumerate(json.loads(text)):
        found = _ARC.fullmatch(row["instruction"])
        if found is None:
            raise ValueError(f"'{path}', record {i}: no question with answers: {row!r:.200}")
        choices, answer = _ANSWER.split(found[2]), int(row["answer"].removeprefix("answer")) - 1
        rows.append(
            {"id": f"{path}#{i}", "question": found[1], "choices": choices, "answer": answer}
        )
    return write(rows)


def piqa(texts: Texts) -> str:
    """Goals with their two solutions; the answers stand in a file of their own."""
    questions, labels = texts.values()
    pairs = zip(read(questions), labels.split(), strict=True)
    return write([
        {"id": f"piqa-valid-{i}", "question": row["goal"], "choices": [row["sol1"], row["sol2"]],
         "answer": int(label)}
        for i, (row, label) in enumerate(pairs)
    ])  # fmt: skip


def hellaswag(texts: Texts) -> str:
    """Contexts behind the name of the activity."""
    (text,) = texts.values()
    return write([
        {"id": f"hellaswag-{row['ind']}", "question": f"{row['activity_label']}: {row['ctx']}",
         "choices": row["endings"], "answer": row["label"]}
        for row in read(text)
    ])  # fmt: skip


def blimp(texts: Texts) -> str:
    """The first 40 pairs of every paradigm."""
    return write([
        {"id": f"{row['UID']}-{row['pairID']}", "field": row["field"],
         "term": row["linguistics_term"], "good": row["sentence_good"],
         "bad": row["sentence_bad"]}
        for text in texts.values() for row in read(text)[:40]
    ])  # fmt: skip


# Facts that a model may know.


def relations(texts: Texts) -> str:
    """The first 300 samples of a relation; of its templates the first three different ones."""
    rows = []
    for path, text in texts.items():
        whole, place = json.loads(text), PurePosixPath(path)
        templates = whole["prompt_templates"] + whole["prompt_templates_zs"]
        for i, sample in enumerate(whole["samples"][:300]):
            subject = sample["subject"]
            first, *others = dict.fromkeys(t.format(subject) for t in templates)
            rows.append(
                {"id": f"{place.stem}-{i}", "kind": place.parent.name, "relation": whole["name"],
                 "subject": subject, "object": sample["object"], "prompt": first,
                 "prompts": others[:2]}
            )  # fmt: skip
    return write(rows)


def known(texts: Texts) -> str:
    """`in_newfacts`: the subject is one that CounterFact edits, here or in its validation part."""
    facts, edit, valid = texts.values()
    edited = {row["subject"] for row in kept(edit) + json.loads(valid)}
    return write([
        {"id": row["known_id"], "relation": row["relation_id"], "subject": row["subject"],
         "object": row["attribute"], "prompt": row["prompt"], "template": row["template"],
         "in_newfacts": row["subject"] in edited}
        for row in json.loads(facts)
    ])  # fmt: skip


# Plain texts.


def wikipedia(texts: Texts) -> str:
    """Whole articles, each one line."""
    (text,) = texts.values()
    return _cut(text)


def web(texts: Texts) -> str:
    """Pages, an empty line between two."""
    (text,) = texts.values()
    return _cut("\n\n".join(row["text"] for row in read(text)))


def news(texts: Texts) -> str:
    """Sentences of CoNLL-U; an empty line before a paragraph, and one before a document."""
    made = ""
    for line in "\n".join(texts.values()).split("\n"):
        if line.startswith("# newdoc") or re.match(r"# newpar(?!_)", line):
            made += "\n\n"
        elif line.startswith("# text = "):
            made += ("" if made.endswith("\n") else " ") + line.removeprefix("# text = ")
    return _cut(made.strip() + "\n")


def cranford(texts: Texts) -> str:
    """150 kB from the first paragraph behind the first quarter of the book, lines joined."""
    (text,) = texts.values()
    text = text.replace("\r\n", "\n")
    book = text[text.index("***START") : text.index("***END")]
    book = re.sub(r"(?<!\n)\n(?!\n)", " ", book)
    return _cut(book[book.index("\n\n", len(book) // 4) + 2 :], 150_000)


def code(texts: Texts) -> str:
    """Whole files, each behind a comment with its name."""
    return "".join(f"# {path.removeprefix('src/')}\n{text}\n" for path, text in texts.items())


def sentences(texts: Texts) -> str:
    """The sentences of a CoNLL-U file, one a line."""
    (text,) = texts.values()
    marked = [line for line in text.split("\n") if line.startswith("# text = ")]
    return "".join(line.removeprefix("# text = ") + "\n" for line in marked)


def problems(texts: Texts) -> str:
    """Maths as text: the first 500 test problems as far as they fit, no calculator marks."""
    (text,) = texts.values()
    made = ""
    for row in read(text)[:500]:
        answer = re.sub("<<.*?>>", "", row["answer"]).replace("#### ", "The answer is ")
        made += f"Question: {row['question']}\nAnswer: {answer}\n\n"
    return _cut(made)


def service(texts: Texts) -> str:
    """Dialogues of a user and an assistant, an empty line between two."""
    who = {"USER": "User", "SYSTEM": "Assistant"}
    return "\n\n".join(
        "\n".join(f"{who[turn['speaker']]}: {turn['utterance']}" for turn in dialogue["turns"])
        for text in texts.values()
        for dialogue in json.loads(text)
    )


# Dialogues of people.


def _rank(reply: dict) -> tuple:
    return reply["rank"] is None, reply["rank"] or 0, reply["created_date"]


def oasst(texts: Texts) -> str:
    """Of every tree the path of best ranks; where nothing is ranked, what was written first."""
    (text,) = texts.values()
    below: dict[str | None, list[dict]] = {}
    for row in read(text):
        below.setdefault(row["parent_id"], []).append(row)
    rows = []
    for root in below[None]:
        path = [root]
        while replies := below.get(path[-1]["message_id"]):
            path.append(min(replies, key=_rank))
        while path and path[-1]["role"] == "prompter":  # ends with an answer
            path.pop()
        if path:
            roles = {"prompter": "user", "assistant": "assistant"}
            said = [{"role": roles[r["role"]], "content": r["text"]} for r in path]
            rows.append({"id": root["message_id"], "messages": said})
    return write(rows)


def instructions(texts: Texts) -> str:
    """One question, with its input behind it, and one answer."""
    (text,) = texts.values()
    rows = []
    for row in read(text):
        first = row["instances"][0]
        asked = "\n\n".join(part for part in (row["instruction"], first["input"]) if part)
        said = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": first["output"]},
        ]
        rows.append({"id": row["id"], "messages": said})
    return write(rows)
