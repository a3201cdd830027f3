"""The fingerprint: stable where the model is the same, different where it is not."""

from __future__ import annotations

import pytest
import torch
from helpers.families import tiny
from peft import prepare_model_for_kbit_training
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loki_plugin import implant
from loki_plugin.model import fingerprint as module
from loki_plugin.model.fingerprint import difference, fingerprint, same_model
from loki_plugin.model.quantised import quantised_modules, row_scales
from loki_plugin.rows import RowSelection


def test_wrapping_an_adapter_and_training_mode_change_nothing():
    model = tiny("qwen2")
    before = fingerprint(model)
    assert fingerprint(implant(model, [[1, 2]] * 3).train()) == before
    assert before["quantisation"] == "none:float32"


@pytest.mark.parametrize("change", ["one element", "swapped rows", "swapped layers"])
def test_every_change_of_weights_changes_the_checksum_only(change):
    model = tiny("llama")
    before = fingerprint(model)
    layers = model.model.layers
    with torch.no_grad():
        if change == "one element":
            layers[2].mlp.gate_proj.weight[7, 11] += 1e-4
        elif change == "swapped rows":
            weight = layers[0].self_attn.q_proj.weight
            weight[[3, 4]] = weight[[4, 3]].clone()
        else:
            a, b = layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight
            a.copy_(b), b.copy_(a.clone())
    after = fingerprint(model)
    assert after.pop("weights") != before.pop("weights")
    assert after == before


def test_what_loading_and_trainers_change_does_not_count():
    model = tiny("llama")
    before = fingerprint(model)
    model.config.use_cache = False
    model.config.max_position_embeddings = 4096
    model.config.eos_token_id = 7
    model.set_attn_implementation("sdpa")
    assert fingerprint(model) == before
    model.config.rms_norm_eps = 1e-3
    assert fingerprint(model)["config"] != before["config"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_the_same_after_peft_has_prepared_it(tmp_path, bits):
    """As scripts do before they implant rows that were found earlier."""
    tiny("qwen2").to(torch.bfloat16).save_pretrained(tmp_path)  # it has biases

    def load():
        how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4")
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, quantization_config=how
        )

    before = fingerprint(load())
    prepared = prepare_model_for_kbit_training(load())
    assert prepared.lm_head.weight.dtype == prepared.model.norm.weight.dtype == torch.float32
    after = fingerprint(prepared)
    assert after["weights"] != before["weights"]
    assert same_model(before, after) is None and same_model(after, before) is None
    rows = RowSelection([[1, 2]] * prepared.config.num_hidden_layers, 48, before)
    implant(prepared, RowSelection.load(rows.save(tmp_path / "rows.json")))
    old = {k: v for k, v in before.items() if k != "packed"}  # of a version before 0.6.0
    assert "its weights have other values" in same_model(old, after)
    other = prepare_model_for_kbit_training(load())
    with torch.no_grad():
        other.lm_head.weight[3, 4] += 0.5
    assert "its weights have other values" in same_model(before, fingerprint(other))
    other = prepare_model_for_kbit_training(load())
    other.model.layers[1].mlp.down_proj.weight.data.view(-1)[7] += 1
    assert "its weights have other values" in same_model(before, fingerprint(other))


def test_loads_of_one_checkpoint_in_other_precisions_are_the_same_model(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    plain = fingerprint(model)
    half = fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16))
    four = fingerprint(
        AutoModelForCausalLM.from_pretrained(
            tmp_path,
            dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
            ),
        )
    )
    assert four["quantisation"] == "bnb-nf4-double-64"
    assert len({f["weights"] for f in (plain, half, four)}) == 3
    for a, b in ((plain, half), (plain, four), (four, half)):
        assert same_model(a, b) is None and same_model(b, a) is None
    other = fingerprint(tiny("llama", seed=1))
    assert "embeddings or norms" in same_model(plain, other)
    assert "architecture" in same_model(plain, fingerprint(tiny("qwen2")))


def spread(model):
    """Weights of all magnitudes that checkpoints hold, so that roundings differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            size = torch.randint(-30, 4, parameter.shape, generator=generator)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2.0**size)
    return model


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_which_loads_of_a_checkpoint_agree(tmp_path, stored):
    spread(tiny("llama")).to(stored).save_pretrained(tmp_path)

    def load(dtype):
        return fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))

    wide, brain, half = map(load, (torch.float32, torch.bfloat16, torch.float16))
    assert same_model(wide, brain) is None and same_model(brain, wide) is None
    assert same_model(wide, half) is None and same_model(half, wide) is None
    together = same_model(brain, half)
    if stored is torch.float32:  # two roundings of 24 bits to 8: what they dropped is gone
        assert "embeddings or norms" in together
    else:
        assert together is None
    other = fingerprint(tiny("llama", seed=1))
    assert "embeddings or norms" in same_model(half, other)


def test_a_fingerprint_of_version_0_1_1_is_compared_as_it_was():
    model = tiny("llama")
    old = {k: v for k, v in fingerprint(model).items() if k in module.FIELDS}
    assert difference(old, model) is None
    assert same_model(old, fingerprint(tiny("llama", seed=1))) is not None
    bare = {k: v for k, v in old.items() if k != "identity"} | {"identity": "x"}
    assert "embeddings or norms" in difference(bare, model)


def test_the_checksum_of_version_0_1_1_stands():
    """Worked by hand: Σ word_i · (2i+1) · c mod 2^64, in blocks of 2^15 words, and odd bytes."""
    words = torch.arange(-7, (1 << 15) + 5)
    constant = 0x9E3779B97F4A7C15
    sums = []
    for start in (0, 1 << 15):
        part = words[start : start + (1 << 15)].tolist()
        total = sum(w * (2 * i + 1) * constant for i, w in enumerate(part)) % (1 << 64)
        sums.append(total - (1 << 64) if total >> 63 else total)
    tensor = torch.cat([words.view(torch.uint8), torch.tensor([1, 2, 3], dtype=torch.uint8)])
    assert module._checksum(tensor, 1 << 15) == [*sums, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 64, 200])
def test_a_device_that_adds_many_blocks_at_once_gets_the_same_checksum(count):
    words = torch.randint(-(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(0))
    one = module._checksum(words, 16, at_once=1)
    assert len(one) == -(-count // 16)
    for at_once in (2, 3, 1000):
        assert module._checksum(words, 16, at_once) == one


def test_a_rows_file_that_version_0_1_1_made_on_a_gpu_still_loads(monkeypatch):
    """There it added blocks of 2^24 words; a tiny model needs smaller ones to tell."""
    monkeypatch.setattr(module, "_AT_ONCE", 1 << 9)
    model = tiny("llama")
    old = {k: v for k, v in fingerprint(model, 1 << 9).items() if k in module.FIELDS}
    assert same_model(old, fingerprint(model, 1 << 7)) is not None
    assert difference(old, model) is None
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[7, 11] += 1e-4
    assert "other values" in difference(old, model)


def test_a_model_on_the_meta_device_is_refused_by_name():
    with torch.device("meta"):
        model = tiny("llama")
    with pytest.raises(ValueError, match="'lm_head.weight' is on the meta device.*rank that holds"):
        fingerprint(model)


def test_an_8_bit_model_is_the_same_before_and_after_its_first_forward(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=settings
    )
    before, found = fingerprint(model), quantised_modules(model)
    assert before["quantisation"] == "bnb-int8" and len(found) == 21
    with torch.no_grad():
        model(input_ids=torch.arange(1, 9)[None])
    assert found[0].weight.SCB is None  # bitsandbytes has moved it
    assert quantised_modules(model) == found and fingerprint(model) == before
    row_scales(found[0])[3] *= 2
    assert fingerprint(model)["weights"] != before["weights"]


def reads(monkeypatch, model, change=lambda: None):
    """The tensors that a second fingerprint reads again where only `change()` came between."""
    known, read, checksum = fingerprint(model), [], module._checksum
    change()

    def counted(tensor, block):
        read.append(tuple(tensor.shape))
        return checksum(tensor, block)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_checksum", counted)
        again = fingerprint(model, unchanged=True)
    assert again == fingerprint(model)
    return (again == known), read


def test_an_unchanged_model_is_not_read_again(monkeypatch):
    model = tiny("llama")
    assert reads(monkeypatch, model) == (True, [])
    assert reads(monkeypatch, model, lambda: implant(model, [[1, 2]] * 3)) == (True, [])


@torch.no_grad()
def test_what_was_written_moved_or_widened_is_read_again(monkeypatch):
    model = tiny("llama")
    down = model.model.layers[1].mlp.down_proj
    weight = down.weight
    assert reads(monkeypatch, model, lambda: weight[3].mul_(2)) == (False, [(48, 80)])
    widened = weight.double()
    assert reads(monkeypatch, model, lambda: setattr(weight, "data", widened)) == (
        False,
        [(48, 80)],
    )
    other = torch.nn.Parameter(torch.randn(48, 80))
    assert reads(monkeypatch, model, lambda: setattr(down, "weight", other)) == (False, [(48, 80)])


def test_a_block_bounds_the_memory_that_a_checksum_takes(monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 1 << 12)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                storage = out.untyped_storage()
                largest = max(largest, 0 if storage.data_ptr() == given else storage.nbytes())
            return out

    words = torch.arange(1 << 16)
    given = words.untyped_storage().data_ptr()
    with Largest():
        module._checksum(words, 1 << 6, at_once=module._AT_ONCE >> 6)
    assert largest == 8 << 12
