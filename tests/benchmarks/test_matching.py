"""Arms at one task score: what the runs of a results file show, by hand."""

from __future__ import annotations

import pytest

from benchmarks.forgetting import matching
from benchmarks.forgetting.arms import ARMS


def runs(*curve):
    return [{"lr": lr, "task_score": s, "forgetting": f} for lr, s, f in curve]


def test_matching_interpolates_between_the_rates_around_the_score():
    curve = runs((1e-3, 0.2, 0.0), (1e-2, 1.0, 0.8), (1e-1, 0.1, 9.0))
    assert matching.at_score(curve, "forgetting", 0.6) == pytest.approx(0.4)
    assert matching.at_score(curve[::-1], "forgetting", 0.2) == 0.0  # in any order; the lowest rate
    assert matching.at_score(runs((1e-3, 0.2, 0.0), (1e-2, 0.5, 1.0)), "forgetting", 0.6) is None


def line(arm, forgetting, spread=None, task="facts"):
    return {"task": task, "arm": arm, "forgetting": forgetting, "spread": spread}


def test_targets_are_judged_by_the_best_of_each_side_and_by_the_noise():
    lines = [
        line("lora_all_r16", 0.4, 0.02),
        line("loki_q10", 0.15, 0.01),
        line("loki_q30", 0.25, 0.03),
        line("random_q30", 0.26, 0.01),
        line("loki_protect_q30", 0.12, 0.01),
        line("random_protect_q30", 0.02, 0.01),
        line("full", 0.1, 0.0),
        line("lora_replay1", None),
        line("lora_replay5", 0.01),  # real data: no rival
    ]
    found = {r["aim"]: r for r in matching.targets(lines)}
    half = found["LoKI without protection forgets at most half of LoRA r16"]
    assert matching.targets([line("loki_q30", 0.3), line("lora_all_r16", 0.4)])[0]["shown"] == (
        "no (one seed)"
    )
    assert half == {"task": "facts", "aim": half["aim"], "ours": "loki_q10 0.150",
                    "rival": "lora_all_r16 0.400", "shown": "yes"}  # fmt: skip
    assert found["chosen rows forget less than random rows"]["shown"] == "not told apart"
    assert found["the same, both with protected inputs"]["shown"] == "no"
    every = found["LoKI with its best protection forgets less than every rival"]
    assert (every["ours"], every["rival"]) == ("loki_protect_q30 0.120", "full 0.100")
    assert every["shown"] == "no"
    own = {r["aim"]: r for r in matching.targets([*lines, line("lora_selfreplay", 0.05)])}
    assert own[every["aim"]]["rival"] == "lora_selfreplay 0.050"  # needs no data of others
    assert not any("replay" in aim for aim in found)  # it never reached the score


def test_arms_are_held_against_the_rival_of_the_same_seeds():
    def run(arm, seed, forgetting, score=0.95):
        return {"task": "facts", "arm": arm, "seed": seed, "lr": 1e-3} | {
            "task_score": score,
            "forgetting": forgetting,
        }

    first = [run("lora_all_r16", 0, 0.4), run("lora_all_r16", 1, 0.2), run("osf", 0, 0.1)]
    first += [run("loki_q30", 0, 0.1), run("loki_q30", 1, 0.2), run("loki_q30", 2, 9.0)]
    second = [run("lora_all_r16", 0, 0.4), run("loki_q30", 0, 0.05), run("osf", 0, 0.1, 0.5)]
    rows = matching.against({"a": first, "b": second}, least=2)
    assert rows == [
        {"arm": "loki_q30", "mean": "0.25", "a": "0.50 (2)", "b": "0.12 (1)"},
        {"arm": "osf", "mean": "-", "a": "0.25 (1)", "b": "-"},
    ]
    assert matching.against({"a": first, "b": second}, least=3) == []


def test_a_lead_within_the_noise_is_none_and_what_was_tried_is_listed():
    ran = [
        {"task": "facts", "seed": seed, "arm": arm, "lr": 1e-3, "task_score": 0.95, "forgetting": f}
        for seed, arm, f in ((0, "loki_q30", 0.40), (0, "loki_again_q30", 0.43), (1, "loki_q30", 9))
    ]
    (noise,) = matching.noise_floor(ran)
    assert noise["seed"] == 0 and noise["apart"] == pytest.approx(0.03)
    lines = [
        line("loki_q30", 0.20, 0.0),
        line("random_q30", 0.22, 0.0),
        line("loki_magnitude_q30", None),
    ]
    assert matching.noise_share([noise]) == pytest.approx(0.03 / 0.43)
    for share, shown in ((0.1, "not told apart"), (0.05, "yes")):
        found = {r["aim"]: r["shown"] for r in matching.targets(lines, share)}
        assert found["chosen rows forget less than random rows"] == shown
    empty = dict.fromkeys(("retention", "kl_covered", "kl_uncovered"))
    rows = matching.tried([x | empty for x in lines])
    assert [r["arm"] for r in rows] == ["loki_q30", "loki_magnitude_q30", "random_q30"]


def test_every_arm_that_the_report_names_exists():
    named = {arm for group in matching.TRIED.values() for arm in group}
    assert named | set(matching.TWICE) | set(matching.TWICE.values()) <= set(ARMS)
