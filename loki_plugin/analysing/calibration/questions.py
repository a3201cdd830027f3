"""Multiple-choice questions as people store them: two to ten choices, and where the answer is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCDEFGHIJ"
# Columns of well-known sets, for who gives no `columns`: ours to theirs.
FORMS: tuple[Mapping[str, str | list[str]], ...] = (
    {"question": "question", "choices": "choices", "answer": "answerKey"},  # ARC, CommonsenseQA
    {"question": "question_stem", "choices": "choices", "answer": "answerKey"},  # OpenBookQA
    {"question": "question", "choices": "options", "answer": "answer"},  # MMLU-Pro, RACE
    {"question": "question", "context": "passage", "answer": "answer"},  # BoolQ
    {"question": "goal", "choices": ["sol1", "sol2"], "answer": "label"},  # PIQA
)


class Label(int):
    """A value of a column whose classes a data set names; those count from 0."""

    name: str

    def __new__(cls, value: int, name: str) -> Label:
        made = super().__new__(cls, value)
        made.name = name
        return made


@dataclass(frozen=True)
class Question:
    """What is asked, the choices, and the answer; `counted` where that counts from 0 or from 1."""

    question: str
    choices: list[str]
    answer: int
    counted: bool = False


def question_of(given: Mapping[str, Any], where: str) -> Question:
    """The fields `question`, `context`, `choices` and `answer` of a row.

    Choices are a list of texts, `{"text": [...], "label": [...]}` or `{"A": ..., "B": ...}`; none
    are needed where the answer is true or false.

    Raises:
        ValueError: a field that is missing or cannot be read.
    """
    answer, whether = given.get("answer"), _whether(given)
    choices = given.get("choices")
    needed = {"answer": answer} if whether is not None else {"choices": choices, "answer": answer}
    missing = [key for key, value in needed.items() if value is None]
    if missing:
        raise ValueError(
            f"{where}: missing field{'s' * (len(missing) > 1)} {', '.join(missing)}; of a question"
            " without choices say columns: {prompt: question, target: answer}"
        )
    question, context = given["question"], given.get("context")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: `question` must be a text, got {question!r}")
    if context is not None and not isinstance(context, str):
        raise ValueError(f"{where}: `context` must be a text, got {context!r}")
    asked = f"{context}\n{question}" if context else question
    if whether is not None:
        return Question(asked, ["yes", "no"], 0 if whether else 1)
    texts, labels = _choices(choices, where)
    index, counted = _answer(answer, len(texts), labels, where)
    return Question(asked, texts, index, counted)


def from_zero(answers: Sequence[tuple[str, int, int]]) -> bool:
    """Whether answers that are numbers count from 0, else from 1; the whole file decides.

    Args:
        answers: for each where it stands, the number, and how many choices there are.

    Raises:
        ValueError: both, or neither can be told.
    """
    zero = next((where for where, number, _ in answers if number == 0), None)
    last = next(((where, n) for where, number, n in answers if number == n), None)
    if zero is not None and last is not None:
        raise ValueError(
            f"{last[0]}: `answer` is {last[1]} of {last[1]} choices, so it counts from 1, but"
            f" {zero} has 0; let all count alike, or write letters"
        )
    if zero is None and last is None and answers:
        raise ValueError(
            f"{answers[0][0]}: it cannot be told whether `answer` counts from 0 or from 1: no"
            " answer of the file is 0, and none is the number of its choices; write letters"
        )
    return zero is not None


def _whether(given: Mapping[str, Any]) -> bool | None:
    """An answer that is true or false, where there is nothing to choose from."""
    answer = given.get("answer")
    if given.get("choices") is not None or isinstance(answer, int) and not isinstance(answer, bool):
        return None
    return {"true": True, "false": False}.get(str(answer).lower())


def _choices(given: Any, where: str) -> tuple[list[str], list[str]]:
    """The texts of the choices, and what the data set calls each of them."""
    found = given
    if isinstance(given, str):  # as a CSV cell holds them
        try:
            found = json.loads(given)
        except ValueError as error:
            raise ValueError(
                f"{where}: `choices` must be a JSON list of texts, got {given!r}"
            ) from error
    labels: list[Any] = []
    if isinstance(found, Mapping) and found.keys() >= {"text", "label"}:
        found, labels = found["text"], list(found["label"])
    elif isinstance(found, Mapping):
        found = {k: v for k, v in found.items() if v is not None}  # tables give all the same keys
        found, labels = list(found.values()), list(found)
    if not isinstance(found, list | tuple) or not 2 <= len(found) <= len(LETTERS):
        count = len(found) if isinstance(found, list | tuple) else repr(found)
        raise ValueError(f"{where}: `choices` must be 2 to {len(LETTERS)} texts, got {count}")
    if any(isinstance(c, bool) or not isinstance(c, str | int | float) for c in found):
        raise ValueError(f"{where}: `choices` must be texts, got {found!r}")
    if labels and len(set(labels)) != len(found):
        raise ValueError(f"{where}: `choices` has {len(found)} texts and the labels {labels}")
    return [str(c) for c in found], [str(label) for label in labels]


def _answer(given: Any, count: int, labels: Sequence[str], where: str) -> tuple[int, bool]:
    """The index of the answer, and whether it may count from 1 as well."""
    told = given.strip() if isinstance(given, str) else given
    if labels:
        if isinstance(told, bool) or str(told) not in labels:
            raise ValueError(f"{where}: `answer` must be one of the labels {labels}, got {given!r}")
        return labels.index(str(told)), False
    letters = LETTERS[:count]
    if isinstance(told, str) and len(told) == 1 and told.upper() in letters:
        return letters.index(told.upper()), False
    number = told
    if isinstance(told, str) and told.isascii() and told.isdigit():
        number = int(told)
    elif isinstance(told, float) and told.is_integer():  # a table with gaps keeps whole numbers so
        number = int(told)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= count:
        hidden = "; a test split often hides its answers, see `split`" if number == -1 else ""
        raise ValueError(
            f"{where}: `answer` must be A-{letters[-1]}, 0-{count - 1}, or 1-{count} in a file that"
            f" counts from 1, got {given!r}{hidden}"
        )
    if isinstance(given, Label):
        if number == count:
            raise ValueError(f"{where}: `answer` is class {number} of {count} choices, from 0")
        return number, False
    return number, True
