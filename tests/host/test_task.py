"""What a trainer trains on, as token ids, in each form that trainers have it in."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from datasets import Dataset, IterableDataset
from helpers.families import tiny
from helpers.tokenizers import make_tokenizer

from loki_plugin.choices import TASK_TOKENS
from loki_plugin.host.task import LONGEST, TEXTS, task_texts
from loki_plugin.model.positions import positions_of


def trainer(rows, tokenizer=None, family="llama"):
    model = tiny(family)
    return SimpleNamespace(train_dataset=rows, processing_class=tokenizer, model=model)


def test_texts_are_evenly_spaced_and_all_there_are_of_a_few():
    few = Dataset.from_list([{"input_ids": [i, i + 1]} for i in range(5)])
    assert sorted(task_texts(trainer(few))) == [[i, i + 1] for i in range(5)]
    many = Dataset.from_list([{"input_ids": [i, i + 1]} for i in range(640)])
    assert sorted(ids[0] for ids in task_texts(trainer(many))) == list(range(0, 640, 10))
    # Where a limit is reached, what was read so far is from all over the set too.
    long = Dataset.from_list([{"input_ids": [i] * 1500} for i in range(640)])
    found = sorted(ids[0] for ids in task_texts(trainer(long)))
    assert len(found) == TASK_TOKENS // 1500 and found[0] < 64 and found[-1] >= 576
    assert max(b - a for a, b in zip(found, found[1:], strict=False)) <= 40


def test_of_a_stream_the_first_ones_are_taken_and_it_begins_anew():
    stream = IterableDataset.from_generator(lambda: ({"input_ids": [i, 1]} for i in range(999)))
    assert [ids[0] for ids in task_texts(trainer(stream))] == list(range(TEXTS))
    assert next(iter(stream))["input_ids"] == [0, 1]


def test_of_a_long_text_its_end_is_taken_and_all_keep_to_a_limit():
    long = Dataset.from_list([{"input_ids": list(range(5000))}] * TEXTS)
    found = task_texts(trainer(long))
    assert {tuple(ids) for ids in found} == {tuple(range(5000 - LONGEST, 5000))}
    assert sum(map(len, found)) == TASK_TOKENS  # 16 of them


def test_padding_is_no_text_of_the_task(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    pad = tokenizer.pad_token_id
    rows = [{"input_ids": [5, pad, 6, pad], "attention_mask": [1, 0, 1, 0]}]
    assert task_texts(trainer(rows, tokenizer)) == [[5, 6]]
    assert task_texts(trainer([{"input_ids": [5, 6, pad, pad]}], tokenizer)) == [[5, 6]]


def test_no_text_is_longer_than_the_table_of_positions():
    rows = [{"input_ids": list(range(500))}]
    found = task_texts(trainer(rows, family="gpt2"))
    assert found == [list(range(500))[-positions_of(tiny("gpt2")) :]]


def test_reading_a_stream_that_draws_changes_nothing_that_the_run_draws():
    def rows():
        for _ in range(TEXTS):
            yield {"input_ids": torch.randint(99, (4,)).tolist()}

    class Stream:
        def __iter__(self):
            return rows()

    asked = trainer(Stream())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, second = task_texts(asked), task_texts(asked)
    assert first == second and len(first) == TEXTS
    assert torch.equal(torch.get_rng_state(), state)


def test_of_preferences_a_prompt_and_its_chosen_answer_are_taken():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}]
    assert task_texts(trainer(Dataset.from_list(rows))) == [[1, 2, 3]]
    rows = [{"prompt_ids": [1, 2], "completion_ids": [5], "label": True}]
    assert task_texts(trainer(Dataset.from_list(rows))) == [[1, 2, 5]]
    rows = [{"prompt_input_ids": [1], "chosen_input_ids": [1, 6], "rejected_input_ids": [1, 7]}]
    assert task_texts(trainer(Dataset.from_list(rows))) == [[1, 6]]


def test_prompts_alone_are_told_by_the_tokenizer(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    plain = task_texts(trainer([{"prompt": "say seven"}], tokenizer))
    assert plain == [tokenizer("say seven")["input_ids"]]
    turns = [{"role": "user", "content": "say seven"}]
    (asked,) = task_texts(trainer([{"prompt": turns}], tokenizer))
    assert asked == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def test_of_messages_beside_images_the_words_are_read(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    parts = [{"type": "image"}, {"type": "text", "text": "say seven"}]
    rows = [{"messages": [{"role": "user", "content": parts}], "images": ["x.png"]}]
    (found,) = task_texts(trainer(rows, SimpleNamespace(tokenizer=tokenizer)))
    turns = [{"role": "user", "content": "say seven"}]
    assert found == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)


def test_what_cannot_be_read_gives_nothing_and_is_told(tmp_path, our_log):
    tokenizer = make_tokenizer(tmp_path)
    for told in (["a"], [["a"]], [{"from": "human", "value": "a"}], torch.ones(3)):
        our_log.clear()
        assert task_texts(trainer([{"prompt": told}, {"input_ids": [1, 2]}], tokenizer)) == [[1, 2]]
        counted = "1 rows of the training set could not be told as text" in our_log.text
        assert counted == isinstance(told, list), told
    for rows in (None, [], [{"messages": []}], [{"input_ids": None}], [{"input_ids": [7]}], ["x"]):
        assert task_texts(trainer(rows)) == []
