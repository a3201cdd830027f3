"""Multiple-choice questions as people have them, and from where their answers count."""

from __future__ import annotations

import json

import pytest
from helpers.tokenizers import make_tokenizer

from loki_plugin.analysing.calibration.prompts import load_prompts
from loki_plugin.analysing.calibration.sources import load_records

FOUR = ["newton", "joule", "watt", "pascal"]
KNOWN = {  # a record as its set has it, and what is read of it
    "MMLU": (
        {"question": "Q?", "subject": "physics", "choices": FOUR, "answer": 0},
        ("Q?", FOUR, 0, "physics"),
    ),
    "ARC": (
        {
            "id": "x",
            "question": "Q?",
            "choices": {"text": FOUR, "label": ["A", "B", "C", "D"]},
            "answerKey": "C",
        },
        ("Q?", FOUR, 2, ""),
    ),
    "ARC, labels that are numbers": (
        {
            "question": "Q?",
            "choices": {"text": FOUR[:3], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        ("Q?", FOUR[:3], 1, ""),
    ),
    "OpenBookQA": (
        {
            "question_stem": "Q?",
            "choices": {"text": FOUR, "label": ["A", "B", "C", "D"]},
            "answerKey": "D",
        },
        ("Q?", FOUR, 3, ""),
    ),
    "MMLU-Pro": (
        {
            "question_id": 70,
            "question": "Q?",
            "options": list("abcdefghij"),
            "answer": "I",
            "answer_index": 8,
            "category": "business",
            "src": "s",
        },
        ("Q?", list("abcdefghij"), 8, "business"),
    ),
    "BoolQ": (
        {"question": "is it so", "passage": "It is.", "answer": True},
        ("It is.\nis it so", ["yes", "no"], 0, ""),
    ),
    "BoolQ, no": (
        {"question": "is it so", "passage": "It is not.", "answer": False},
        ("It is not.\nis it so", ["yes", "no"], 1, ""),
    ),
    "PIQA": (
        {"goal": "To be warm,", "sol1": "run.", "sol2": "sit.", "label": 0},
        ("To be warm,", ["run.", "sit."], 0, ""),
    ),
    "choices by letter": (
        {"question": "Q?", "choices": {"A": "x", "B": "y", "C": None}, "answer": "B"},
        ("Q?", ["x", "y"], 1, ""),
    ),
}


def write(tmp_path, *rows) -> str:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize("name", KNOWN)
def test_sets_that_people_have_are_read_without_columns(tmp_path, name):
    row, wanted = KNOWN[name]
    (record,) = load_records(write(tmp_path, row))
    assert (record.question, record.choices, record.answer, record.subject) == wanted


def test_choices_may_stand_in_columns_of_their_own(tmp_path):
    rows = [
        {"context": "C.", "q": "Q?", "a1": "x", "a2": "y", "a3": "z", "label": label}
        for label in ("1", "3")
    ]
    columns = {"question": "q", "choices": ["a1", "a2", "a3"], "answer": "label"}
    records = load_records(write(tmp_path, *rows), columns)
    assert [r.answer for r in records] == [0, 2] and records[0].question == "C.\nQ?"
    assert records[0].choices == ["x", "y", "z"]
    with pytest.raises(ValueError, match=r"q.jsonl:1: the columns \['a4'\] are missing or empty"):
        load_records(write(tmp_path, *rows), columns | {"choices": ["a1", "a4"]})
    with pytest.raises(ValueError, match=r"several columns for \['question'\], and only"):
        load_records(write(tmp_path, *rows), {"question": ["q", "a1"]})


def test_a_letter_behind_the_fourth_is_the_answer(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    row, _ = KNOWN["MMLU-Pro"]
    (prompt,) = load_prompts(tokenizer, write(tmp_path, row), target="gold").prompts
    assert prompt.target == tokenizer("I")["input_ids"][0]


def asked(*answers, choices=FOUR) -> list[dict]:
    return [{"question": "Q?", "choices": choices, "answer": a} for a in answers]


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        ((0, 1, 3), [0, 1, 3]),
        ((1, 2, 4), [0, 1, 3]),
        (("1", "2", "3", "0"), [1, 2, 3, 0]),
        (("1", "2", "3", "4"), [0, 1, 2, 3]),
        ((1.0, 4.0), [0, 3]),
        (("B", 2, "d", 0), [1, 2, 3, 0]),
        (("B", 2, "d", 4), [1, 1, 3, 3]),
        (("a",), [0]),
    ],
)
def test_the_whole_file_says_from_where_answers_count(tmp_path, answers, wanted):
    records = load_records(write(tmp_path, *asked(*answers)))
    assert [r.answer for r in records] == wanted


def test_the_last_of_fewer_choices_says_it_too(tmp_path):
    rows = [*asked(1, 3), *asked(2, choices=["x", "y"])]
    assert [r.answer for r in load_records(write(tmp_path, *rows))] == [0, 2, 1]


@pytest.mark.parametrize(
    ("answers", "line", "message"),
    [
        ((1, 2, 3), 1, "it cannot be told whether `answer` counts from 0 or from 1"),
        (("A", "2"), 2, "it cannot be told whether `answer` counts from 0 or from 1"),
        ((1, 0, 4), 3, "`answer` is 4 of 4 choices, so it counts from 1, but .*q.jsonl:2 has 0"),
        ((0, 5), 2, "`answer` must be A-D, 0-3, or 1-4 in a file that counts from 1, got 5"),
        ((0, "E"), 2, "`answer` must be A-D, .*got 'E'"),
        ((0, -1), 2, "`answer` must be A-D, .*got -1; a test split often hides its answers"),
        ((0, True), 2, "`answer` must be A-D, .*got True"),
        ((0, "newton"), 2, "`answer` must be A-D, .*got 'newton'"),
        ((0, 1.5), 2, "`answer` must be A-D, .*got 1.5"),
    ],
)
def test_an_answer_that_cannot_be_told_is_named(tmp_path, answers, line, message):
    with pytest.raises(ValueError, match=rf"q.jsonl:{line}: {message}"):
        load_records(write(tmp_path, *asked(*answers)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["a"]}, "`choices` must be 2 to 10 texts, got 1"),
        ({"choices": list("abcdefghijk")}, "`choices` must be 2 to 10 texts, got 11"),
        ({"choices": ["a", None]}, r"`choices` must be texts, got \['a', None\]"),
        ({"choices": "a;b"}, "`choices` must be a JSON list of texts, got 'a;b'"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "`choices` has 2 texts and the lab"),
        (
            {"choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "C"},
            r"`answer` must be one of the labels \['A', 'B'\], got 'C'",
        ),
        ({"context": 3}, "`context` must be a text, got 3"),
        ({"choices": None}, "missing field choices; of a question without choices say columns"),
    ],
)
def test_a_faulty_question_is_named_by_file_and_line(tmp_path, row, message):
    good = {"question": "Q?", "choices": FOUR, "answer": 0}
    with pytest.raises(ValueError, match=rf"q.jsonl:2: {message}"):
        load_records(write(tmp_path, good, good | row))
