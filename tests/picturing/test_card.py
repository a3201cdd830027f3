"""The model card: our section beside the words of others, with the figures of the report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import markdown
import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.analyses import analysed
from test_page import EVIL, Reader, put, report_of
from transformers import AutoModelForCausalLM

from loki_plugin import RowSelection, implant
from loki_plugin.cli import loki
from loki_plugin.implanting import card
from loki_plugin.picturing.card import write_adapter_card

CONFIG = ["tables", "fenced_code"]


def parts(folder):
    """(the fields, the text, our section of it) of a card."""
    text = (Path(folder) / "README.md").read_text(encoding="utf-8")
    _, head, body = re.split(r"^---\n", text, maxsplit=2, flags=re.M)
    assert body.count(card.START) == body.count(card.END) == 1
    return yaml.safe_load(head), body, body.split(card.START)[1].split(card.END)[0]


def cells(section):
    """The rows of the tables as a browser has them; what was trained comes before its proof."""
    page = markdown.markdown(section, extensions=CONFIG)
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>\s*</tr>", page, re.S)
    assert rows and "|--" not in page
    return {"".join(Reader(k).text): "".join(Reader(v).text) for k, v in reversed(rows)}


def test_only_our_section_is_replaced(tmp_path):
    theirs = "---\nlicense: mit\ntags:\n- mine\nbase_model: theirs\n---\n\n# Mine\n\nA text.\n"
    (tmp_path / "README.md").write_text(theirs)
    fields = {"base_model": "ours", "library_name": "peft", "tags": ["loki"]}
    card.put(tmp_path, "first", fields)
    with (tmp_path / "README.md").open("a") as file:
        file.write("\nAnd more of it.\n")
    card.put(tmp_path, "second", fields)
    found, body, section = parts(tmp_path)
    assert found == {
        "base_model": "theirs",
        "library_name": "peft",
        "tags": ["mine", "loki"],
        "license": "mit",
    }
    assert section.strip() == "second" and "first" not in body
    assert body.index("# Mine\n\nA text.") < body.index("And more of it.")
    card.put(tmp_path, "second", fields)
    assert parts(tmp_path)[1] == body
    card.withdraw(tmp_path)
    left = (tmp_path / "README.md").read_text()
    assert card.START not in left and "A text." in left and "And more of it." in left
    with pytest.raises(ValueError, match="are no YAML"):
        (tmp_path / "README.md").write_text("---\na: [\n---\nx")
        card.put(tmp_path, "third", fields)


def test_whatever_comes_from_outside_is_text(tmp_path):
    evil = f"{EVIL} {card.END} | a\n# b **c** `d` [e](//f)"
    torch.manual_seed(0)
    _, selection = analysed(tmp_path / "cache", torch.randn(20, 3, 40))
    made = selection.made | {"calibration": {"source": evil, "prompts": 3}, "strategy": evil}
    selection = RowSelection(selection.rows, 40, {"quantisation": evil}, made)
    selection.save(tmp_path / "loki_rows.json")
    put(tmp_path, report_of(selection, base_model=evil, faults=[evil], rows_from=evil))
    write_adapter_card(tmp_path)
    fields, _, section = parts(tmp_path)
    assert fields["base_model"] == evil
    page = Reader(markdown.markdown(section, extensions=CONFIG))
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "a", "h1"} and "table" in tags
    said = " ".join(evil.split())
    shown = cells(section)
    assert shown["Base"] == said and shown["Rows from"] == said
    assert "Do not use this adapter" in section
    assert any(said in " ".join(text.split()) for text in page.text)


def test_an_adapter_that_is_overwritten_loses_the_section_of_the_one_before(tmp_path, base):
    model = implant(AutoModelForCausalLM.from_pretrained(base), [[1], [2], [3]])
    model.save_pretrained(tmp_path)
    put(tmp_path, report_of(RowSelection.load(tmp_path / "loki_rows.json")))
    write_adapter_card(tmp_path)
    assert "**Verified:**" in parts(tmp_path)[2]
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Verified" not in text and card.START not in text and "PEFT" in text


@pytest.mark.slow
def test_a_run_and_its_merge_leave_cards_that_say_what_the_report_says(
    run_config, train, base, tmp_path
):
    """Axolotl writes its own card after the adapter is saved; ours comes after that."""
    out = Path(run_config["output_dir"])
    run_config["loki"]["protect"] = {"inputs": 0.5}
    train(run_config)
    report = json.loads((out / "loki_report.json").read_text())
    fields, body, section = parts(out)
    assert {"axolotl", "loki"} <= {*fields["tags"]} and fields["library_name"] == "peft"
    assert fields["base_model"] == str(base)
    assert "axolotl version" in body and "### Framework versions" in body  # theirs
    assert "**Verified:** Only the selected rows have changed" in section
    found, forgotten = cells(section), report["forgetting"]
    assert found["KL(base ‖ tuned)"] == f"{forgotten['kl']:.4f} nats per answer"
    assert found["Asked"] == f"{forgotten['prompts']} prompts of {forgotten['calibration']}"
    assert found["Same answer as the base"] == f"{100 * forgotten['same_answer']:.1f} %"
    assert found["Form"] == "dense: every weight of the rows"
    counts = report["protection"]["directions_per_layer"]
    assert f"{min(counts)} to {max(counts)} directions per layer" in found["Protected inputs"]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    assert len(code.splitlines()) == 3
    names: dict = {}
    exec(code.replace(json.dumps(out.name), repr(str(out))), names)
    assert names["model"].peft_config

    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"base_model": str(base), "output_dir": str(out)}))
    done = CliRunner().invoke(loki, ["merge", str(config), "--json"])
    assert done.exit_code == 0, done.output
    merged = json.loads(done.stdout)
    fields, _, section = parts(out / "merged")
    assert fields == {
        "base_model": str(base),
        "library_name": "transformers",
        "tags": ["loki"],
    }
    found = cells(section)
    assert found["KL(base ‖ tuned)"] == f"{forgotten['kl']:.4f} nats per answer"
    assert found["Merged"] == f"{merged['rows']} rows of {merged['layers']} layers"
    assert found["Rounded away"].startswith(f"{100 * merged['rounded_away']:.1f} % of the update")
    assert "**Verified:** nothing outside the selected rows has changed." in section
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    names = {}
    exec(code.replace('"merged"', repr(str(out / "merged"))), names)
    assert names["tokenizer"] and names["model"].config.num_hidden_layers == 3
