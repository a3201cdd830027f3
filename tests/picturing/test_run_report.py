"""Every run leaves a page that a browser draws, in light and dark, and that fetches nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.axolotl import short_run, train
from helpers.browser import find_browser, shoot

from loki_plugin.picturing.pictures import NAMES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(base, dataset, questions, tmp_path_factory):
    """The output folder of one short run that reports to TensorBoard and to W&B, offline."""
    folder = tmp_path_factory.mktemp("run")
    config = short_run(base, dataset, questions, folder)
    config |= {"use_tensorboard": True, "wandb_project": "loki", "wandb_mode": "offline"}
    config["loki"]["protect"] = {"anchor": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_DIR", str(folder))
        train(config)
        import wandb

        wandb.finish()
    return Path(config["output_dir"])


def read(out, name):
    return json.loads((out / name).read_text(encoding="utf-8"))


def test_the_run_kept_the_numbers_and_drew_every_picture(out):
    assert read(out, "loki_report.json")["page"] == {"file": "loki_report.html", "left_out": {}}
    curve = read(out, "loki_figures.json")["training"]
    assert curve["step"] == [1, 2, 3, 4, 5, 6]
    assert len(curve["loss"]) == 6 and curve["kl_to_base"][0] == pytest.approx(0, abs=1e-6)
    norms = curve["update_norm"]
    assert norms[0] > 0 and norms == sorted(norms)
    assert curve["kl_to_base"][-1] == pytest.approx(
        read(out, "loki_report.json")["anchor_kl_last_step"], rel=1e-3
    )
    assert (out / "loki_report.html").stat().st_size < 300_000


def test_tensorboard_has_the_figures_and_the_pictures(out):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (out / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    curve = read(out, "loki_figures.json")["training"]
    norms = events.Scalars("train/loki/update_norm")
    assert [s.step for s in norms] == curve["step"]
    assert [s.value for s in norms] == pytest.approx(curve["update_norm"], rel=1e-3)
    assert events.Scalars("train/loki/rows")[0].value == 18
    (after,) = events.Scalars("train/loki/forgotten_kl")
    assert after.value == pytest.approx(read(out, "loki_report.json")["forgetting"]["kl"])
    assert set(events.Tags()["images"]) == {f"loki/{name}" for name in NAMES}
    image = events.Images("loki/density")[0]
    assert image.width > 500 and image.encoded_image_string.startswith(b"\x89PNG")


def test_wandb_has_the_figures_and_the_pictures_without_a_network(out):
    (run,) = out.parent.glob("wandb/offline-run-*")
    images = {p.name.split("_")[0] for p in (run / "files" / "media" / "images" / "loki").iterdir()}
    assert images == set(NAMES)
    (log,) = run.glob("*.wandb")
    assert b"loki/update_norm" in log.read_bytes()


LIGHT = {"low": "0072b2", "high": "d55e00", "chosen": "00805d", "other": "b0578a"}
DARK = {"low": "56b4e9", "high": "ff9248", "chosen": "35c79c", "other": "e39cc4"}
# What must be seen of each picture, and how many pixels of it at least.
SEEN = {
    "tradeoff": {"chosen": 50},
    "training": {"high": 100, "chosen": 100, "other": 100},
    "density": {},  # its shades are told from their hues below
    "scores": {"chosen": 20},
    "stability": {"low": 100},
}


def cards(pixels):
    """The cards of the page from top to bottom: their rows of pixels, as slices."""
    column = pixels[:, 60].astype(int)  # in the margin inside the cards, left of what they show
    edges = pixels[:, 20].astype(int)  # beside the cards: the page's paper
    inside = np.abs(column - edges).sum(1) > 2
    starts = np.flatnonzero(inside & ~np.roll(inside, 1))
    ends = np.flatnonzero(inside & ~np.roll(inside, -1))
    return [slice(a, b) for a, b in zip(starts, ends, strict=True) if b - a > 60]


def count(region, colour):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)])
    return int((np.abs(region.astype(int) - wanted).max(-1) < 12).sum())


@pytest.fixture(scope="module")
def browser():
    found = find_browser()
    if found is None:
        pytest.skip("no Chromium or Chrome is installed")
    return found


def test_the_log_of_the_browser_shows_what_a_page_fetches(browser, tmp_path):
    """Else the next test could not fail."""
    page = tmp_path / "fetching.html"
    page.write_text("<body style='background: url(http://fetched.invalid/a.png)'>")
    assert shoot(browser, page, "light", tmp_path, (200, 200)).asked == {"fetched.invalid"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_every_picture_and_asks_for_nothing(out, browser, tmp_path, scheme):
    shot = shoot(browser, out / "loki_report.html", scheme, tmp_path)
    assert shot.asked == set()
    paper = shot.pixels[5, 5]
    assert (paper.min() > 230) if scheme == "light" else (paper.max() < 40)
    _, _, *shown = cards(shot.pixels)  # the verdict and the tiles come first
    regions = {n: shot.pixels[rows] for n, rows in zip(NAMES, shown, strict=False)}
    assert regions.keys() == set(NAMES)
    colours = LIGHT if scheme == "light" else DARK
    for name, region in regions.items():
        card = region[len(region) // 2, 62].astype(int)
        different = (np.abs(region[:, 80:-80].astype(int) - card).sum(-1) > 60).mean()
        assert 0.01 < different < 0.9, name
        for colour, least in SEEN[name].items():
            assert count(region, colours[colour]) >= least, (name, colour)
    red, green, blue = (regions["density"].astype(int)[..., i] for i in range(3))
    assert ((red - blue) > 100).sum() > 300  # the highest
    assert ((blue - red) > 100).sum() > 300  # the lowest
    assert ((green - red) > 100).sum() > 300  # those that train


def test_a_picture_that_cannot_be_drawn_costs_no_training(
    base, dataset, questions, tmp_path, monkeypatch, our_log
):
    def broken(*given):
        raise IndexError("a score that nobody foresaw")

    monkeypatch.setattr("loki_plugin.picturing.numbers.of_scores", broken)
    config = short_run(base, dataset, questions, tmp_path) | {"max_steps": 1}
    out = tmp_path / "out"
    out.mkdir()
    (out / "loki_report.html").write_text("of an earlier run")
    train(config)
    assert read(out, "loki_report.json")["verified"] is True
    assert "nobody foresaw" in read(out, "loki_report.json")["page"]["not_drawn"]
    assert not (out / "loki_report.html").exists()
    assert any("COULD NOT BE DRAWN" in r.getMessage() for r in our_log.records)
