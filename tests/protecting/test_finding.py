"""Input directions: laws of the leading eigenvectors, against a plain float64 truth."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny
from helpers.prompts import pad, prompts
from helpers.reference import Exact

from loki_plugin import input_directions
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.protecting import eigen, moments
from loki_plugin.protecting.eigen import beside, leading, soften, without
from loki_plugin.protecting.finding import find_directions
from loki_plugin.protecting.solving import Wanted

LENGTHS = (40, 64, 23, 57, 64, 31)  # 279 tokens for at most 69 directions


def truth(model, ids):
    """C_l = Σ x xᵀ/‖x‖² in float64, one prompt after another, by a plain hook; no sinks."""
    down = find_anatomy(model).down
    moments = [0] * len(down)

    def adding(i):
        def hook(module, args):
            x = args[0].double().reshape(-1, args[0].shape[-1])
            x = x / x.norm(dim=-1, keepdim=True)
            moments[i] = moments[i] + x.T @ x

        return hook

    handles = [m.register_forward_pre_hook(adding(i)) for i, m in enumerate(down)]
    with torch.no_grad():
        for prompt in ids:
            model(input_ids=prompt[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return moments


def share(moment, basis):
    return float(((moment @ basis.double()) * basis.double()).sum() / moment.trace())


def projector(basis):
    return basis.double() @ basis.double().T


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2_moe", "llama4"])
def test_columns_are_orthonormal_and_hold_the_energy_with_none_to_spare(family):
    model, ids = tiny(family), prompts(lengths=LENGTHS)
    found = find_directions(model, ids, Wanted(0.9))
    assert found.tokens == sum(LENGTHS)
    for moment, basis, held in zip(truth(model, ids), found.basis, found.energy, strict=True):
        assert basis.dtype == torch.float32 and basis.device.type == "cpu"
        count = basis.shape[1]
        assert 1 < count < len(moment) - 1
        assert torch.allclose(basis.T @ basis, torch.eye(count), atol=1e-5)
        assert share(moment, basis) >= 0.9 - 1e-5 > share(moment, basis[:, :-1])
        assert held == pytest.approx(share(moment, basis), abs=1e-5)


def test_in_float64_they_are_the_eigenvectors_of_the_plain_sum():
    model, ids = tiny("llama", dtype=torch.float64), prompts(lengths=LENGTHS)
    with Exact():
        found = find_directions(model, ids, Wanted(0.9))
        moments = truth(model, ids)
    for moment, basis in zip(moments, found.basis, strict=True):
        assert basis.dtype == torch.float64
        values, vectors = torch.linalg.eigh(moment)
        wanted = 1 + int((values.flip(0).cumsum(0) < 0.9 * values.sum()).sum())
        assert basis.shape[1] == wanted
        assert torch.allclose(projector(basis), projector(vectors[:, -wanted:]), atol=1e-9)
        first = basis[:, 0] * torch.sign(basis[:, 0] @ vectors[:, -1])
        assert torch.allclose(first, vectors[:, -1], atol=1e-9)  # the leading one stands first


def test_float32_is_as_far_from_the_truth_as_float32_is():
    ids = prompts(lengths=LENGTHS)
    exact = input_directions(tiny("llama", dtype=torch.float64), *pad(ids, "right"), directions=8)
    plain = input_directions(tiny("llama"), *pad(ids, "right"), directions=8)
    for a, b in zip(exact, plain, strict=True):
        assert torch.linalg.norm(projector(a) - projector(b)) < 1e-4


def test_what_is_held_of_prompts_that_were_kept_back():
    model = tiny("llama", dtype=torch.float64)
    ids = prompts(lengths=LENGTHS * 3)
    found = find_directions(model, ids, Wanted(0.7), coverage=True)
    for a, b in zip(found.basis, find_directions(model, ids, Wanted(0.7)).basis, strict=True):
        assert torch.allclose(projector(a), projector(b), atol=1e-6)  # all prompts count
    kept = ids[7::8]
    others = [p for i, p in enumerate(ids) if i % 8 != 7]
    for seen, rest, basis, held in zip(
        truth(model, others), truth(model, kept), found.basis, found.held_out, strict=True
    ):
        without = torch.linalg.eigh(seen)[1].flip(1)[:, : basis.shape[1]]
        assert held == pytest.approx(share(rest, without), abs=1e-9)
    assert max(found.held_out) < min(found.energy)  # random prompts have little in common
    assert find_directions(model, ids[:7], Wanted(0.5), coverage=True).held_out is None


@pytest.mark.parametrize("tokens", [1, 100, 10**6])
def test_padding_and_batches_do_not_count(monkeypatch, tokens):
    ids = prompts(lengths=LENGTHS)
    wanted = find_directions(tiny("llama", dtype=torch.float64), ids, Wanted(0.9)).basis
    monkeypatch.setattr(moments, "TOKENS", tokens)
    for side in ("left", "right"):
        model = tiny("llama", dtype=torch.float64)
        found = input_directions(model, *pad(ids, side), energy=0.9)
        for a, b in zip(wanted, found, strict=True):
            assert torch.allclose(projector(a), projector(b), atol=1e-6)


def test_layers_in_several_passes_are_the_same_and_upper_layers_do_not_run(monkeypatch):
    ids = prompts(lengths=LENGTHS)
    together = find_directions(tiny("llama"), ids, Wanted(0.9))
    model = tiny("llama")
    ran = []
    for i, layer in enumerate(find_anatomy(model).layers):
        layer.register_forward_pre_hook(lambda m, a, i=i: ran.append(i))
    monkeypatch.setattr(eigen, "BUDGET", 4 * 80 * 80 * 4)  # one layer at a time, solved exactly
    apart = find_directions(model, ids, Wanted(0.9))
    # Once to see whether the model looks ahead, and once to see who reads what.
    assert ran == [0, 1, 2] + [0, 1, 2, 0, 0, 1, 0, 1, 2]
    for a, b in zip(together.basis, apart.basis, strict=True):
        assert torch.equal(a, b)


def test_the_block_iteration_holds_the_same_energy(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(600, 600, generator=generator))[0]
    values = torch.arange(1, 601) ** -1.5
    moment = (basis * values) @ basis.T
    best = leading(moment, 0.95)
    exact, held = best.vectors, best.energy
    monkeypatch.setattr(eigen, "BUDGET", moment.nbytes * 3)
    monkeypatch.setattr(eigen, "_FIRST_BLOCK", 16)
    ours = leading(moment, 0.95)
    found, share_found = ours.vectors, ours.energy
    count = exact.shape[1]
    assert 30 < count <= found.shape[1] <= 1.01 * count + 1
    assert torch.allclose(found.T @ found, torch.eye(found.shape[1]), atol=1e-5)
    assert share(moment.double(), found) == pytest.approx(share_found, abs=1e-5) and held >= 0.95
    assert share_found >= 0.95 - 1e-6
    same = leading(moment, 0.5, count=12).vectors
    assert torch.linalg.norm(projector(same) - projector(exact[:, :12])) < 1e-3
    with pytest.raises(ValueError, match="of the 600 directions .* are needed"):
        leading(moment, 0.9999)


def test_a_fixed_number_is_taken_as_it_is():
    found = input_directions(tiny("llama"), *pad(prompts(lengths=LENGTHS), "left"), directions=5)
    assert [list(b.shape) for b in found] == [[80, 5]] * 3


def test_the_model_is_left_as_it_was():
    model = tiny("llama").train()
    attention = model.config._attn_implementation
    flags = [p.requires_grad for p in model.parameters()]
    input_directions(model, *pad(prompts(lengths=LENGTHS), "left"), directions=5)
    assert model.training and model.config._attn_implementation == attention
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"energy": 1.0}, "energy = 1.0, expected a share between 0 and 1"),
        ({"energy": 0}, "energy = 0, expected"),
        ({"directions": 0}, "directions = 0, expected a number from 1 to 79"),
        ({"directions": 80}, "directions = 80, .*read 80 inputs"),
        (
            {"directions": 7},
            "0.mlp.down_proj: 7 directions cannot be told from 26 tokens .* 28",
        ),
        (
            {"energy": 0.9},
            "0.mlp.down_proj: the .* directions that hold 90 % .*`protect.text`",
        ),
    ],
)
def test_bad_arguments_and_too_few_tokens_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        input_directions(tiny("llama"), *pad(prompts(), "right"), **settings)


def test_a_model_that_computes_nothing_is_named():
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    with pytest.raises(ValueError, match="second moment of trace 0.0"):
        input_directions(model, *pad(prompts(lengths=LENGTHS), "right"))


def test_soft_directions_that_text_does_not_use_are_numbers():
    moment = torch.diag(torch.tensor([4.0, 1.0, 0.0, 0.0, 0.0]))  # fewer inputs than directions
    found = soften(leading(moment, None, count=4))
    assert found.shape == (5, 3) and torch.isfinite(found).all()
    assert found.square().sum(0).max() <= 0.999 + 1e-6


def massive(layer=1, times=300.0, family="llama", dtype=torch.float32):
    """A tiny model in whose `layer` the first token's input is hundreds of times the others'."""
    model = tiny(family, dtype=dtype)
    down = find_anatomy(model).down[layer]
    size = down.weight.shape[1]
    plant = torch.zeros(size, dtype=dtype)
    plant[3], plant[7] = 1.0, -2.0

    def longer(module, args):
        x = args[0].clone()
        x[:, 0] = plant * times * float(x[:, 1:].norm(dim=-1).median())
        return (x, *args[1:])

    down.register_forward_pre_hook(longer)
    return model


def ordinary_share(model, ids, layer, basis):
    """What V holds of the directions of all tokens but the first ones."""
    seen = []
    down = find_anatomy(model).down[layer]
    handle = down.register_forward_pre_hook(lambda m, a: seen.append(a[0][0, 1:].double()))
    with torch.no_grad():
        for prompt in ids:
            model(input_ids=prompt[None], use_cache=False)
    handle.remove()
    x = torch.cat(seen)
    x = x / x.norm(dim=-1, keepdim=True)
    v = basis.double() / basis.double().norm(dim=0)
    return float((x @ v).square().sum() / x.square().sum())


def test_a_massive_activation_hides_nothing_and_is_protected_too():
    """Σ x xᵀ of such a layer is one direction: 0.99 of it protected nothing else."""
    ids = prompts(lengths=LENGTHS)
    model = massive()
    found = find_directions(model, ids, Wanted(0.9))
    plain = find_directions(tiny("llama"), ids, Wanted(0.9))
    counts = [b.shape[1] for b in found.basis]
    assert abs(counts[1] - plain.basis[1].shape[1]) <= 2  # all that ordinary tokens need
    assert ordinary_share(model, ids, 1, found.basis[1]) >= 0.9 - 1e-5
    assert [s["directions"] for s in found.sinks] == [0, 1, 0]
    assert found.sinks[1]["tokens"] == len(ids) and found.sinks[1]["longest"] > 100
    assert found.sinks[1]["energy"] > 0.999
    plant = torch.zeros(80)
    plant[3], plant[7] = 1.0, -2.0
    plant /= plant.norm()
    left = plant - found.basis[1] @ (found.basis[1].T @ plant)
    assert float(left.norm()) < 1e-3  # nothing of a sink is read
    soft = find_directions(model, ids, Wanted(0.9, soft=True)).basis[1]
    left = plant - soft @ (soft.T @ plant)
    assert float(left.norm()) < 2e-3  # of soft directions a thousandth


def test_what_text_uses_little_is_not_mixed_with_the_directions_of_sinks():
    """In float32 a direction with little energy is told from Q, which has none, by little."""
    torch.manual_seed(0)
    turned, q = torch.linalg.qr(torch.randn(128, 128))[0], torch.linalg.qr(torch.randn(128, 3))[0]
    rest = without((turned * torch.logspace(3, -3, 128)) @ turned.T, q)
    found = leading(rest, None, 110)
    mixed = float((found.vectors.T @ q).abs().max())
    apart = beside(found, q).vectors
    whole = torch.cat([q, apart], 1).double()
    off = float((whole.T @ whole - torch.eye(113)).abs().max())
    assert mixed > 1e-4 and off < 1e-5
    same = (apart[:, :20] * found.vectors[:, :20]).sum(0).abs()
    assert float((same - 1).abs().max()) < 1e-5


def test_a_fixed_number_counts_the_sinks_directions():
    found = find_directions(massive(), prompts(lengths=LENGTHS), Wanted(directions=6))
    assert [b.shape[1] for b in found.basis] == [6, 6, 6]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "llama4", "phi3"])
def test_every_linear_has_the_directions_of_what_it_reads(family):
    """By name, and against inputs that a plain hook sees; experts and routers are left out."""
    model, ids = tiny(family, dtype=torch.float64), prompts(lengths=LENGTHS)
    named = input_directions(model, *pad(ids, "left"), energy=0.7, targets="all")
    linears = {n: m for n, m in model.named_modules() if n in named}
    kinds = {n.rpartition(".")[2] for n in named}
    assert {"llama": "q_proj", "gpt2": "c_fc", "phi3": "gate_up_proj"}.get(
        family, "o_proj"
    ) in kinds
    assert not any(".experts." in n or n.endswith(("router", ".gate")) for n in named)
    seen: dict[str, list] = {name: [] for name in linears}
    for name, module in linears.items():
        module.register_forward_pre_hook(
            lambda m, a, name=name: seen[name].append(a[0].reshape(-1, a[0].shape[-1]))
        )
    with torch.no_grad():
        for prompt in ids:
            model(input_ids=prompt[None], use_cache=False)
    for name, basis in named.items():
        x = torch.cat(seen[name])
        x = x / x.norm(dim=-1, keepdim=True)
        assert share(x.T @ x, basis) >= 0.7 - 1e-6 > share(x.T @ x, basis[:, :-1])
    if family == "llama":
        same = [named[f"model.layers.1.self_attn.{x}_proj"] for x in "qkv"]
        assert same[0] is same[1] is same[2]


def test_targets_by_name_and_by_expression():
    ids = pad(prompts(lengths=LENGTHS), "left")
    some = input_directions(tiny("llama"), *ids, energy=0.5, targets=["v_proj", "mlp.up_proj"])
    assert {n.rpartition(".")[2] for n in some} == {"v_proj", "up_proj"} and len(some) == 6
    one = input_directions(tiny("llama"), *ids, energy=0.5, targets=r".*layers\.[02]\.mlp\.down.*")
    assert list(one) == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    with pytest.raises(ValueError, match="is called quarry_proj; there are down_proj, .* `all`"):
        input_directions(tiny("llama"), *ids, targets=["q_proj", "quarry_proj"])


def test_a_share_takes_no_more_memory_than_it_may():
    ids = prompts(lengths=LENGTHS)
    whole = find_directions(tiny("llama"), ids, Wanted(0.95, soft=True))
    size = sum(b.nbytes for b in whole.basis)
    some = find_directions(tiny("llama"), ids, Wanted(0.95, soft=True, memory=size // 3))
    assert sum(b.nbytes for b in some.basis) <= size // 3 and some.capped == 3
    half = Wanted(0.95, soft=True, memory=size // 3, dtype=torch.bfloat16)
    more = find_directions(tiny("llama"), ids, half)
    assert sum(b.nbytes for b in more.basis) <= size // 3
    assert more.basis[0].shape[1] > some.basis[0].shape[1] and more.basis[0].dtype == torch.bfloat16
    assert whole.capped == 0


def test_where_text_is_short_a_share_is_refused_or_settles_for_what_it_tells():
    ids = prompts(lengths=(20, 12, 24))
    with pytest.raises(ValueError, match="cannot be told from 56 tokens"):
        find_directions(tiny("llama"), ids, Wanted(0.99))
    found = find_directions(tiny("llama"), ids, Wanted(0.99, settles=True))
    assert [b.shape[1] for b in found.basis] == [14, 14, 14] and found.capped == 3
