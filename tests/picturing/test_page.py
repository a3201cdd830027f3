"""The page: whatever comes from outside is text in it, and what is missing is named."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner
from helpers.analyses import analysed

from loki_plugin.cli import loki
from loki_plugin.picturing import numbers
from loki_plugin.picturing.page import last_history, rebuild, write_page
from loki_plugin.rows import RowSelection

EVIL = "</title></style><script src=//x.y>alert('1')</script>"
EVIL += '<img src=x onerror="a">\'"{{ 7*7 }}&amp;'
HISTORY = [{"loss": 2.0 / i, "step": i, "loki/update_norm": i / 3} for i in range(1, 6)]


class Reader(HTMLParser):
    """Tags with their attributes, and the text between them, as a browser takes them."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def report_of(selection, **more):
    """A report as this version writes it."""
    return {
        "versions": {"loki_plugin": "0.2.0"},
        "settings": {"quota": 25, "rank": None, "calibration": {"source": "builtin"}},
        "base_model": "models/small",
        "config": "run.yaml",
        "hidden_size": selection.hidden_size,
        "rows_per_layer": selection.counts,
        "trainable_percent": 1.5,
        "verified": True,
        "verified_what": {"base": "every byte"},
        "faults": [],
        "trainable_parameters": 3_400_000,
        "base_parameters": 200_000_000,
        "forgetting": {"prompts": 8, "kl": 0.0123, "same_answer": 0.875, "calibration": "builtin"},
        **more,
    }


@pytest.fixture
def run(tmp_path):
    """(the folder of a run, its selection); its analysis is in the cache beside it."""
    torch.manual_seed(0)
    _, selection = analysed(tmp_path / "cache", torch.randn(20, 3, 40))
    folder = tmp_path / "out"
    selection.save(folder / "loki_rows.json")
    return folder, selection


def put(folder, report):
    (folder / "loki_report.json").write_text(json.dumps(report))


def test_whatever_comes_from_outside_is_text(run):
    folder, selection = run
    made = selection.made | {"calibration": {"source": EVIL, "prompts": 3}, "strategy": EVIL}
    made |= {"exclude": [EVIL], "source": EVIL}
    evil = RowSelection(selection.rows, 40, {"quantisation": EVIL}, made)
    evil.save(folder / "loki_rows.json")
    report = report_of(
        evil,
        versions={EVIL: EVIL},
        settings={EVIL: EVIL, "calibration": {"source": EVIL}, "text": [EVIL]},
        base_model=EVIL,
        config=EVIL,
        rows_from=EVIL,
        faults=[EVIL],
        verified_what={EVIL: EVIL},
        forgetting={"prompts": 8, "kl": 1.0, "same_answer": 0.5, "calibration": EVIL},
    )
    put(folder, report)
    found = numbers.gather(evil, folder.parent / "cache", HISTORY)
    found["left_out"]["stability"] = EVIL
    page = write_page(folder, found)[0].read_text(encoding="utf-8")
    read = Reader(page)
    assert "script" not in {tag for tag, _ in read.tags}
    images = [a for tag, a in read.tags if tag == "img"]
    assert not images  # those of the pictures are SVG's `image`
    assert not [a for _, attributes in read.tags for a in attributes if a.startswith("on")]
    assert sum(EVIL in text for text in read.text) >= 10  # shown as it is, not dropped
    assert "49" not in [t.strip() for t in read.text]  # and no template of ours ran it


def test_the_page_fetches_nothing_and_forbids_it(run):
    folder, selection = run
    put(folder, report_of(selection))
    page = rebuild(folder, folder.parent / "cache")[0].read_text(encoding="utf-8")
    addresses = re.findall(
        r"""(?:src|href|action|data)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)""", page
    )
    assert addresses
    for address in (a or b for a, b in addresses):
        assert address.startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"https?://|@import|<link|<iframe|<script", page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize("rows", [[[1], [2, 3]], [[], []]], ids=["rows", "no rows"])
def test_the_page_of_targets_says_which_linears_train(tmp_path, rows):
    names = [f"model.layers.{i}.self_attn.{k}" for i in range(2) for k in ("q_proj", "v_proj")]
    selection = RowSelection(rows, 40, linears=names)
    selection.save(tmp_path / "loki_rows.json")
    protection = {"directions_per_layer": [4, 5], "soft": True, "tokens": 1234}
    protection |= {"inputs": [names[:2], names[2:]], "sink_tokens_per_layer": [0, 7]}
    report = report_of(selection, protection=protection, linears=names)
    report["settings"] |= {"targets": ["q_proj", "v_proj"], "linear_rank": 8}
    put(tmp_path, report)
    found = numbers.gather(selection, tmp_path / "cache", HISTORY)
    text = " ".join(Reader(write_page(tmp_path, found)[0].read_text(encoding="utf-8")).text)
    some = any(selection.counts)
    moved = "Only the selected rows and 4 targeted linears" if some else "Only 4 targeted linears"
    for said in (
        f"{moved} have changed",
        "Linears that train a LoRA",
        "q_proj, v_proj",
        "4 with a LoRA of rank 8",
        "4 to 5 directions at each of 2 inputs that linears read",
        "1 of them with sinks",
    ):
        assert said in text, said
    for said in ("Rows that train", "dense: every weight of the rows"):
        assert (said in text) == some, said


def test_the_page_says_what_the_report_says(run):
    folder, selection = run
    protection = {"directions_per_layer": [4, 5, 4], "soft": True, "tokens": 1234}
    protection |= {"energy_per_layer": [0.991, 0.99, 0.99], "leakage_per_layer": [0.1, 0.025, 0]}
    protection["energy_of_held_out_prompts_per_layer"] = [0.97, 0.981, 0.96]
    put(folder, report_of(selection, protection=protection))
    found = numbers.gather(selection, folder.parent / "cache", HISTORY)
    text = " ".join(Reader(write_page(folder, found)[0].read_text(encoding="utf-8")).text)
    for said in (
        "models/small",
        "Verified",
        "10 of 40",
        "in each of 3 layers",
        "3.4 M",
        "1.70 % of 200 M",
        "0.0123 nats",
        "87.5 %",
        "from 2.000 in 5 steps",
        "25 % of the rows by layer_balanced",
        "every byte",
        "calibration.source",
        "loki_plugin 0.2.0",
        "4 to 5 directions per layer, read in inverse proportion to their use; at least 99.0 % of"
        " the energy of 1,234 tokens, 96.0 % of that of prompts kept back; at most 0.1 of the",
    ):
        assert said in text
    assert "axolotl loki merge" not in text  # no adapter is there to merge
    (folder / "adapter_model.safetensors").touch()
    text = write_page(folder, found)[0].read_text(encoding="utf-8")
    assert "axolotl loki merge run.yaml" in text and "loki verify models/small" in text


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ({"faults": ["layer 3: NaN"]}, "Do not use this adapter"),
        ({"verified": False, "verified_what": {"base": "sharded"}}, "Not verified"),
        ({"verified_what": None}, "this version did not say what it read"),
    ],
)
def test_the_verdict_is_what_the_check_found(run, report, said):
    folder, selection = run
    put(folder, report_of(selection, **report))
    text = rebuild(folder, folder.parent / "cache")[0].read_text(encoding="utf-8")
    assert said in text
    assert ("layer 3: NaN" in text) == bool(report.get("faults"))


def test_the_mark_of_a_failed_run_outweighs_its_report(run):
    folder, selection = run
    put(folder, report_of(selection))
    (folder / "LOKI_FAILED.txt").write_text("do not use it")
    text = rebuild(folder, folder.parent / "cache")[0].read_text(encoding="utf-8")
    assert "Do not use this adapter" in text and "<strong>Verified" not in text


def test_a_run_of_version_0_1_1_is_drawn_from_its_analysis_and_its_checkpoint(run):
    folder, selection = run
    old = {
        "versions": {"loki_plugin": "0.1.1", "axolotl": "0.19.0"},
        "settings": {"quota": 25, "rank": None},
        "rows_file": "loki_rows.json",
        "trainable_percent": 1.5,
        "verified": True,
        "rows_from": "analysis",
        "selection": selection.made,
    }
    put(folder, old)
    state = folder / "checkpoint-5" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text(
        json.dumps({"log_history": [{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 5}]})
    )
    result = CliRunner().invoke(
        loki,
        ["report", str(folder), "--dir", str(folder.parent / "cache")]
        + ["--pictures", str(folder.parent / "figures")],
    )
    assert result.exit_code == 0, result.output
    assert "not shown: tradeoff (forgetting was not measured (no report))" in result.output
    names = sorted(p.name for p in (folder.parent / "figures").iterdir())
    assert names == ["density.png", "scores.png", "stability.png", "training.png"]
    for path in (folder.parent / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 100_000
    page = folder / "loki_report.html"
    assert result.output.splitlines()[-1] == f"report in {page}"
    result = CliRunner().invoke(loki, ["report", str(folder), "--json"])
    told = json.loads(result.stdout)
    assert told["page"] == str(page) and told["not_shown"].keys() == {"tradeoff"}


def test_without_scores_the_rows_that_train_are_still_drawn(run, tmp_path):
    folder, selection = run
    put(folder, report_of(selection))
    _, drawn, left_out = rebuild(folder, tmp_path / "another cache")
    assert [p.name for p in drawn] == ["density"]
    assert left_out.keys() == {"tradeoff", "training", "density", "scores", "stability"}
    assert "has no analysis" in left_out["density"]


def test_a_run_drawn_again_without_its_cache_keeps_its_pictures(run, tmp_path):
    folder, selection = run
    put(folder, report_of(selection))
    found = numbers.gather(selection, folder.parent / "cache", HISTORY)
    numbers.save(found, folder)
    first = write_page(folder, found)[0].read_bytes()
    path, _, left_out = rebuild(folder, tmp_path / "another cache")
    assert path.read_bytes() == first and not left_out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("loki_rows.json", None, "has no loki_rows.json, so no run of ours ended there"),
        ("loki_report.json", "{", "loki_report.json' is not JSON"),
        ("loki_report.json", "[]", "holds no object"),
        (
            "loki_figures.json",
            '{"format": "loki_figures", "version": 1, "hidden_size": 40, "scores": {"share": 5}}',
            "numbers of 'density' are damaged",
        ),
    ],
)
def test_damaged_files_are_one_line(run, name, content, message):
    folder, _ = run
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    result = CliRunner().invoke(loki, ["report", str(folder)])
    assert result.exit_code == 1 and message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("content", ["{", "[]"])
def test_the_state_of_a_checkpoint_that_was_cut_off_is_named(tmp_path, content):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match="checkpoint-3/trainer_state.json' is damaged"):
        last_history(tmp_path)
