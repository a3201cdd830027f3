"""The benchmark on real bases: its measures by hand, and what a lab has."""

from __future__ import annotations

import json
import random

import pytest
import torch
from helpers import real_data
from helpers.families import tiny

from benchmarks.real import probes, scoring, tasks
from benchmarks.real.arms import ARMS
from benchmarks.real.data import Data
from benchmarks.real.scoring import Asked, Reference, answers, loss_of, score

# What a model makes of sequences.


def sequences(seed=0, count=7, shared=0):
    draw = random.Random(seed)
    start = [draw.randrange(5, 90) for _ in range(shared)]
    found = []
    for _ in range(count):
        ids = start + [draw.randrange(5, 90) for _ in range(draw.randrange(4, 20))]
        found.append(Asked(ids, draw.randrange(shared + 1, len(ids))))
    return found


@pytest.mark.parametrize("shared", [0, 12])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_scores_are_those_of_the_whole_logits(family, shared, monkeypatch):
    model, other = tiny(family, "sdpa"), tiny(family, "sdpa", seed=1)
    asked = sequences(shared=shared)
    monkeypatch.setattr(scoring, "_POSITIONS", 5)
    was = score(other, asked, keep=True)
    reference = Reference(was.hidden, other.get_output_embeddings().weight)
    found = score(model, asked, reference)
    for i, a in enumerate(asked):
        ids = torch.tensor([a.ids])
        with torch.no_grad():
            now = model(ids).logits[0, a.first - 1 : -1].log_softmax(-1)
            base = other(ids).logits[0, a.first - 1 : -1].log_softmax(-1)
        wanted = ids[0, a.first :]
        log_p = now.gather(1, wanted[:, None]).sum()
        kl = (base.exp() * (base - now)).sum()
        right = now.argmax(-1) == wanted
        torch.testing.assert_close(found.log_p[i], log_p, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.kl[i], kl, rtol=1e-4, atol=1e-4)
        assert (found.whole[i], found.first[i]) == (right.all(), right[0])
    total = sum(a.targets for a in asked)
    assert found.loss == pytest.approx(float(-found.log_p.sum()) / total)
    assert loss_of(model, asked).item() == pytest.approx(found.loss, rel=1e-4)
    assert float(found.kl.min()) > 0.01  # the two models do differ


def test_the_shared_beginning_runs_once(monkeypatch):
    model, asked = tiny("llama", "sdpa"), sequences(shared=12)
    lengths = []
    model.get_decoder().register_forward_pre_hook(
        lambda m, a, k: lengths.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    score(model, asked)
    longest = max(len(a.ids) for a in asked)
    assert lengths == [(1, 12), (len(asked), longest - 12)]


def test_right_is_what_greedy_decoding_says():
    model = tiny("llama", "sdpa").eval()
    tokenizer = type("T", (), {"eos_token_id": 3})
    prompts = [[5, 6, 7, 8], [9, 10]]
    said = answers(model, tokenizer, prompts, 6)
    good = [Asked(p + s, len(p)) for p, s in zip(prompts, said, strict=True)]
    bad = [Asked([*a.ids[:-1], (a.ids[-1] + 1) % 90], a.first) for a in good]
    assert score(model, good).whole.tolist() == [True, True]
    assert score(model, bad).whole.tolist() == [False, False]
    assert score(model, bad).first.tolist() == [len(a.ids) - a.first > 1 for a in bad]


def test_a_head_that_is_not_all_is_refused():
    model = tiny("llama")
    scoring.check_head(model)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="changes its logits"):
        scoring.check_head(model)


# Tasks.

ACCEPT = [
    {"find": {"city": ["New York", "NY"], "days": [3], "unit": ["km", ""]}},
    {"book": {"seats": [[1, 2]]}},
]


@pytest.mark.parametrize(
    "said, right",
    [
        ([("book", {"seats": [1, 2]}), ("find", {"city": "new york", "days": 3.0})], True),
        ([("find", {"city": "NY", "days": 3, "unit": "KM"}), ("book", {"seats": [1, 2]})], True),
        ([("find", {"city": "Boston", "days": 3}), ("book", {"seats": [1, 2]})], False),
        ([("find", {"city": "NY"}), ("book", {"seats": [1, 2]})], False),  # days must be there
        ([("find", {"city": "NY", "days": 3, "more": 1}), ("book", {"seats": [1, 2]})], False),
        ([("find", {"city": "NY", "days": 3})], False),  # one call is missing
        ([("find", {"city": "NY", "days": True}), ("book", {"seats": [1, 2]})], False),
        ([("find", {"city": "NY", "days": 3})] * 2, False),
    ],
)
def test_calls_are_right_as_their_accept_lists_say(said, right):
    words = json.dumps([{"name": n, "arguments": a} for n, a in said])
    assert tasks.accepted(words, ACCEPT) is right
    assert not tasks.accepted(words + "}", ACCEPT) and not tasks.accepted("[1, 2]", ACCEPT)


def test_a_task_is_the_same_every_time_and_tests_what_it_did_not_teach(lab):
    first, again = (tasks.make("snips", lab.data, lab.tokenizer, 0, 6) for _ in range(2))
    assert first == again
    assert not {tuple(a.ids) for a in first.learned} & {tuple(a.ids) for a in first.tested}
    asked = first.tested[0]
    assert asked.ids[-1] == lab.tokenizer.eos_token_id
    assert lab.tokenizer.decode(asked.ids[asked.first :]).startswith('{"name": "PlayMusic"')


@pytest.mark.parametrize(
    "content, told",
    [(None, "cls_snips_train.jsonl' is missing; `python -m benchmarks.real data --data '"),
     ("{}\n[1]\n", "line 2: expected an object"), ('{"text": \n', "line 1")],
)  # fmt: skip
def test_data_that_cannot_be_read_is_told(tmp_path, content, told):
    if content is not None:
        (tmp_path / "cls_snips_train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=told):
        Data(tmp_path).records("cls_snips_train")


def test_line_breaks_inside_a_text_do_not_end_a_record(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": "one\u2028two\x85three"}\n', encoding="utf-8")
    assert Data(tmp_path).records("x") == [{"a": "one\u2028two\x85three"}]


# What the base knew.


def test_the_base_has_lost_nothing_and_another_model_has(lab):
    found = lab.probes.measure(lab.model(), lab.head, 2)
    start = lab.probes.start()
    for name, value in found.items():
        assert value == pytest.approx(start[name], abs=2e-4), name
    assert len(lab.probes.facts) == 2 and found["facts_kept"] == 1
    other = lab.model()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.2 * torch.randn_like(p))
    lost = lab.probes.measure(other, lab.head, 2)
    assert lost["kl_dialogues"] > 0.1 and lost["kl_text"] > 0.1 and lost["ce_rise"] > 0.01
    assert lost["choice_lost"] + lost["choice_won"] > 0


def test_less_depth_measures_the_same_less(lab):
    whole = lab.probes.measure(lab.model(), lab.head, 2)
    for depth, absent in ((0, {"facts_kept", "kl_people", "ce_rise"}), (1, {"choice_score"})):
        found = lab.probes.measure(lab.model(), lab.head, depth)
        assert not absent & set(found) and set(found) < set(whole)
    without = lab.probes.measure(lab.model(), lab.head, 0, without="maths")
    assert "kl_text_maths" not in without and "kl_text_code" in without


def test_the_probes_are_made_once_and_again_for_other_data(lab, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(probes, "_make", lambda *a: made.append(1) or lab.probes)
    lab.probes  # noqa: B018
    known = probes.load(lab.known, lab.tokenizer, lab.data, lab.amount, lab.work)
    assert not made and known.facts == lab.probes.facts
    other = Data(real_data.write(tmp_path / "data", [("One is", "two")]))
    probes.load(lab.known, lab.tokenizer, other, lab.amount, tmp_path / "work")
    assert made
    with pytest.raises(ValueError, match="completes . facts rightly, 50 are asked for"):
        probes._known(lab.known, lab.tokenizer, lab.data, 50, random.Random(0))


def test_replay_and_moments_see_nothing_of_what_is_measured(lab):
    measured = {tuple(a.ids) for part in lab.probes.groups().values() for a in part}
    assert lab.real and not measured & {tuple(a.ids) for a in lab.real}
    for name, v in lab.protected().items():
        size = lab.known.get_submodule(name).weight.shape[1]
        assert v.shape[0] == size and 0 < v.shape[1] < size
    assert len(lab.protected()) == 2 * 7
    q, k = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    assert lab.protected()[q] is lab.protected()[k]


def test_moments_count_every_real_token_alike(lab):
    name = "model.layers.1.mlp.down_proj"
    inputs, texts = [], lab.written  # they are written before the hook is there
    handle = lab.known.get_submodule(name).register_forward_pre_hook(
        lambda m, a: inputs.append(a[0][0])
    )
    with torch.no_grad():
        for ids in texts:
            lab.known(torch.tensor([ids]))
    handle.remove()
    x = torch.cat(inputs)
    x = x / x.norm(dim=1, keepdim=True)
    found = {site.names[0]: moments for site, moments in lab.moments("written")}
    torch.testing.assert_close(found[name].ordinary, x.T @ x, rtol=1e-4, atol=1e-4)


def test_fewer_texts_of_its_own_are_of_both_kinds(lab):
    first, last = lab.written[0], lab.written[2]
    assert lab.texts("written", 2) == [first, last]
    assert lab.texts("both", 2) == [*lab.prompts, first, last]
    assert lab.texts("prompts", 2) == lab.prompts
    of = {site.names[0]: moments for site, moments in lab.moments("written", 2)}
    assert {m.tokens + m.sink_tokens for m in of.values()} == {len(first) + len(last)}


def test_the_kl_of_the_rest_is_that_of_the_vocabulary_without_the_target(lab):
    lab.teach("snips", 0, 0)
    model = ARMS["lora_all_r16"].build(lab.model(), lab)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    found = []
    for ids, first in lab.task.learned[:3]:
        base, tuned = (
            m(input_ids=torch.tensor([ids])).logits[0].double() for m in (lab.known, model)
        )
        for place in range(first, len(ids)):
            others = [i for i in range(base.shape[1]) if i != ids[place]]
            p, q = (x[place - 1, others].softmax(-1) for x in (base, tuned))
            found.append((p * (p / q).log()).sum().item())
    kl = scoring.divergence_of_rest(model, lab.task.learned[:3])
    assert kl.requires_grad and min(found) > 0
    assert float(kl) == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_the_mark_of_a_task_is_what_stands_before_every_answer(lab):
    lab.teach("snips", 0, 0)
    mark = lab.mark()
    assert mark and all(a.ids[: a.first][-len(mark) :] == mark for a in lab.task.learned)
    text = [*mark, 5, 6, *mark, 7]
    assert lab.starts(text, mark) == [len(mark) - 1, 2 * len(mark) + 1]
