"""The table of records in docs/guide.md: what it says is read is read, the rest is refused."""

from __future__ import annotations

import json
import re

import pytest
from helpers.pages import TEXTS
from helpers.tokenizers import make_tokenizer

from loki_plugin.analysing.calibration.files import KINDS as KINDS_OF_FILES
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


SOURCES = TEXTS["docs/guide.md"].split("## Calibration sources")[1].split("### Records")[0]
SUFFIXES = re.findall(r"`(\.\w+)`", SOURCES)


def test_the_table_of_sources_has_every_kind_of_file():
    assert sorted(SUFFIXES) == sorted(KINDS_OF_FILES)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ""])
def test_every_kind_of_file_in_the_table_is_read(tmp_path, suffix):
    """The same two records, and the same two texts; without a suffix: a folder of `datasets`."""
    from datasets import Dataset

    rows = [{"prompt": "say the number", "target": "one"}, {"prompt": "and", "target": "two"}]
    data, path = Dataset.from_list(rows), tmp_path / f"source{suffix}"
    write = {
        ".jsonl": lambda: path.write_text("\n".join(map(json.dumps, rows))),
        ".json": lambda: path.write_text(json.dumps(rows)),
        ".csv": lambda: data.to_csv(path),
        ".parquet": lambda: data.to_parquet(path),
        ".txt": lambda: path.write_text("say the number\n\nand"),
        "": lambda: data.save_to_disk(path),
    }
    write[suffix]()
    found = load_records(str(path))
    said = [record.text if suffix == ".txt" else record.prompt for record in found]
    assert said == ["say the number", "and"]
    if suffix != ".txt":
        assert [record.target for record in found] == ["one", "two"]
