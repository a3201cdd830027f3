"""Protected inputs: what the update must not read, after real training through real PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.families import FAMILIES, tiny
from helpers.protected import CALIBRATION, IDS, ROWS, train, trainable
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from loki_plugin import RowSelection, implant, input_directions
from loki_plugin.implanting import adapter
from loki_plugin.implanting.saved import check_saved_protection
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.fingerprint import fingerprint
from loki_plugin.protecting import installing, reading
from loki_plugin.protecting.directions import FILE_NAME, Directions
from loki_plugin.protecting.leaking import check_adapter, measure_leakage


def directions(family="llama", dtype=torch.float32, count=20):
    return input_directions(tiny(family, dtype=dtype), *CALIBRATION, directions=count)


def updates(tuned, family="llama", dtype=torch.float32):
    """ΔW_l [H, I] in float64, of a merged model against its base."""
    pairs = zip(find_anatomy(tuned).down, find_anatomy(tiny(family, dtype=dtype)).down, strict=True)
    dims = find_anatomy(tuned).row_dims
    deltas = [a.weight.double() - b.weight.double() for a, b in pairs]
    return [d.detach() if dim == 0 else d.detach().T for d, dim in zip(deltas, dims, strict=True)]


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_the_update_reads_no_direction_and_writes_selected_rows_only(family, rank):
    basis = directions(family)
    model = implant(tiny(family), ROWS, rank, protect=basis)
    train(model)
    adapter.check(model)
    with torch.no_grad():
        tuned = model(input_ids=IDS).logits
        merged = model.merge_and_unload()
        assert torch.allclose(merged(input_ids=IDS).logits, tuned, atol=1e-4, rtol=1e-4)
    for delta, u, rows in zip(updates(merged, family), basis, ROWS, strict=True):
        assert (delta != 0).any(1).nonzero()[:, 0].tolist() == sorted(rows)
        assert reading.leakage(delta, u) < 1e-5  # rounding of W, of which ΔW is the difference
    assert all(d.norm() > 0.1 for d in updates(merged, family))


def test_without_protection_the_same_training_does_read_them():
    """The law above can fail."""
    model = implant(tiny("llama"), ROWS)
    train(model)
    for delta, u in zip(updates(model.merge_and_unload()), directions(), strict=True):
        assert reading.leakage(delta, u) > 0.2


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("tokens", [1, 50])
def test_on_inputs_inside_the_span_the_layer_answers_as_the_base(rank, tokens):
    basis = directions()
    model = implant(tiny("llama"), ROWS, rank, protect=basis)
    train(model)
    for layer, u in zip(find_anatomy(model).down, basis, strict=True):
        x = torch.randn(tokens, u.shape[1]) @ u.T
        other = torch.randn(tokens, u.shape[0])
        with torch.no_grad():
            change = layer(x) - layer.base_layer(x)
            moved = layer(other) - layer.base_layer(other)
        assert change.abs().max() < 1e-4 * moved.abs().max()


@pytest.mark.parametrize("rank", [None, 2])
def test_a_step_is_a_step_of_the_adapter_that_sees_the_rest_of_its_input(rank):
    """Against the plain definition, x - U(Uᵀx) before an ordinary A, under Adam."""
    basis = directions()
    model, plain = (
        implant(tiny("llama"), ROWS, rank, protect=basis),
        implant(tiny("llama"), ROWS, rank),
    )
    plain.load_state_dict(model.state_dict())
    for layer, u in zip(find_anatomy(plain).down, basis, strict=True):
        layer.lora_A["default"].register_forward_pre_hook(
            lambda m, args, u=u: (args[0] - args[0] @ u @ u.T,)
        )
    train(model, 6), train(plain, 6)
    with torch.no_grad():
        a, b = model(input_ids=IDS).logits, plain(input_ids=IDS).logits
    start = tiny("llama")(input_ids=IDS).logits
    assert (a - b).abs().max() < 1e-4 * (a - start).abs().max()


@pytest.mark.parametrize("rank", [None, 2])
def test_few_and_many_tokens_go_different_ways_to_the_same_answer(rank):
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(80, 9))[0]
    a = reading.ProtectedA(torch.nn.Parameter(torch.randn(6, 80)), u)
    x = torch.randn(40, 80)
    with torch.no_grad():  # in an evaluation each call goes its own way
        whole, single = a.eval()(x), torch.cat([a(row[None]) for row in x])
    assert torch.allclose(whole, single, atol=1e-5)
    truth = (x.double() - x.double() @ u.double() @ u.double().T) @ a.weight.double().T
    assert torch.allclose(whole.double(), truth, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_autocast_does_not_leak(dtype):
    """x inside span(U), A with a large part there: in bfloat16 products it would come through."""
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(512, 64))[0]
    part = torch.randn(16, 64) @ u.T
    weight = torch.nn.Parameter((10 * part + torch.randn(16, 512)).to(dtype))
    a = reading.ProtectedA(weight, u)
    x = torch.randn(100, 64) @ u.T
    for inputs in (x, x[:4]):
        with torch.autocast("cpu", torch.bfloat16):
            out = a(inputs.to(dtype))
        scale = inputs.norm() * outside_norm(weight, u) / 512**0.5
        # What is left is the rounding of x and of A outside U to bfloat16.
        assert out.float().norm() < (1e-2 if dtype == torch.float32 else 0.3) * scale * 16**0.5


def outside_norm(weight, u):
    w = weight.detach().double()
    return float((w - w @ u.double() @ u.double().T).norm())


def test_folding_twice_keeps_the_bytes_and_the_function():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        u = torch.linalg.qr(torch.randn(300, 40))[0]
        a = reading.ProtectedA(torch.nn.Parameter(torch.randn(7, 300).to(dtype)), u)
        x = torch.randn(50, 300).to(dtype)
        before = a(x)
        a.fold()
        once = a.weight.clone()
        assert torch.allclose(a(x), before, atol=50 * torch.finfo(dtype).eps, rtol=0.05)
        a.fold(), a.state_dict()
        assert torch.equal(a.weight, once)
        share = reading.leakage(once, u)
        assert share <= torch.finfo(dtype).eps


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("rank", [None, 2])
def test_stock_peft_loads_what_is_saved_as_the_running_model(tmp_path, rank, soft):
    basis = input_directions(tiny("llama"), *CALIBRATION, directions=20, soft=soft)
    model = implant(tiny("llama"), ROWS, rank, protect=basis)
    train(model)
    model.save_pretrained(tmp_path)
    names = {n.split(".", 7)[-1] for n in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"lora_A.weight", "lora_B.weight"}
    stock = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert not list(installing.protected_modules(stock))
    with torch.no_grad():
        ours, theirs = model.eval()(input_ids=IDS).logits, stock(input_ids=IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    merged = model.merge_and_unload()
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=IDS).logits, theirs, atol=1e-4, rtol=1e-4)
    for delta, rows in zip(updates(merged), ROWS, strict=True):
        assert (delta != 0).any(1).nonzero()[:, 0].tolist() == sorted(rows)


@pytest.mark.parametrize("rank", [None, 2])
def test_saving_in_the_middle_and_resuming_goes_on_bit_by_bit(tmp_path, rank):
    basis = directions()
    model = implant(tiny("llama"), ROWS, rank, protect=basis)
    optimizer = train(model, 3)
    model.save_pretrained(tmp_path)
    states = copy.deepcopy(optimizer.state_dict())
    train(model, 3, optimizer)
    again = implant(tiny("llama"), ROWS, rank, protect=basis)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    adapter.freeze(again)
    fresh = torch.optim.AdamW(trainable(again), lr=0.05, weight_decay=0.1)
    fresh.load_state_dict(states)
    train(again, 3, fresh)
    resumed = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose sizes 4-bit blocks divide."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    settings = FAMILIES["llama"][1] | {"hidden_size": 64, "intermediate_size": 128}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, 0.12)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_are_protected_as_well(folder, tmp_path, bits, rank):
    if bits == 4:
        quantised = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    else:
        quantised = BitsAndBytesConfig(load_in_8bit=True)

    def load():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=quantised
        )

    base = load()
    basis = input_directions(base, *CALIBRATION, directions=20)
    model = implant(base, ROWS, rank, protect=basis).train()
    train(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for i, (u, rows) in enumerate(zip(basis, ROWS, strict=True)):
        a, b = (
            saved[f"base_model.model.model.layers.{i}.mlp.down_proj.lora_{x}.weight"] for x in "AB"
        )
        delta = b.double() @ a.double()
        assert delta.norm() > 0.05 and reading.leakage(delta, u) < 1e-6
        assert (delta != 0).any(1).nonzero()[:, 0].tolist() == sorted(rows)
    stock = PeftModel.from_pretrained(load(), tmp_path).train()
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS).logits, stock(input_ids=IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_nothing():
    basis = directions()
    found = []
    for checkpointing in (False, True):
        model = implant(tiny("llama"), ROWS, protect=basis).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        train(model)
        found.append({n: t for n, t in model.state_dict().items() if "lora_A" in n})
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=1e-5), name


def test_a_protected_model_can_be_copied_and_moved():
    model = implant(tiny("llama"), ROWS, protect=directions())
    train(model)
    twin = copy.deepcopy(model)
    train(twin)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        tuned = twin(input_ids=IDS).logits
        assert torch.allclose(twin.merge_and_unload()(input_ids=IDS).logits, tuned, atol=1e-4)
        assert torch.equal(model(input_ids=IDS).logits, before)
    model.to(torch.bfloat16)
    (_, a), *_ = installing.protected_modules(model)
    assert a.weight.dtype == torch.bfloat16 and a.directions.dtype == torch.float32


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_linears_that_read_one_input_share_its_directions_wherever_they_are(given):
    """A card would hold V of queries, keys and values three times."""
    known = input_directions(tiny("llama"), *CALIBRATION, directions=7, targets="all")
    wider: dict = {}
    known = {n: wider.setdefault(id(v), v.to(given)) for n, v in known.items()}
    model = implant(tiny("llama"), ROWS, protect=known, targets="all")
    protected = [m for _, m in installing.protected_modules(model)]
    assert len(protected) == 21
    for device in ("cpu", "meta"):  # which stands for a card here
        placed = [m.placed(torch.device(device)) for m in protected]
        assert len({id(v) for v in placed}) == 12 and {v.device.type for v in placed} == {device}
        assert {v.dtype for v in placed} == {torch.float32}


def test_layers_without_rows_or_without_directions_stay_plain():
    basis = directions()
    basis[0] = basis[0][:, :0]
    model = implant(tiny("llama"), [[1, 2], [], [5, 6]], protect=basis)
    assert [n.split(".")[4] for n, _ in installing.protected_modules(model)] == ["2"]


def test_a_saved_adapter_is_read_back_with_its_leakage(tmp_path):
    basis = directions()
    model = implant(tiny("llama"), [ROWS[0], [], ROWS[2]], protect=basis)
    train(model)
    model.save_pretrained(tmp_path)
    names = find_anatomy(tiny("llama")).names
    shares = check_saved_protection(tmp_path, names, Directions(basis))
    assert shares[1] == 0 and all(0 < share < 1e-6 for share in (shares[0], shares[2]))
    with pytest.raises(ValueError, match="holds other directions than those in use"):
        check_saved_protection(tmp_path, names, Directions(directions(count=19)))
    *_, (_, last) = installing.protected_modules(model)
    last.fold = lambda: None  # what a trainer that saves past the modules would write
    train(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layer 2: .* % of the saved update reads protected"):
        check_saved_protection(tmp_path, names, Directions(basis))


def test_the_directions_lie_beside_the_adapter_and_go_when_it_is_overwritten(tmp_path):
    basis = directions()
    implant(tiny("llama"), ROWS, protect=basis).save_pretrained(tmp_path)
    assert Directions.load(tmp_path / FILE_NAME) == Directions(basis)
    implant(tiny("llama"), ROWS).save_pretrained(tmp_path)
    assert not (tmp_path / FILE_NAME).exists()


def test_directions_of_another_model_or_form_are_refused(tmp_path):
    basis = directions()
    with pytest.raises(ValueError, match="for 2 layers of 80 inputs, this model has 3 of 80"):
        implant(tiny("llama"), ROWS, protect=basis[:2])
    with pytest.raises(ValueError, match="for 3 layers of 79 to 80 inputs"):
        narrow = torch.linalg.qr(basis[0][:79])[0]
        implant(tiny("llama"), ROWS, protect=[narrow, *basis[1:]])
    with pytest.raises(ValueError, match="layer 1: the columns .* are not orthonormal .*off by 3"):
        implant(tiny("llama"), ROWS, protect=[basis[0], 2 * basis[1], basis[2]])
    with pytest.raises(ValueError, match=r"layer 0: .* with u < I, got \[80, 80\]"):
        implant(tiny("llama"), ROWS, protect=[torch.eye(80)] * 3)
    with pytest.raises(ValueError, match="layer 0: .* got list"):
        implant(tiny("llama"), ROWS, protect=[[0.5]] * 3)
    mark = fingerprint(tiny("llama", seed=1))
    with pytest.raises(ValueError, match="on another model: its embeddings or norms"):
        implant(tiny("llama"), ROWS, protect=Directions(basis, mark))


def test_directions_that_were_checked_stand_what_a_host_does_to_the_base():
    """Axolotl casts biases of quantised bases to float32, and grows embeddings, before training."""
    model = tiny("qwen2", dtype=torch.bfloat16)
    made = Directions(directions("qwen2", torch.bfloat16), fingerprint(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data = parameter.data.float()
    model.resize_token_embeddings(97 + 3, mean_resizing=False)
    wrapped = implant(model, ROWS)
    with pytest.raises(ValueError, match="found on another model"):
        installing.protect_inputs(wrapped, made)
    installing.protect_inputs(wrapped, made, checked=True)
    assert len(list(installing.protected_modules(wrapped))) == 3
    with pytest.raises(ValueError, match="the directions are for 2 layers"):
        installing.protect_inputs(wrapped, Directions(made.basis[:2]), checked=True)


def test_the_directions_file_keeps_everything(tmp_path):
    mark = fingerprint(tiny("llama"))
    made = {"energy": [0.9, 0.9, 0.9], "tokens": 279}
    saved = Directions(directions(), mark, made)
    path = saved.save(tmp_path / FILE_NAME)
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]
    loaded = Directions.load(path)
    assert loaded == saved and loaded.made == made and loaded.fingerprint == mark
    assert loaded != Directions(directions(count=19))
    loaded.check(tiny("llama"))
    loaded.check(implant(tiny("llama"), ROWS, protect=loaded))  # an adapter makes no other model
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match="loki_directions.safetensors' is damaged"):
        Directions.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        Directions.load(tmp_path / "none.safetensors")
    other = tmp_path / "other.safetensors"
    tiny("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(other)
    with pytest.raises(ValueError, match="is no directions file that this package reads"):
        Directions.load(other)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_leakage_is_read_from_files_and_shows_what_is_not_protected(tmp_path, family):
    basis, base = Directions(directions(family)), tmp_path / "base"
    tiny(family).save_pretrained(base)
    rows = RowSelection(ROWS)
    for name, protect in (("protected", basis), ("plain", None)):
        model = implant(tiny(family), ROWS, protect=protect)
        train(model)
        model.save_pretrained(tmp_path / name)
        model.merge_and_unload().save_pretrained(tmp_path / f"{name}-merged")
    for kind, bound in (("", 1e-6), ("-merged", 1e-4)):
        report = measure_leakage(base, tmp_path / f"protected{kind}", rows, basis)
        assert all(0 < share < bound for share in report.shares)
        report = measure_leakage(base, tmp_path / f"plain{kind}", rows, basis)
        assert all(share > 0.2 for share in report.shares)
        assert report.chance == [0.5] * 3 or family == "gpt2"
    with pytest.raises(ValueError, match="directions are for 2 layers, the base has 3"):
        measure_leakage(base, tmp_path / "plain", rows, Directions(basis.basis[:2]))
    narrow = [torch.eye(7)[:, :2]] * 3
    with pytest.raises(ValueError, match="are for 7 inputs, the base has"):
        measure_leakage(base, tmp_path / "plain", rows, Directions(narrow))


def test_an_adapter_with_a_row_too_many_is_not_proved(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    model = implant(tiny("llama"), ROWS)
    model.save_pretrained(tmp_path / "adapter")
    assert "3 down-projections" in check_adapter(
        tmp_path / "base", tmp_path / "adapter", RowSelection(ROWS)
    )
    with pytest.raises(ValueError, match="layer 1: the adapter changes row 47"):
        check_adapter(
            tmp_path / "base", tmp_path / "adapter", RowSelection([ROWS[0], [0, 5], ROWS[2]])
        )
