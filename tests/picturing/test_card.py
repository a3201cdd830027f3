"""The model card: our section beside the words of others, with the figures of the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import markdown
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers.analyses import analysed
from helpers.browser import find_browser, shoot
from matplotlib.colors import to_rgb
from test_page import EVIL, Reader, put, report_of
from transformers import AutoModelForCausalLM

from loki_plugin import RowSelection, implant
from loki_plugin.cli import loki
from loki_plugin.implanting import card
from loki_plugin.picturing.card import write_adapter_card
from loki_plugin.picturing.drawing import style

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
    (tmp_path / "README.md").write_text(f"\ufeff{theirs}", encoding="utf-8")  # of some editors
    card.put(tmp_path, "second", fields)
    assert parts(tmp_path)[0] == found
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
    run_config |= {"val_set_size": 0.2, "eval_steps": 2}
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

    watched = report["forgetting_while_training"]["path"]
    first, last = watched[0], watched[-1]
    told = " to ".join(
        f"{e['kl']:.4f} at step {e['step']} (evaluation loss {e['loss']:.4f})"
        for e in (first, last)
    )
    assert last["step"] == run_config["max_steps"] and last["loss"] < first["loss"]
    alt = f"KL to the base while it trained, nats per token: {told}"
    assert shown_in(section) == [("loki_forgetting.svg", alt)]
    assert f"{last['kl']:.4f} at step {last['step']}" in texts(out / "loki_forgetting.svg")
    picture = (out / "loki_forgetting.svg").read_bytes()

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
    assert shown_in(section) == [("loki_forgetting.svg", alt)]
    assert (out / "merged" / "loki_forgetting.svg").read_bytes() == picture
    assert "**Verified:** nothing outside the selected rows has changed." in section
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    names = {}
    exec(code.replace('"merged"', repr(str(out / "merged"))), names)
    assert names["tokenizer"] and names["model"].config.num_hidden_layers == 3


WATCHED = {
    "prompts": 3,
    "own_texts": 5,
    "path": [
        {"step": 0, "kl": 0.0, "kept": 1.0, "loss": 2.5},
        {"step": 20, "kl": None, "kept": None, "loss": 2.0},
        {"step": 40, "kl": 0.03125, "kept": 0.75, "loss": 1.25},
        {"step": 60, "kl": 0.021234, "kept": 0.75, "loss": 1.125},
    ],
    "stopped": None,
}
TOLD = (
    "KL to the base while it trained, nats per token: 0.0000 at step 0 (evaluation loss 2.5000) to"
    " 0.0212 at step 60 (evaluation loss 1.1250)"
)


@pytest.fixture
def run(tmp_path):
    """(the folder of a finished run, its selection)."""
    torch.manual_seed(0)
    folder = tmp_path / "out"
    _, selection = analysed(tmp_path / "cache", torch.randn(20, 3, 40))
    selection.save(folder / "loki_rows.json")
    return folder, selection


def shown_in(section):
    """(address, alt text) of every image, as a browser has them."""
    tags = Reader(markdown.markdown(section, extensions=CONFIG)).tags
    return [(found["src"], found["alt"]) for tag, found in tags if tag == "img"]


def texts(picture):
    """What can be read in an SVG."""
    return [e.text for e in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")]


def places(picture, line):
    """Where the dots of the `line`-th curve of an SVG are, x and y in its own unit."""
    groups = [g for g in ElementTree.parse(picture).iter() if _is_curve(g)]
    dots = [e for e in groups[line].iter() if e.tag.endswith("}use")]
    return [(float(e.get("x")), float(e.get("y"))) for e in dots]


def _is_curve(element):
    """A line with a dot for each of several evaluations; marks of an axis have one each."""
    uses = [e for e in element.iter() if e.tag.endswith("}use")]
    return element.get("id", "").startswith("line2d") and len(uses) > 1


def test_a_picture_beside_the_card_shows_forgetting_as_the_report_has_it(run):
    folder, selection = run
    put(folder, report_of(selection, forgetting_while_training=WATCHED))
    write_adapter_card(folder)
    section = parts(folder)[2]
    assert shown_in(section) == [("loki_forgetting.svg", TOLD)]
    assert f"{TOLD}. Measured at every evaluation on 3 prompts and 5 texts of the model" in section
    picture = folder / "loki_forgetting.svg"
    said = texts(picture)
    assert "0.0212 at step 60" in said and "1.1250 at step 60" in said
    assert "optimizer step" in said and "evaluation loss" in said
    # What was not a number is left out; the others stand where their figures are.
    (x0, y0), (x1, y1), (x2, y2) = places(picture, 0)
    assert (x1 - x0) / (x2 - x0) == pytest.approx(40 / 60, rel=1e-4)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.03125 / 0.021234, rel=1e-4) and y1 < y0
    (x0, _), (x1, _), (x2, _) = places(picture, 1)
    assert x0 < x1 < x2  # what was learned goes to the right
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1.25 / 1.375, rel=1e-4)
    before = picture.read_bytes()
    write_adapter_card(folder)
    assert picture.read_bytes() == before


def test_a_run_that_was_stopped_says_where_and_what_is_saved(run):
    folder, selection = run
    stopped = {"step": 60, "kl": 0.021, "threshold": 0.02, "saved": "checkpoint-40"}
    path = [{"step": s, "kl": k} for s, k in ((40, 0.015), (60, 0.021))]  # of an older version
    found = {**WATCHED, "path": path, "stopped": stopped | {"saved_kl": 0.015}}
    put(folder, report_of(selection, forgetting_while_training=found))
    write_adapter_card(folder)
    section = parts(folder)[2]
    said = "stopped above 0.02 nats (dashed); what is saved is checkpoint-40, with 0.0150."
    assert said in section
    ((_, alt),) = shown_in(section)
    assert alt.endswith("0.0150 at step 40 to 0.0210 at step 60")
    assert "evaluation loss" not in texts(folder / "loki_forgetting.svg")


@pytest.mark.parametrize("found", [None, {}, {**WATCHED, "path": []}, "broken"])
def test_without_figures_or_a_drawing_there_is_no_picture_and_no_link(run, monkeypatch, found):
    folder, selection = run
    (folder / "loki_forgetting.svg").write_text("of an earlier run")
    if found == "broken":
        monkeypatch.setattr("loki_plugin.picturing.card.svg_file", lambda *given: 1 / 0)
        found = WATCHED
    put(folder, report_of(selection, forgetting_while_training=found))
    write_adapter_card(folder)
    section = parts(folder)[2]
    assert "**Verified:**" in section and "while it trained" not in section
    assert shown_in(section) == [] and not (folder / "loki_forgetting.svg").exists()


def test_the_picture_of_an_adapter_that_is_overwritten_goes(tmp_path, base):
    model = implant(AutoModelForCausalLM.from_pretrained(base), [[1], [2], [3]])
    model.save_pretrained(tmp_path)
    selection = RowSelection.load(tmp_path / "loki_rows.json")
    put(tmp_path, report_of(selection, forgetting_while_training=WATCHED))
    write_adapter_card(tmp_path)
    assert (tmp_path / "loki_forgetting.svg").exists()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "loki_forgetting.svg").exists()
    assert "loki_forgetting" not in (tmp_path / "README.md").read_text()


@pytest.mark.slow
def test_a_browser_shows_the_card_with_its_picture(run, tmp_path):
    """In a page that is dark as in one that is light: the picture has paper of its own."""
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium or Chrome is installed")
    folder, selection = run
    put(folder, report_of(selection, forgetting_while_training=WATCHED))
    write_adapter_card(folder)
    page = folder / "card.html"
    (address,) = [a for a, _ in shown_in(parts(folder)[2])]
    picture = f'<body style="margin: 0; background: #123"><img src="{address}">'
    page.write_text(picture, encoding="utf-8")
    shot = shoot(browser, page, "dark", tmp_path, (900, 400))
    assert shot.asked == set()
    drawn = (shot.pixels != np.array([0x11, 0x22, 0x33])).any(-1)
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    inside = shot.pixels[: rows[-1], : columns[-1]].astype(int)
    assert rows[-1] > 200 and columns[-1] > 600
    assert (inside.min(-1) > 250).mean() > 0.8  # its paper
    for colour in (style.HIGH, style.CHOSEN):
        wanted = 255 * np.array(to_rgb(colour))
        assert (np.abs(inside - wanted).max(-1) < 12).sum() > 100, colour
    whole = folder / "whole.html"
    whole.write_text(markdown.markdown(parts(folder)[2], extensions=CONFIG), encoding="utf-8")
    shot = shoot(browser, whole, "light", tmp_path, (1000, 2000))
    seen = np.abs(shot.pixels - 255 * np.array(to_rgb(style.HIGH))).max(-1) < 12
    assert seen.sum() > 100 and shot.asked == set()
