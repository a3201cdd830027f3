"""Directions in 8 bits: the same numbers in half of the memory."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loki_plugin.protecting import packed as packing
from loki_plugin.protecting.directions import SOFTEST, Directions, is_soft
from loki_plugin.protecting.finding import find_directions
from loki_plugin.protecting.packed import BLOCK, BYTES, WIDE, Packed, packed, rounded
from loki_plugin.protecting.reading import ProtectedA, outside
from loki_plugin.protecting.solving import Wanted


def soft_directions(size: int, count: int, seed: int = 0, strongest: float = 0.9) -> torch.Tensor:
    torch.manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(size, count))[0]
    return vectors * torch.linspace(strongest, 0.01, count).sqrt()


def small(size: int, count: int, **of) -> tuple[torch.Tensor, Packed]:
    v = rounded(soft_directions(size, count, **of), SOFTEST)
    found = packed(v)
    assert found is not None
    return v, found


@pytest.mark.parametrize("size", [BLOCK, 3 * BLOCK, 200, 7])
def test_packing_loses_no_bit_of_what_was_rounded(size):
    v, found = small(size, max(1, size // 3))
    assert v.dtype == torch.bfloat16
    assert torch.equal(found.whole(), v)
    assert found.shape == tuple(v.shape)
    assert torch.cat(list(found.parts(torch.float64)), 1).equal(v.double())
    if size == 3 * BLOCK:
        assert found.nbytes == BYTES * v.numel() < 0.55 * v.nbytes


def test_a_number_moves_by_half_a_step_of_its_block():
    v = soft_directions(256, 40)
    step = v.unflatten(0, (-1, BLOCK)).abs().amax(1) / 127
    moved = (rounded(v, SOFTEST).float() - v).unflatten(0, (-1, BLOCK)).abs().amax(1)
    # A scale is a power of two, so that a step is up to twice as wide as it had to be.
    assert (moved <= step * (1 + 1e-6)).all()
    assert (moved > 0).all()


def test_each_block_has_its_own_scale():
    v = torch.zeros(2 * BLOCK, 1)
    v[0], v[BLOCK] = 0.5, 1e-6
    assert torch.equal(rounded(v, SOFTEST).nonzero(), v.nonzero())
    found = packed(rounded(v, SOFTEST))
    assert found is not None and found.scales[0] > 1000 * found.scales[1]


@pytest.mark.parametrize("seed", range(4))
def test_rounding_makes_no_soft_direction_hard(seed):
    v = soft_directions(128, 64, seed)
    v = v / v.norm(dim=0) * SOFTEST**0.5
    assert (packing._nearest(v).double().square().sum(0) > SOFTEST).any()  # it would
    found = rounded(v, SOFTEST)
    assert (found.double().square().sum(0) <= SOFTEST).all()
    assert is_soft(found)
    assert (found.float() - v).norm() < 0.02 * v.norm()


def test_directions_of_sinks_stay_as_they_are():
    v, _ = small(192, 30)
    sinks = soft_directions(192, 2, seed=1).to(torch.bfloat16)
    both = torch.cat([sinks, v], 1)
    found = packed(both)
    assert found is not None
    assert torch.equal(found.wide[:, :2], sinks) and found.numbers.shape[1] == 30 - 30 // WIDE
    assert torch.equal(found.whole(), both)


def test_what_every_token_reads_is_let_through_no_more_than_in_16_bits():
    """The leading direction holds most of what text reads, and soft ones read the least of it."""
    v = soft_directions(256, 64, strongest=0.998)
    leading = v[:, :1] / v[:, :1].norm()

    def passes(given: torch.Tensor) -> float:
        return float(outside(leading.T.double(), given.double()).norm())

    assert packed(rounded(v, SOFTEST)) is not None
    assert passes(rounded(v, SOFTEST)) < 1.5 * passes(v.to(torch.bfloat16))
    assert passes(packing._nearest(v)) > 2 * passes(v.to(torch.bfloat16))  # it would


@pytest.mark.parametrize("of", ["float32", "rounded to bfloat16 only", "nothing"])
def test_what_is_not_made_of_such_numbers_is_not_packed(of):
    v = soft_directions(192, 30)
    given = {"float32": rounded(v, SOFTEST).float(), "nothing": v[:, :0].to(torch.bfloat16)}
    assert packed(given.get(of, v.to(torch.bfloat16))) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reading_through_it_is_reading_through_the_rounded_directions(dtype, monkeypatch):
    monkeypatch.setattr(packing, "PART", 7)  # in several groups of columns
    v, found = small(192, 30)
    x = torch.randn(5, 192, dtype=dtype)
    exact = x.double() - x.double() @ v.double() @ v.double().T
    error = (outside(x, found) - exact).norm() / exact.norm()
    assert error < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("tokens", [2, 50])
def test_a_protected_adapter_holds_them_in_8_bits_and_trains_as_with_the_whole(tokens):
    v, _ = small(192, 30)
    torch.manual_seed(0)
    weight, x = torch.randn(8, 192), torch.randn(tokens, 192)
    gradients, outputs = [], []
    for given in (v, v.float()):  # float32 ones are held as they are
        module = ProtectedA(torch.nn.Parameter(weight.clone()), given)
        assert isinstance(module.directions, Packed) == (given is v)
        outputs.append(module(x))
        outputs[-1].square().sum().backward()
        gradients.append(module.weight.grad)
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-4)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-3)


def test_what_is_folded_and_loaded_again_is_folded_to_the_same_bytes():
    v, _ = small(192, 30)
    module = ProtectedA(torch.nn.Parameter(torch.randn(8, 192)), v)
    exact = outside(module.weight.detach().double(), v)
    saved = module.state_dict()["weight"].clone()
    assert torch.allclose(saved.double(), exact, atol=1e-6)
    again = ProtectedA(torch.nn.Parameter(torch.zeros(8, 192)), v)
    again.load_state_dict({"weight": saved})
    assert torch.equal(again.fold(), saved)
    assert torch.equal(again.weight, module.weight)  # both go on alike


def test_modules_that_read_one_input_share_them():
    v, _ = small(192, 30)
    one, two = (ProtectedA(torch.nn.Parameter(torch.randn(8, 192)), v) for _ in range(2))
    assert one.directions is two.directions
    meta = torch.device("meta")
    placed = [module.placed(meta) for module in (one, two)]
    assert placed[0].numbers is placed[1].numbers
    assert placed[0].numbers.device == meta


def test_a_file_of_them_takes_half_and_gives_the_same_back(tmp_path):
    v, _ = small(192, 30)
    whole, plain = Directions([v, v.clone()]), Directions([v * 0.99, v * 0.98])
    assert packed(plain.basis[0]) is None
    sizes = [d.save(tmp_path / f"{i}").stat().st_size for i, d in enumerate((whole, plain))]
    assert sizes[0] < 0.6 * sizes[1]
    again = Directions.load(tmp_path / "0")
    assert again == whole and again.basis[0].dtype == torch.bfloat16


def test_the_direction_of_a_sink_that_lies_on_one_input_stays_soft():
    """√0.999 of an input is 1 in bfloat16, and a direction of length 1 is a hard one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # one neuron answers to the first token, with hundreds of times the rest
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[1] = torch.eye(64)[0]
        for linear in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            linear.weight[5] = 8 * torch.eye(64)[0]
    prompts = [[1, *torch.randint(2, 97, (30,)).tolist()] for _ in range(64)]
    wanted = Wanted(0.99, None, True, None, torch.int8, settles=True)
    found = find_directions(model, prompts, wanted)
    first = found.basis[0][:, 0].double()
    assert found.sinks[0]["directions"] and first.abs().max() > 0.99
    assert 0.98 < first.square().sum() <= SOFTEST and is_soft(found.basis[0])
    assert packed(found.basis[0]) is not None
    Directions(found.basis)
