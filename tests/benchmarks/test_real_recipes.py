"""What each file of the real data is made of: recipes on small inputs in their sources' shapes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from benchmarks.real import building
from benchmarks.real.building import lines, measured, sources, taught
from benchmarks.real.data import TEXTS, folder

README = (Path(building.__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def rows(recipe, *texts, paths=()):
    """The records that `recipe` makes of texts; what is no text is written as JSON."""
    made = recipe(named(*texts, paths=paths))
    assert made.endswith("\n")
    return lines.read(made)


def named(*texts, paths=()):
    written = (t if isinstance(t, str) else json.dumps(t) for t in texts)
    return dict(zip(paths or map(str, range(len(texts))), written, strict=True))


def jsonl(*objects):
    return "".join(json.dumps(o) + "\n" for o in objects)


# Multiple choice.


def arc(question, *choices, answer):
    told = " ".join(f"Answer{i}: {c}" for i, c in enumerate(choices, 1))
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n{told}"
        "\n\nAnswer format: answer1/answer2",
        "answer": answer,
    }


def test_arc_is_taken_apart():
    given = [arc("Is it\nso?", "yes", "no, Answer 2", "so so", answer="answer3")]
    assert rows(measured.arc_easy, given, paths=["a/test.json"]) == [
        {"id": "a/test.json#0", "question": "Is it\nso?",
         "choices": ["yes", "no, Answer 2", "so so"], "answer": 2}
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"'0', record 0: .*say"):
        measured.arc_easy(named([{"instruction": "say", "answer": "answer1"}]))


def test_piqa_has_its_answers_in_a_second_file():
    given = jsonl(*({"goal": f"do {i}", "sol1": "a ", "sol2": "b"} for i in range(2)))
    assert rows(measured.piqa, given, "1\n0\n") == [
        {"id": f"piqa-valid-{i}", "question": f"do {i}", "choices": ["a ", "b"], "answer": 1 - i}
        for i in range(2)
    ]
    with pytest.raises(ValueError, match="shorter"):
        measured.piqa(named(given, "1\n"))


def test_hellaswag_has_the_activity_in_front():
    given = {
        "ind": 7,
        "activity_label": "Run",
        "ctx": "He runs.",
        "label": 1,
        "endings": ["a", "b"],
    }
    assert rows(measured.hellaswag, jsonl(given)) == [
        {"id": "hellaswag-7", "question": "Run: He runs.", "choices": ["a", "b"], "answer": 1}
    ]


def test_blimp_is_the_first_forty_of_each():
    def pair(kind, i):
        return {"UID": kind, "pairID": str(i), "field": "f", "linguistics_term": "t",
                "sentence_good": f"It is {i}.", "sentence_bad": f"It are {i}."}  # fmt: skip

    found = rows(measured.blimp, *(jsonl(*(pair(k, i) for i in range(50))) for k in "xy"))
    assert [r["id"] for r in found] == [f"{k}-{i}" for k in "xy" for i in range(40)]
    assert found[41] == {"id": "y-1", "field": "f", "term": "t", "good": "It is 1.",
                         "bad": "It are 1."}  # fmt: skip


# Facts.


def test_relations_have_three_different_prompts():
    given = {"name": "r", "prompt_templates": ["{} is", "{} is", "It: {} is"],
             "prompt_templates_zs": ["What is {}?", "{}?"],
             "samples": [{"subject": f"s{i}", "object": "o"} for i in range(301)]}  # fmt: skip
    found = rows(measured.relations, given, paths=["data/factual/of_it.json"])
    assert len(found) == 300
    assert found[1] == {"id": "of_it-1", "kind": "factual", "relation": "r", "subject": "s1",
                        "object": "o", "prompt": "s1 is",
                        "prompts": ["It: s1 is", "What is s1?"]}  # fmt: skip


def edit(i, prompt=None, locality="Nobody is", subject=None):
    subject = subject or f"S{i}"
    return {"case_id": 10 * i, "subject": subject, "prompt": prompt or f"{subject} speaks",
            "target_new": f"n{i}", "ground_truth": f"t{i}", "rephrase_prompt": f"r{i}",
            "locality_prompt": locality, "locality_ground_truth": "l"}  # fmt: skip


def test_counterfact_leaves_out_whose_neighbour_is_edited():
    given = [edit(0), edit(1, locality="S2 speaks"), edit(2), *map(edit, range(3, 2200))]
    given[3]["locality_prompt"] = "S2150 speaks"  # behind what is looked at
    asked = [{"question": "S2 speaks", "answer": "n2", "qna_question": "What does S2 speak?"},
             {"question": "S3 speaks", "answer": "other", "qna_question": "?"}]  # fmt: skip
    found = rows(taught.counterfact, given, asked)
    assert [r["case_id"] for r in found] == [0, *range(20, 20_010, 10)]
    assert found[1] == {
        "case_id": 20, "subject": "S2", "prompt": "S2 speaks", "target_new": "n2",
        "target_true": "t2", "statement": "S2 speaks n2.", "fluent": True, "rephrase": "r2",
        "locality_prompt": "Nobody is", "locality_object": "l",
        "question": "What does S2 speak?", "qa_answer": "n2",
    }  # fmt: skip
    assert "question" not in found[2]


@pytest.mark.parametrize(
    "subject, prompt, fluent",
    [("Rome", "Rome is in", True), ("Rome", "Rome, located in", False),
     ("Rome", "What is the capital of Rome? It is", False), ("Rome", "In Rome, they speak", True),
     ("Ann, Lady Why?", "Ann, Lady Why? was born in", True), ("Rome", "Rome's capital,", True)],
)  # fmt: skip
def test_fluent_prompts(subject, prompt, fluent):
    (found,) = rows(taught.counterfact, [edit(0, prompt, subject=subject)], [])
    assert found["fluent"] is fluent


def test_known_facts_are_marked_where_they_are_taught():
    facts = [{"known_id": i, "relation_id": "P1", "subject": s, "attribute": "o", "prompt": "p",
              "template": "t"} for i, s in enumerate(["S0", "S1", "V", "X"])]  # fmt: skip
    edits = [edit(0), edit(1, locality="S0 speaks")]  # S1 is left out, so it is not taught
    found = rows(measured.known, facts, edits, [edit(9, subject="V")])
    assert [r["in_newfacts"] for r in found] == [True, False, True, False]
    assert found[3] == {"id": 3, "relation": "P1", "subject": "X", "object": "o", "prompt": "p",
                        "template": "t", "in_newfacts": False}  # fmt: skip


def test_wikidyk_becomes_statements():
    facts = ['that the " Big One " fell?', 'that he asked "who?"?', "it fell?"]
    both = [{"id": i, "year": "2023", "fact": f, "input": "q", "output": "a"}
            for i, f in enumerate(facts)]  # fmt: skip
    found = rows(taught.wikidyk, {"name": "wikidyk", "dev": both[:1], "test": both[1:]})
    statements = ['The "Big One" fell.', 'He asked "who?"', "It fell."]
    assert [r["statement"] for r in found] == statements
    assert found[2] == {"id": 2, "year": "2023", "statement": "It fell.", "question": "q",
                        "answer": "a"}  # fmt: skip


# Texts.


def test_a_text_is_cut_behind_a_whole_line_of_bytes():
    line = "ä" * 49_999 + "\n"  # 99,999 bytes: two fit into 200,000
    assert measured.wikipedia(named(3 * line)) == 2 * line
    assert measured.wikipedia(named("short, no end")) == "short, no end"


def test_pages_have_an_empty_line_between_them():
    assert measured.web(named(jsonl({"text": "a\nb"}, {"text": "c"}))) == "a\nb\n\nc"


def test_sentences_of_conllu():
    first = (
        "# newdoc id = a\n# newpar\n# newpar_block = p (2 s)\n# text = A b.\n1\tA\n# text = C.\n"
    )
    second = "# newdoc id = b\n# text = No paragraph.\n\n# newpar\n# text = D.\n"
    made = measured.news(named(first, second))
    assert made == "A b. C.\n\nNo paragraph.\n\nD.\n"
    assert measured.news(named(first, first)) == "A b. C.\n\n\n\nA b. C.\n"
    assert measured.sentences(named(first)) == "A b.\nC.\n"


def test_the_book_is_unwrapped_and_begins_behind_its_first_quarter():
    def made(body):
        whole = f"licence\r\n***START OF IT***\r\n{body}***END OF IT***licence"
        return measured.cranford(named(whole))

    second = "two\r\ntwo  two\r\n\r\n\r\n" + "three " * 8 + "."
    # joined: breaks at 21, 26 and 40 of 92 letters
    assert made(f"x\r\ny\r\n\r\nzzz\r\n\r\n{second}") == f"two two  two\n\n\n{'three ' * 8}."
    most = made("\r\n\r\n".join(4 * ["b" * 60_000]))
    assert most == 2 * ("b" * 60_000 + "\n\n")  # of three


def test_code_is_named():
    given = {"src/a/b.py": "x = 1\n", "src/c.py": "y\n"}
    assert measured.code(given) == "# a/b.py\nx = 1\n\n# c.py\ny\n\n"


def test_maths_as_text_has_no_marks():
    given = jsonl({"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"})
    made = "Question: 1+1?\nAnswer: It is 2.\nThe answer is 2\n\n"
    assert measured.problems(named(given)) == made
    assert measured.problems(named(600 * given)) == 500 * made


def test_service_dialogues():
    said = [{"speaker": "USER", "utterance": "Hi"}, {"speaker": "SYSTEM", "utterance": "Yes?"}]
    one = [{"turns": said}, {"turns": said[:1]}]
    assert (
        measured.service(named(one, one[1:])) == "User: Hi\nAssistant: Yes?\n\nUser: Hi\n\nUser: Hi"
    )


# Dialogues.


def test_oasst_follows_the_best_ranks():
    def message(i, parent, role, rank=None, written="2023-02"):
        return {"message_id": i, "parent_id": parent, "role": role, "rank": rank, "text": f"t-{i}",
                "created_date": written}  # fmt: skip

    given = jsonl(
        message("a", None, "prompter"),
        message("b", "a", "assistant", 1), message("n", "a", "assistant"),
        message("c", "a", "assistant", 0),
        message("d", "c", "prompter", written="2023-03"), message("e", "c", "prompter"),
        message("f", "e", "assistant"), message("g", "f", "prompter"),
        message("h", None, "prompter"),
    )  # fmt: skip
    said = [("user", "t-a"), ("assistant", "t-c"), ("user", "t-e"), ("assistant", "t-f")]
    assert rows(measured.oasst, given) == [
        {"id": "a", "messages": [{"role": r, "content": c} for r, c in said]}
    ]  # "g" and "h" have no answer


def test_instructions_have_their_input_behind_them():
    def task(i, given):
        return {"id": i, "instruction": "Do", "instances": [{"input": given, "output": "done"}]}

    found = rows(measured.instructions, jsonl(task("x", ""), task("y", "this")))
    assert [r["messages"][0] for r in found] == [
        {"role": "user", "content": "Do"}, {"role": "user", "content": "Do\n\nthis"}
    ]  # fmt: skip
    assert found[0]["id"] == "x"
    assert found[0]["messages"][1] == {"role": "assistant", "content": "done"}


# Tasks.


def test_banking_is_read_as_csv():
    given = 'text,category\n"one, ""two""\nthree",card\nfour,cash\n'
    assert rows(taught.banking, given) == [
        {"text": 'one, "two"\nthree', "label": "card"}, {"text": "four", "label": "cash"}
    ]  # fmt: skip


def test_snips_joins_the_parts():
    parts = [{"text": " add "}, {"text": "this", "entity": "item"}, {"text": " to "},
             {"text": "mine", "entity": "list"}, {"text": " "}]  # fmt: skip
    assert rows(taught.snips, {"Add": [{"data": parts}]}, {"Play": [{"data": []}]}) == [
        {"text": "add this to mine", "label": "Add", "slots": {"item": "this", "list": "mine"}},
        {"text": "", "label": "Play", "slots": {}},
    ]


def test_gsm8k_is_as_it_was():
    given = [{"question": f"q{i} ’", "answer": "<<1>>\n#### 1"} for i in range(2001)]
    assert rows(taught.gsm8k, jsonl(*given)) == given
    assert rows(taught.gsm8k_2000, jsonl(*given)) == given[:2000]
    assert "’" in taught.gsm8k(named(jsonl(*given)))


def calls(i, accept, name="f", required=(), about="", **properties):
    """A question of BFCL with one function, and what is accepted."""
    function = {"name": name, "description": about,
                "parameters": {"type": "dict", "properties": properties,
                               "required": list(required)}}  # fmt: skip
    said = [{"role": "user", "content": "do"}]
    return ({"id": i, "question": [said], "function": [function]},
            {"id": i, "ground_truth": [{name: accept}]})  # fmt: skip


def bfcl(*pairs):
    """What is made to train on and to test with, by the recipes of the two files."""
    texts = named(*(jsonl(*half) for half in zip(*pairs, strict=True)))
    return tuple(lines.read(r(texts)) for r in (taught.bfcl_train, taught.bfcl_test))


def by_id(*pairs):
    return {row["id"]: row for part in bfcl(*pairs) for row in part}


def test_calls_take_first_values_and_no_optional_argument():
    value = {"type": "float", "items": {"type": "tuple", "items": {"type": "any"}}}
    accept = {"a": [3, 4], "b": ["", "x"], "c": ["", 5], "d": [{"k": [1], "l": [""]}]}
    found = by_id(
        calls("live_simple_1-0", accept, required=("a", "c"), a=value, b=value, c=value, d=value)
    )["live_simple_1-0"]
    assert found["target"] == [{"name": "f", "arguments": {"a": 3, "d": {"k": 1}, "c": 5}}]
    assert list(found["target"][0]["arguments"]) == ["a", "d", "c"]
    assert found["accept"] == [{"f": accept}]
    schema = found["tools"][0]["parameters"]
    assert schema["type"] == "object"
    items = {"type": "array", "items": {"type": "string"}}
    assert schema["properties"]["a"] == {"type": "number", "items": items}
    assert found["category"] == "live_simple"
    assert found["messages"] == [{"role": "user", "content": "do"}]


@pytest.mark.parametrize(
    "accept, required, about",
    [({"a": []}, (), ""), ({"x": [1]}, (), ""), ({}, ("a",), ""), ({"a": [1]}, (), "long" * 1000)],
    ids=["nothing accepted", "no such argument", "required and not accepted", "large"],
)
def test_calls_without_an_answer_are_left_out(accept, required, about):
    kept = calls("simple_0", {"a": [1]}, a={"type": "any"})
    found = by_id(kept, calls("simple_1", accept, required=required, about=about, a={}))
    assert list(found) == ["simple_0"]


def test_a_fifth_of_the_toolsets_is_for_testing():
    pairs = [calls(f"simple_{i}", {}, name=f"f{i}") for i in range(200)]
    learned, tested = bfcl(*pairs)
    assert 20 < len(tested) < 60 and len(learned) + len(tested) == 200
    for row in learned + tested:
        name = row["tools"][0]["name"]
        assert row["group"] == int(hashlib.md5(name.encode()).hexdigest(), 16) % 10**9
    assert all(r["group"] % 5 == 0 for r in tested) and all(r["group"] % 5 for r in learned)
    assert all(r["called_tools_unseen"] for r in tested)
    # the same function, beside another one, is in a toolset for training
    name = tested[0]["tools"][0]["name"]
    for other in range(200):
        question, accepted = calls("multiple_0", {}, name=name)
        question["function"].insert(0, {"name": f"g{other}", "parameters": {"properties": {}}})
        more, tests = bfcl(*pairs, (question, accepted))
        if len(more) > len(learned):
            break
    assert [r["called_tools_unseen"] for r in tests] == [r is not tests[0] for r in tests]


# The table of files.


def test_the_page_has_every_file_with_its_sources():
    told = dict(re.findall(r"^\| `([^`]+)` \|(.*)$", README, re.MULTILINE))
    told = {name: rest for name, rest in told.items() if "." in name}
    assert list(told) == list(sources.FILES)
    for name, file in sources.FILES.items():
        commits = {f"{r}@{sources.COMMITS[r][:12]}:" for r, _ in file.sources}
        assert commits == set(re.findall(r"[\w.-]+/[\w.-]+@[0-9a-f]{12}:", told[name]))
        assert len({path for _, path in file.sources}) == len(file.sources)  # keys of a recipe
    assert {f"{t}.txt" for t in TEXTS.values()} <= set(sources.FILES)


def test_the_folder_here_is_the_one_that_was_measured():
    there = [n for n in sources.FILES if (folder() / n).is_file()]
    if not there:
        pytest.skip(f"no data in '{folder()}' (python -m benchmarks.real data)")
    for name in there:
        found = hashlib.sha256((folder() / name).read_bytes()).hexdigest()
        assert found == sources.FILES[name].sha256, name
