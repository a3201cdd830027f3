"""What low-rank updates read is set from the task, and stands still."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import tiny
from helpers.prompts import prompts
from helpers.protected import CALIBRATION, ROWS, train, trainable
from peft import PeftModel

from loki_plugin import implant, input_directions
from loki_plugin.implanting.adapter import check
from loki_plugin.implanting.training import KeepDtypes
from loki_plugin.protecting import sharing
from loki_plugin.protecting.directions import Directions
from loki_plugin.protecting.finding import find_directions
from loki_plugin.protecting.fixing import (
    FixedA,
    fix_reads,
    gaining,
    low_rank,
    task_reads,
)
from loki_plugin.protecting.moments import SINK
from loki_plugin.protecting.sharing import shared_reads
from loki_plugin.protecting.solving import Wanted

TASK = [tuple(ids.tolist()) for ids in prompts(lengths=(30, 22, 41, 17))]
GENERAL = [ids[mask.bool()].tolist() for ids, mask in zip(*CALIBRATION, strict=True)]


def softly(model, targets="all"):
    return input_directions(model, *CALIBRATION, energy=0.9, soft=True, targets=targets)


def still(rank=None, rows=ROWS):
    model = tiny("llama")
    return implant(
        model, rows, rank, protect=softly(model), targets="all", linear_rank=4, task=TASK
    )


def seen(model, name):
    """What a linear reads on every token of the task, float64, the slow way."""
    found = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda m, args: found.append(args[0])
    )
    with torch.no_grad():
        for ids in TASK:
            model(input_ids=torch.tensor([ids]))
    hook.remove()
    return torch.cat([x[0] for x in found]).double()


def apart(x, v):
    """P and P C P by definition."""
    lengths = x.norm(dim=1)
    x = x[lengths <= SINK * lengths.median()]
    x = x / x.norm(dim=1, keepdim=True)
    p = torch.eye(len(v), dtype=torch.float64) - v.double() @ v.double().T
    return p, p @ (x.T @ x) @ p


def assert_leading(a, p, moment):
    """A = Eᵀ P / √3 with orthonormal E that hold as much of P C P as the leading eigenvectors."""
    e = torch.linalg.solve(p, 3**0.5 * a.double().T)
    torch.testing.assert_close(e.T @ e, torch.eye(len(a), dtype=torch.float64), atol=1e-5, rtol=0)
    best = torch.linalg.eigvalsh(moment)[-len(a) :].sum()
    assert (1 - 1e-5) * best < torch.trace(e.T @ moment @ e) < (1 + 1e-5) * best


def test_what_is_read_is_what_the_task_uses_beside_general_text():
    model = tiny("llama", dtype=torch.float64)
    directions = softly(model)
    inputs = {name: seen(model, name) for name in directions}
    tuned = implant(model, ROWS, protect=directions, targets="all", linear_rank=4, task=TASK)
    layers = low_rank(tuned)
    assert set(layers) == {n for n in directions if "down_proj" not in n}
    for name, layer in layers.items():
        assert_leading(layer.lora_A["default"].weight, *apart(inputs[name], directions[name]))


def test_a_many_times_larger_input_takes_the_same_way():
    """32 columns of a block of 40 are not asked for; they converge last."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 300, generator=generator, dtype=torch.float64)
    x *= torch.logspace(0, -1.5, 300, dtype=torch.float64)
    c = x.T @ x
    v = torch.linalg.eigh(c).eigenvectors[:, -40:] * 0.9
    found = gaining(c, v, 16, "here").double()
    p = torch.eye(300, dtype=torch.float64) - v @ v.T
    assert_leading(found, p, p @ c @ p)


def test_only_b_and_dense_rows_move_and_stock_peft_says_the_same(tmp_path):
    tuned = still()
    check(tuned)
    before = {n: p.clone() for n, p in tuned.named_parameters()}
    train(tuned)
    moved = {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".lora_B." in n or ("down_proj" in n and ".lora_A." in n)}
    assert len(trainable(tuned)) == len(moved)
    tuned.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    ids = torch.tensor([TASK[0]])
    with torch.no_grad():
        said = tuned.eval()(input_ids=ids).logits
        torch.testing.assert_close(again(input_ids=ids).logits, said, atol=1e-5, rtol=0)
        merged = copy.deepcopy(tuned).merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, said, atol=1e-5, rtol=0)


def test_switching_the_adapter_off_and_on_lets_no_a_train():
    """PEFT marks every part of an adapter as trainable when it is on again; so does TRL's
    reference."""
    tuned = still()
    with tuned.disable_adapter():
        pass
    tuned.set_adapter("default")
    check(tuned)
    assert any("lora_A" in n for n, p in tuned.named_parameters() if not p.requires_grad)


def moved_by_training(tuned):
    before = {n: p.clone() for n, p in tuned.named_parameters()}
    train(tuned)
    return {n for n, p in tuned.named_parameters() if not torch.equal(p, before[n])}


def test_of_a_whole_linear_at_a_rank_b_alone_moves():
    moved = moved_by_training(still(rank=2, rows=[list(range(48))] * 3))
    assert moved and all(".lora_B." in name for name in moved)
    assert sum("down_proj" in name for name in moved) == 3


def test_where_some_rows_train_at_a_rank_their_a_trains_too():
    """B has so few numbers there that A holds nearly all that can be learned."""
    moved = moved_by_training(still(rank=2))
    of_a = {name for name in moved if ".lora_A." in name}
    assert len(of_a) == 3 and all("down_proj" in name for name in of_a)
    assert sum(".lora_B." in name for name in moved) == 21


def test_directions_found_on_the_way_are_those_that_are_handed_over():
    """As a run does it: no directions are held, P is found and forgotten input by input."""
    known = still()
    plain = implant(tiny("llama"), ROWS, targets="all", linear_rank=4)
    reads = task_reads(plain, TASK, GENERAL, Wanted(0.9, soft=True))
    fix_reads(plain, reads.a)
    for name in low_rank(known):
        a, b = (low_rank(m)[name].lora_A["default"] for m in (known, plain))
        assert isinstance(a, FixedA) and isinstance(b, FixedA)
        torch.testing.assert_close(a.weight.T @ a.weight, b.weight.T @ b.weight, atol=1e-5, rtol=0)


def test_what_updates_are_set_beside_is_told_as_of_directions_that_are_held():
    plain = implant(tiny("llama"), ROWS, targets="all", linear_rank=4)
    behind = task_reads(plain, TASK, GENERAL, Wanted(0.9, soft=True)).behind
    held = find_directions(tiny("llama"), GENERAL, Wanted(0.9, soft=True), "all")
    low = set(low_rank(plain))
    expected = {
        tuple(n for n in names if n in low): (basis.shape[1], energy)
        for names, basis, energy in zip(held.sites, held.basis, held.energy, strict=True)
    }
    expected.pop((), None)  # what dense rows alone read
    assert {tuple(b.inputs) for b in behind} == expected.keys()
    for b in behind:
        count, energy = expected[tuple(b.inputs)]
        assert b.directions == count and b.energy == pytest.approx(energy, abs=1e-4)
        assert 0.9 <= b.energy < 1 and not b.capped


def test_too_few_tokens_are_refused_unless_fewer_directions_will_do():
    plain = implant(tiny("llama"), ROWS, targets="all", linear_rank=4)
    few = [GENERAL[0][:9]]
    with pytest.raises(ValueError, match="cannot be told from 9 tokens of calibration"):
        task_reads(plain, TASK, few, Wanted(0.99, soft=True))
    reads = task_reads(plain, TASK, few, Wanted(0.99, soft=True, settles=True))
    # Of soft ones the last is read as it is.
    assert {b.directions for b in reads.behind} == {9 // 4 - 1} and reads.report()["capped"] > 0
    with pytest.raises(ValueError, match="directions = 48, expected a number from 1 to 47"):
        task_reads(plain, TASK, GENERAL, Wanted(None, 48, soft=True))


def test_without_texts_what_was_drawn_is_read_behind_the_directions():
    plain = implant(tiny("llama"), ROWS, targets="all", linear_rank=4)
    drawn = {n: m.lora_A["default"].weight.clone() for n, m in low_rank(plain).items()}
    reads = task_reads(plain, [], GENERAL, Wanted(0.9, soft=True))
    v = softly(tiny("llama"))
    for name, a in drawn.items():
        expected = a - a @ v[name] @ v[name].T
        torch.testing.assert_close(reads.a[name], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_keeps_its_dtype(dtype):
    model = tiny("llama", dtype=torch.float32)
    plain = implant(model, ROWS, targets="all", linear_rank=4)
    for layer in low_rank(plain).values():
        layer.lora_A["default"].to(dtype)
        layer.lora_B["default"].to(dtype)
    fix_reads(plain, task_reads(plain, TASK, GENERAL, Wanted(0.9, soft=True)).a)
    assert {m.lora_A["default"].weight.dtype for m in low_rank(plain).values()} == {dtype}


def test_a_base_of_which_a_host_has_cast_a_part_is_read_under_autocast():
    """As Axolotl casts norms, and the routers of mixtures, after the adapter is there."""

    def reads(cast):
        model = tiny("llama", dtype=torch.bfloat16)
        plain = implant(model, ROWS, targets="all", linear_rank=4)
        for module in model.modules():
            if cast and "Norm" in type(module).__name__:
                module.float()
        return task_reads(plain, TASK, GENERAL, Wanted(0.9, soft=True)).a

    whole, part = reads(False), reads(True)
    for name, a in part.items():
        assert a.dtype == torch.float32
        difference = a.T @ a - whole[name].T @ whole[name]
        assert difference.norm() < 0.2 * (a.T @ a).norm(), name


def test_a_keeps_its_dtype_through_pefts_loading(tmp_path):
    """PEFT makes what it loads float32, also of an adapter in 16 bits."""
    tuned = still()
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    kept = KeepDtypes(tuned)
    tuned.save_pretrained(tmp_path)
    tuned.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.float32 in {p.dtype for n, p in tuned.named_parameters() if ".lora_A." in n}
    kept.restore(tuned)
    assert {p.dtype for n, p in tuned.named_parameters() if ".lora_" in n} == {torch.bfloat16}


def test_a_file_of_what_stood_still_protects_nothing_and_is_refused():
    held = Directions([torch.empty(48, 0)], made={"still": ["q"]}, sites=[["q"]])
    with pytest.raises(ValueError, match="holds no directions for 1 linears, whose A stood still"):
        implant(tiny("llama"), ROWS, protect=held, targets="all")


def test_what_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="beside protected inputs; give `protect` too"):
        implant(tiny("llama"), ROWS, targets="all", task=TASK)
    with pytest.raises(ValueError, match="`task` holds no texts"):
        implant(tiny("llama"), ROWS, protect=softly(tiny("llama")), targets="all", task=[])
    with pytest.raises(ValueError, match="here: what the task's texts read .* of trace 0.0; the"):
        gaining(torch.zeros(8, 8), None, 2, "here")
    long = tiny("gpt2")
    rows = [[1, 2]] * long.config.num_hidden_layers
    directions = input_directions(long, *CALIBRATION, energy=0.9, soft=True, targets="all")
    with pytest.raises(ValueError, match="positions"):
        implant(long, rows, protect=directions, targets="all", task=[[1] * 4000])


def test_what_was_found_is_kept_and_what_is_damaged_is_found_again(tmp_path, monkeypatch, our_log):
    plain = implant(tiny("llama"), ROWS, targets="all", linear_rank=4)
    asked, found = (plain, TASK, GENERAL, Wanted(0.9, soft=True), str(tmp_path)), []
    monkeypatch.setattr(sharing, "task_reads", lambda *a: found.append(1) or task_reads(*a))
    first = shared_reads(*asked)
    (file,) = (tmp_path / "reads").iterdir()
    for damaged, times in ((False, 1), (True, 2)):
        if damaged:
            file.write_bytes(file.read_bytes()[:-9])
        again = shared_reads(*asked)
        assert again.a.keys() == first.a.keys() and len(found) == times
        assert all(torch.equal(again.a[name], a) for name, a in first.a.items())
        assert again.behind == first.behind and again.report() == first.report()
    assert "is damaged" in our_log.text and "found again" in our_log.text
    shared_reads(plain, TASK[:2], *asked[2:])  # another task has its own
    assert len(list((tmp_path / "reads").iterdir())) == 2
