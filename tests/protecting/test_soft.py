"""Soft directions: an update that reads less of what general text uses most."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import tiny
from helpers.protected import CALIBRATION, IDS, ROWS, train, trainable
from peft import PeftModel
from safetensors.torch import load_file

from loki_plugin import RowSelection, implant, input_directions
from loki_plugin.implanting import adapter
from loki_plugin.implanting.saved import check_saved_protection
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.protecting import installing, reading
from loki_plugin.protecting.directions import FILE_NAME, SOFTEST, Directions
from loki_plugin.protecting.leaking import measure_leakage


def soft(family="llama", dtype=torch.float32, **more):
    return input_directions(tiny(family, dtype=dtype), *CALIBRATION, soft=True, **more)


def protected(rank=None, basis=None):
    return implant(tiny("llama"), ROWS, rank, protect=basis or soft(energy=0.95))


@pytest.mark.parametrize("asked", [{"energy": 0.9}, {"directions": 12}], ids=str)
def test_what_is_read_is_whitened_down_to_the_last_direction(asked):
    """P = I - U diag(1 - √(λ_u/λ_i)) Uᵀ against a plain float64 eigendecomposition."""
    model = tiny("llama", dtype=torch.float64)
    inputs = [[] for _ in range(3)]
    for layer, down in enumerate(find_anatomy(model).down):
        down.register_forward_pre_hook(lambda m, args, layer=layer: inputs[layer].append(args[0]))
    ids, mask = CALIBRATION
    with torch.no_grad():
        for row, real in zip(ids, mask.bool(), strict=True):
            model(input_ids=row[real][None])
    found = soft(dtype=torch.float64, **asked)
    hard = input_directions(tiny("llama", dtype=torch.float64), *CALIBRATION, **asked)
    for layer, (v, u) in enumerate(zip(found, hard, strict=True)):
        x = torch.cat([i[0] for i in inputs[layer]])
        x = x / x.norm(dim=-1, keepdim=True)
        values = torch.linalg.eigvalsh(x.T @ x).flip(0)
        count = u.shape[1]
        taken = (1 - (values[count - 1] / values[:count]).sqrt()).clamp(max=SOFTEST)
        assert v.shape[1] == count - 1
        truth = u @ taken.diag() @ u.T
        assert torch.allclose(v @ v.T, truth, atol=1e-8)
        # What general text moves, √(xᵀ P² x) summed, is alike in all of them.
        seen = (x - (x @ v) @ v.T) @ u
        assert torch.allclose(seen.square().sum(0), values[count - 1].expand(count), rtol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_step_is_a_step_of_the_adapter_that_sees_its_input_whitened(rank):
    """Against the plain definition, x - V(Vᵀx) before an ordinary A, under Adam."""
    basis = soft(energy=0.95)
    model, plain = protected(rank, basis), implant(tiny("llama"), ROWS, rank)
    with torch.no_grad():
        for ours, theirs in zip(trainable(model), trainable(plain), strict=True):
            theirs.copy_(ours)
    for layer, v in zip(find_anatomy(plain).down, basis, strict=True):
        layer.lora_A["default"].register_forward_pre_hook(
            lambda m, args, v=v: (args[0] - args[0] @ v @ v.T,)
        )
    train(model, 6), train(plain, 6)
    start = tiny("llama")(input_ids=IDS).logits
    with torch.no_grad():
        a, b = model(input_ids=IDS).logits, plain(input_ids=IDS).logits
    assert (a - b).abs().max() < 1e-4 * (a - start).abs().max()


def test_plain_gradient_descent_takes_the_whitened_gradient_step():
    """ΔW = -lr · G P², G the gradient of the unprotected rows."""
    basis = soft(energy=0.95)
    plain, model = implant(tiny("llama"), ROWS), protected(None, basis)
    for each in (plain, model):
        train(each, 1, torch.optim.SGD(trainable(each), lr=1.0))
    layers = zip(find_anatomy(plain).down, find_anatomy(model).down, basis, strict=True)
    for old, new, v in layers:
        p = torch.eye(len(v)) - v @ v.T
        step = old.lora_A["default"].weight.detach() @ p @ p
        folded = new.lora_A["default"].fold()
        assert torch.allclose(folded, step, atol=1e-5 * float(step.abs().max()))
        assert (folded - old.lora_A["default"].weight).norm() > 0.1 * step.norm()


@pytest.mark.parametrize("rank", [None, 2])
def test_saving_in_the_middle_and_resuming_goes_on_bit_by_bit(tmp_path, rank):
    basis = soft(energy=0.95)
    model = protected(rank, basis)
    optimizer = train(model, 3)
    model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        model(input_ids=IDS)  # an evaluation
    model.save_pretrained(tmp_path / "second")  # nothing has trained in between
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("first", "second"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    states = copy.deepcopy(optimizer.state_dict())
    again = protected(rank, basis)
    again.load_adapter(tmp_path / "first", "default", is_trainable=True)
    adapter.freeze(again)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name  # A itself, not only what is saved of it
    train(model, 3, optimizer)
    fresh = torch.optim.AdamW(trainable(again), lr=0.05, weight_decay=0.1)
    fresh.load_state_dict(states)
    train(again, 3, fresh)
    resumed = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed[name]), name
    assert any((resumed[k] != a[k.replace(".default", "")]).any() for k in resumed if "lora_A" in k)


def test_a_saved_adapter_is_installed_again_with_its_function(tmp_path):
    """`lora_model_dir`: the adapter was loaded as an ordinary one, and is protected afterwards."""
    basis = soft(energy=0.95)
    model = protected(2, basis)
    train(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    adapter.install(again, RowSelection(ROWS, 48), 2, fresh=False)
    installing.protect_inputs(again, basis, fresh=False)
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_second_adapter_of_a_trained_one_answers_as_it(tmp_path):
    """What TRL's DPOTrainer does for its reference: add one, and copy every parameter."""
    model = protected(2)
    train(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.data.copy_(model.get_parameter(name.replace(".ref.", ".default.")).data)
    with torch.no_grad():
        own = model.eval()(input_ids=IDS).logits
        model.set_adapter("ref")
        assert torch.equal(model(input_ids=IDS).logits, own)


def test_it_is_proved_and_told_as_soft(tmp_path):
    basis, rows = Directions(soft(energy=0.95)), RowSelection(ROWS, 48)
    assert (
        basis.soft
        and not Directions(input_directions(tiny("llama"), *CALIBRATION, energy=0.9)).soft
    )
    tiny("llama").save_pretrained(tmp_path / "base")
    model = protected(None, basis)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    assert Directions.load(tmp_path / "adapter" / FILE_NAME) == basis
    shares = check_saved_protection(tmp_path / "adapter", find_anatomy(model).names, basis)
    report = measure_leakage(tmp_path / "base", tmp_path / "adapter", rows, basis)
    assert report.shares == shares and "softly protected directions: at most" in report.text()
    plain = implant(tiny("llama"), ROWS)
    train(plain)
    plain.save_pretrained(tmp_path / "plain")
    read = measure_leakage(tmp_path / "base", tmp_path / "plain", rows, basis).shares
    assert all(0 < less < more for less, more in zip(shares, read, strict=True))


def test_what_cannot_be_soft_is_refused():
    basis = soft(energy=0.95)
    hard = input_directions(tiny("llama"), *CALIBRATION, energy=0.9)
    with pytest.raises(ValueError, match="some layers' directions are hard, others soft"):
        Directions([hard[0], *basis[1:]])
    with pytest.raises(ValueError, match="layer 0: the columns .* are not orthonormal"):
        Directions([basis[0] + 0.2, *basis[1:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undoing_what_is_saved_costs_no_more_than_rounding(dtype):
    """In bfloat16 too: dense adapters of large models are trained in it to save memory."""
    torch.manual_seed(0)
    taken = torch.linspace(SOFTEST, 0.1, 64)  # the first is read a thousand times less
    v = torch.linalg.qr(torch.randn(512, 64))[0] * taken.sqrt()
    a = reading.ProtectedA(torch.nn.Parameter(torch.randn(16, 512).to(dtype)), v)
    x = torch.randn(40, 512).double()

    def said():  # in float64: what the weights are worth, without the rounding of the product
        return (x - (x @ v.double()) @ v.double().T) @ a.weight.detach().double().T

    before, first = said(), a.fold().float()
    loaded = reading.ProtectedA(torch.nn.Parameter(torch.zeros(16, 512).to(dtype)), v)
    loaded.load_state_dict(a.state_dict())
    assert torch.equal(loaded.weight, a.weight)
    a._folded = None  # fold anew
    again = a.fold().float()
    eps = torch.finfo(dtype).eps
    assert (again - first).norm() < eps * first.norm()
    assert 0 < (said() - before).norm() < eps * before.norm()


@pytest.mark.parametrize("asked", [{"directions": 1}, {"energy": 0.01}], ids=str)
def test_one_direction_per_layer_would_protect_nothing(asked):
    with pytest.raises(ValueError, match="so that nothing would be protected; ask for a larger"):
        soft(**asked)
    assert [u.shape[1] for u in input_directions(tiny("llama"), *CALIBRATION, **asked)] == [1] * 3
