"""The table of records in docs/guide.md: what it says is read is read, the rest is refused."""

from __future__ import annotations

import json
import re

import pytest
from helpers.pages import TEXTS
from helpers.tokenizers import make_tokenizer

from loki_plugin.analysing.calibration.prompts import load_prompts, load_texts
from loki_plugin.analysing.calibration.sources import load_records

ROW = re.compile(r"^\| `(\{.*\})` \| (.*) \|$", re.MULTILINE)
SECTION = TEXTS["docs/guide.md"].split("### Records")[1].split("\n## ")[0]
ROWS = ROW.findall(SECTION)
KINDS = {"question": "question", "prompt": "prompt", "text": "text", "dialogue": "messages"}


def test_the_table_has_both():
    lines = [line for line in SECTION.splitlines() if line.startswith("| `")]
    assert len(lines) == len(ROWS) > 20
    assert sum("refused" in what for _, what in ROWS) > 8


@pytest.mark.parametrize(("record", "what"), ROWS)
def test_the_page_says_what_becomes_of_a_record(tmp_path, record, what):
    from axolotl.utils.chat_templates import get_chat_template

    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(json.loads(record)) + "\n")
    if what.startswith("refused"):
        message = re.search(r": (?:`` (.*) ``|`(.*)`)$", what)
        with pytest.raises(ValueError, match=r"file.jsonl:1: ") as caught:
            load_records(str(path))
        assert (message[1] or message[2]) in str(caught.value)
        return
    kind = KINDS[what.removeprefix("a ").split()[0].strip(",;")]
    read = load_records(str(path))[0]
    assert getattr(read, kind) is not None
    assert all(getattr(read, other) is None for other in KINDS.values() if other != kind)
    tokenizer = make_tokenizer(tmp_path, get_chat_template("qwen_25"))
    assert load_texts(tokenizer, [read])
    assert load_prompts(tokenizer, str(path), records=[read]).prompts
