"""Calibration prompts: the shipped questions, the sources, and the very text of a prompt."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from importlib import resources
from itertools import groupby
from pathlib import Path

import pytest
from helpers.tokenizers import CHATML, make_tokenizer

from loki_plugin.analysing.calibration.prompts import load_prompts, load_texts, question_text
from loki_plugin.analysing.calibration.sources import load_records

GOLDEN = Path(__file__).parent / "golden"
QUESTION = {
    "subject": "high_school_physics",
    "question": "Which unit measures force?",
    "choices": ["newton", "joule", "watt", "pascal"],
    "answer": 0,
}
TEMPLATES = {
    "none": None,
    "chatml": CHATML,
    "llama3": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role']"
        " + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
        "{% endif %}"
    ),
    "gemma": (
        "{{ '<bos>' }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] =="
        " 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(tmp_path, rows, name="questions.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def test_the_shipped_questions_are_complete_and_balanced():
    file = resources.files("loki_plugin.analysing.calibration") / "data" / "builtin.jsonl"
    content = file.read_bytes()
    assert hashlib.sha256(content).hexdigest() == (GOLDEN / "builtin.sha256").read_text().strip()
    rows = [json.loads(line) for line in content.decode().splitlines()]
    subjects = Counter(r["subject"] for r in rows)
    assert len(subjects) == 57 and set(subjects.values()) == {10}
    for subject in subjects:
        answers = Counter(r["answer"] for r in rows if r["subject"] == subject)
        assert set(answers) == {0, 1, 2, 3} and max(answers.values()) <= 3, subject
    assert len({r["question"].strip().lower() for r in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["subject", "question", "choices", "answer"]
        texts = [row["question"], *row["choices"]]
        assert all(t == t.strip() and t for t in texts), row
        assert len(set(row["choices"])) == 4, row
    longest = sum(max(range(4), key=lambda i: len(r["choices"][i])) == r["answer"] for r in rows)
    assert 0.15 < longest / len(rows) < 0.35  # length must not give the answer away


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_text_is_exactly_this(tokenizer, tmp_path, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATES[template])
    source = write(tmp_path, [QUESTION])
    (prompt,) = load_prompts(tokenizer, source).prompts
    assert tokenizer.decode(prompt.ids) == (GOLDEN / f"{template}.txt").read_text()


def test_the_user_message_is_the_papers():
    assert question_text("high_school_physics", "Q?", ["a", "b", "c", "d"]) == (
        "There is a single choice question about High School Physics. Answer the question by"
        " replying A, B, C or D.\nQuestion: Q?\nChoices:\nA. a\nB. b\nC. c\nD. d\nAnswer: \n"
    )


def test_the_message_says_as_many_letters_as_there_are_choices_and_no_empty_subject():
    assert question_text("", "Q?", ["a", "b"]) == (
        "There is a single choice question. Answer the question by replying A or B.\n"
        "Question: Q?\nChoices:\nA. a\nB. b\nAnswer: \n"
    )
    ten = question_text("law", "Q?", list("abcdefghij"))
    assert "replying A, B, C, D, E, F, G, H, I or J.\n" in ten and "J. j\nAnswer: \n" in ten


def test_the_order_of_the_source_does_not_matter(tokenizer, tmp_path):
    rows = [QUESTION | {"question": f"What is {i}?"} for i in range(20)]
    one = load_prompts(tokenizer, write(tmp_path, rows))
    other = load_prompts(tokenizer, write(tmp_path, rows[::-1], "reversed.jsonl"))
    assert one.prompts == other.prompts and one.hash == other.hash
    assert [len(p.ids) for p in one.prompts] == sorted(len(p.ids) for p in one.prompts)
    fewer = load_prompts(tokenizer, write(tmp_path, rows[1:], "fewer.jsonl"))
    assert fewer.hash != one.hash


def test_gold_targets_are_the_letter_and_the_first_token_of_a_target(tokenizer, tmp_path):
    rows = [QUESTION | {"answer": "C"}, {"prompt": "say", "target": "number one"}]
    gold = load_prompts(tokenizer, write(tmp_path, rows), target="gold").prompts
    first = [tokenizer("C")["input_ids"][0], tokenizer("number one")["input_ids"][0]]
    assert sorted(p.target for p in gold) == sorted(first)
    predicted = load_prompts(tokenizer, write(tmp_path, rows)).prompts
    assert [p.target for p in predicted] == [None, None]
    with pytest.raises(ValueError, match=r"open.jsonl:1: calibration.target is 'gold', but"):
        load_prompts(tokenizer, write(tmp_path, [{"prompt": "x"}], "open.jsonl"), target="gold")


def test_a_gold_target_is_the_token_that_follows_the_prompt(tmp_path):
    """Llama 2's tokenizer, say, begins every text with a space that stands behind no prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁say", "\n", "A", "▁A", "▁"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Split("\n", "isolated"),
        ]
    )
    inner.decoder = decoders.Metaspace()
    plain = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert plain("A")["input_ids"] == [words.index("▁A")]
    source = write(tmp_path, [{"prompt": "say", "target": "A"}])
    (prompt,) = load_prompts(plain, source, target="gold").prompts
    assert prompt.ids == (1, 2) and prompt.target == words.index("A")


def test_a_model_that_thinks_is_asked_for_its_answer(tmp_path):
    from axolotl.utils.chat_templates import get_chat_template

    thinking = make_tokenizer(tmp_path, chat_template=get_chat_template("qwen3"))
    (prompt,) = load_prompts(thinking, write(tmp_path, [QUESTION])).prompts
    assert thinking.decode(prompt.ids).endswith("assistant\n<think>\n\n</think>\n\n")


def test_samples_per_subject_draws_and_long_prompts_are_dropped_whole(tokenizer, tmp_path):
    rows = [
        QUESTION | {"subject": s, "question": f"{s} {i}?" + "!" * i}
        for s in ("a", "b")
        for i in range(9)
    ]
    source = write(tmp_path, rows)
    drawn = load_prompts(tokenizer, source, samples_per_subject=4)
    assert Counter(p.subject for p in drawn.prompts) == {"a": 4, "b": 4}
    assert drawn.hash == load_prompts(tokenizer, source, samples_per_subject=4).hash
    assert drawn.hash != load_prompts(tokenizer, source, samples_per_subject=4, seed=1).hash
    every = load_prompts(tokenizer, source).prompts
    limit = len(every[9].ids)
    short = load_prompts(tokenizer, source, max_tokens=limit)
    kept = [p for p in every if len(p.ids) <= limit]
    assert short.prompts == kept and short.dropped == 18 - len(kept) > 0
    with pytest.raises(ValueError, match="all 18 are longer than max_tokens = 5"):
        load_prompts(tokenizer, source, max_tokens=5)


def test_a_dialogue_is_asked_up_to_its_last_answer_and_protects_with_all_of_it(tokenizer, tmp_path):
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "say the number"},
        {"role": "assistant", "content": "seven"},
    ]
    whole = tokenizer.apply_chat_template(said)["input_ids"]
    asked = tokenizer.apply_chat_template(said[:2], add_generation_prompt=True)["input_ids"]
    rows = [{"messages": said}, {"messages": said[:2]}]
    source = write(tmp_path, rows)
    with_answer = load_prompts(tokenizer, write(tmp_path, rows[:1], "one.jsonl"), target="gold")
    (prompt,) = with_answer.prompts
    assert list(prompt.ids) == asked and prompt.target == tokenizer("seven")["input_ids"][0]
    (same,) = load_prompts(tokenizer, source).prompts  # of both rows: without the answer
    assert list(same.ids) == asked and same.target is None
    records = load_records(source)
    assert load_texts(tokenizer, records)[0] == tuple(whole)
    other = [{"turns": said, "messages": "of another kind"}]
    file = write(tmp_path, other, "named.jsonl")
    assert load_records(file, {"messages": "turns"})[0].messages == records[0].messages


def test_a_dialogue_that_the_template_refuses_is_named(tmp_path):
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    tokenizer = make_tokenizer(tmp_path, strict)
    said = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    source = write(tmp_path, [{"messages": said}])
    for read in (
        lambda: load_prompts(tokenizer, source),
        lambda: load_texts(tokenizer, load_records(source)),
    ):
        with pytest.raises(
            ValueError, match="questions.jsonl:1: the chat template refuses .* no sys"
        ):
            read()


def test_few_shot_examples_are_solved_and_never_the_question_itself(tokenizer, tmp_path):
    rows = [QUESTION | {"question": f"Number {i}?", "answer": i % 4} for i in range(6)]
    shots = []
    for prompt in load_prompts(tokenizer, write(tmp_path, rows), few_shot=2).prompts:
        text = tokenizer.decode(prompt.ids)
        shots.append(text.rpartition("Question: ")[0])
        asked = [line for line in text.splitlines() if line.startswith("Question: ")]
        assert len(asked) == 3 == len(set(asked))
        for shot in asked[:2]:
            letter = "ABCD"[int(shot.split()[2].rstrip("?")) % 4]
            assert f"assistant\n{letter}<|im_end|>" in text
    # Prompts with the same examples are neighbours, so that batches can run the examples once.
    assert len(list(groupby(shots))) == len(set(shots)) < len(shots)
    with pytest.raises(ValueError, match="few_shot = 6 needs more than 6 questions per subject"):
        load_prompts(tokenizer, write(tmp_path, rows), few_shot=6)


def test_csv_parquet_text_and_columns(tokenizer, tmp_path):
    import pyarrow
    import pyarrow.parquet

    wanted = load_prompts(tokenizer, write(tmp_path, [QUESTION])).hash
    cell = json.dumps(QUESTION["choices"]).replace('"', '""')
    table = f'subject,q,choices,answer\n{QUESTION["subject"]},{QUESTION["question"]},"{cell}",0\n'
    (tmp_path / "q.csv").write_text(table)
    found = load_prompts(tokenizer, str(tmp_path / "q.csv"), columns={"question": "q"})
    assert found.hash == wanted
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([QUESTION]), tmp_path / "q.parquet")
    assert load_prompts(tokenizer, str(tmp_path / "q.parquet")).hash == wanted

    (tmp_path / "t.txt").write_text("first text\nsame text\n\n\nsecond text\n")
    texts = load_records(str(tmp_path / "t.txt"))
    assert [(r.text, r.where[-1]) for r in texts] == [
        ("first text\nsame text", "1"),
        ("second text", "5"),
    ]
    for prompt in load_prompts(tokenizer, str(tmp_path / "t.txt"), target="gold").prompts:
        text = tokenizer.decode([*prompt.ids, prompt.target])
        assert any(r.text.startswith(text) for r in texts)


# What `str.splitlines` takes for the end of a line, and JSON, CSV and plain text do not.
NOT_LINE_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_characters_that_end_no_line_stay_in_the_text(tmp_path, end):
    asked = f"one{NOT_LINE_ENDS}two"
    allowed = asked.translate(dict.fromkeys(range(32)))  # which JSON refuses unescaped
    rows = [json.dumps({"prompt": p}, ensure_ascii=False) for p in (allowed, "next")]
    (tmp_path / "p.jsonl").write_bytes(end.join([*rows, ""]).encode())
    (tmp_path / "p.csv").write_bytes(end.join(["prompt", asked, "next", ""]).encode())
    (tmp_path / "p.txt").write_bytes(end.join([asked, "", "next", ""]).encode())
    for name, text in (("p.jsonl", allowed), ("p.csv", asked), ("p.txt", asked)):
        records = load_records(str(tmp_path / name))
        assert [r.prompt or r.text for r in records] == [text, "next"], name


def test_a_question_is_never_an_example_of_itself(tokenizer, tmp_path):
    """Nor where a file has it twice."""
    path = tmp_path / "q.jsonl"
    choices = {"choices": [" a", " b"], "answer": "B", "subject": "s"}
    asked = ["say one", "say one", "say two", "say three"]
    path.write_text("".join(json.dumps({"question": q, **choices}) + "\n" for q in asked))
    for seed in range(6):
        found = load_prompts(tokenizer, str(path), few_shot=2, seed=seed).prompts
        assert len(found) == 3
        for prompt in found:
            text = tokenizer.decode(prompt.ids)
            assert [text.count(question) for question in asked[1:]] == [1, 1, 1], text
    with pytest.raises(ValueError, match="subject 's' has 3"):
        load_prompts(tokenizer, str(path), few_shot=3)


def test_csv_choices_and_answer_may_stand_under_other_names(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('q,options,right\nQ?,"[""a"", ""b"", ""c"", ""d""]",C\nQ?,a;b;c;d,C\n')
    columns = {"question": "q", "choices": "options", "answer": "right"}
    with pytest.raises(ValueError, match="p.csv:3: `choices` must be a JSON list of texts"):
        load_records(str(path), columns)
    path.write_text(path.read_text().replace("Q?,a;b;c;d,C\n", ""))
    (record,) = load_records(str(path), columns)
    assert record.choices == ["a", "b", "c", "d"] and record.answer == 2


def test_what_columns_name_is_read_not_what_happens_to_be_called_so(tmp_path):
    source = write(tmp_path, [{"question": "1 + 1?", "answer": "two", "prompt": "p", "body": "b"}])
    (record,) = load_records(source, {"prompt": "question", "target": "answer"})
    assert (record.prompt, record.target, record.question) == ("1 + 1?", "two", None)
    (record,) = load_records(source, {"text": "body"})
    assert record.text == "b" and record.prompt is None


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.csv", "prompt\nsay\n"), ("p.jsonl", '{"prompt": "say"}\n'), ("p.txt", "say\n")],
)
def test_a_byte_order_mark_is_no_content(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    (record,) = load_records(str(tmp_path / name))
    assert (record.prompt or record.text) == "say"


def test_mmlu_is_drawn_from_the_hub(tokenizer, monkeypatch):
    import datasets

    rows = [QUESTION | {"question": f"{s} {i}?", "subject": s} for s in "ab" for i in range(60)]
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return {"test": rows, "validation": []}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts = load_prompts(tokenizer, "mmlu").prompts
    assert asked == [("cais/mmlu", "all")]
    assert Counter(p.subject for p in prompts) == {"a": 50, "b": 50}
    with pytest.raises(ValueError, match=r"split 'train' is not in 'cais/mmlu'; it has \['test'"):
        load_prompts(tokenizer, "mmlu", split="train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"question": "Q?", "answer": 1}, "missing field choices"),
        ({"question": "Q?"}, "missing fields choices, answer"),
        ({"text": "one two", "target": "x"}, "`target` is what follows a `prompt`"),
        (QUESTION | {"question": " "}, "`question` must be a text"),
        ({"prompt": 3}, "`prompt` must be a text, got 3"),
        ({"prompt": "x", "target": ""}, "`target` must be a text"),
        ({"colour": "red"}, r"needs `question`.*it has \['colour'\]"),
    ],
)
def test_a_faulty_record_is_named_by_file_and_line(tokenizer, tmp_path, row, message):
    source = write(tmp_path, [QUESTION, row])
    with pytest.raises(ValueError, match=rf"questions.jsonl:2: {message}"):
        load_prompts(tokenizer, source)


def test_faulty_sources_are_named(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="empty.jsonl' is empty; it needs at least one record"):
        load_prompts(tokenizer, write(tmp_path, [], "empty.jsonl"))
    with pytest.raises(ValueError, match="gone.csv' does not exist or is not a file"):
        load_prompts(tokenizer, str(tmp_path / "gone.csv"))
    with pytest.raises(ValueError, match="'no/such-set' is neither `builtin`"):
        load_prompts(tokenizer, "no/such-set")
    with pytest.raises(ValueError, match=r"columns names unknown fields \['colour'\]"):
        load_prompts(tokenizer, write(tmp_path, [QUESTION]), columns={"colour": "x"})
    with pytest.raises(ValueError, match=r"columns \['q'\] are missing or empty"):
        load_prompts(tokenizer, write(tmp_path, [QUESTION]), columns={"question": "q"})


def test_a_tokenizer_that_makes_no_token_of_a_prompt_is_named(tmp_path):
    class Empty:  # as transformers makes one of a folder without a tokenizer's files
        chat_template = None

        def __call__(self, text, **_):
            return {"input_ids": []}

    (tmp_path / "p.jsonl").write_text('{"prompt": "say a number"}\n')
    with pytest.raises(ValueError, match="p.jsonl:1: the tokenizer makes no token of it"):
        load_prompts(Empty(), str(tmp_path / "p.jsonl"))
