"""Which model is this? Answers that survive loading details, and tell two fine-tunes apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .loading import whole
from .quantised import row_scales, unpack

# What loading, tokenizers and trainers change without changing the function of the model.
_VOLATILE = {
    "_name_or_path", "architectures", "attn_implementation", "bos_token_id", "dtype",
    "eos_token_id", "max_position_embeddings", "pad_token_id", "quantization_config", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
# The rows files and cache keys of version 0.1.1 have these; rows files may have more.
FIELDS = ("config", "identity", "weights", "quantisation")
_BLOCK = 1 << 15  # words that stay in a core's cache
_AT_ONCE = 1 << 24  # words that fill another device
# Tensor -> {dtypes it was read through: (what shows a change, checksum)}, from the last reading.
_READ: WeakIdKeyDictionary = WeakIdKeyDictionary()
_BF16, _HALF = (torch.bfloat16,), (torch.float16, torch.bfloat16)
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so no single change of a word can cancel


def fingerprint(model: nn.Module, block: int = _BLOCK, unchanged: bool = False) -> dict[str, str]:
    """What identifies `model`, the same before and after an adapter is wrapped around it.

    Of a model that FSDP2 has sharded every rank must ask.

    Args:
        unchanged: take the last fingerprint's word for every tensor that lies where it lay and was
            not written to, as far as PyTorch counts writes (it does not count those to `.data`);
            only others are read again.

    Returns:
        `config`: hash of the architecture. `identity`: hash of what quantisation leaves alone
        (embeddings, norms, biases), each rounded to bfloat16, so that a 32-bit and a bfloat16 load
        of one checkpoint agree. `half`: the same, rounded to float16 and then to bfloat16, so that
        any two of the loads in float32, bfloat16 and float16 agree if the checkpoint is stored in
        bfloat16 or float16 (|values| below 65280), and float32 and float16 if it is stored in
        float32. `weights`: checksum over every stored byte, including 4-bit storage and its scales.
        `packed`, of a quantised model: the same without what `identity` covers, and with a matrix
        that is not quantised (the head) rounded as in `half`, so that the model agrees with itself
        after PEFT's `prepare_model_for_kbit_training` has made float32 of the rest.
        `quantisation`: how the weights are stored.

    Raises:
        ValueError: a model whose weights are not in this process.
    """
    unpack(model)
    quantisation = _quantisation(model)
    exact = quantisation.startswith("none")
    identity, half, weights, packed = (hashlib.sha256() for _ in range(4))
    for name, tensor, stored in _tensors(model):
        if stored.is_meta:
            raise ValueError(
                f"the model's weights are not in this process: '{name}' is on the meta device, as"
                " on the other ranks of a sharded load, so nothing can be said about its values."
                " Ask on the rank that holds them, or load the whole model on every rank"
            )
        here = whole(stored)  # one tensor at a time
        if tensor is stored:
            tensor = here
        _update(weights, name, here, (), block, unchanged)
        if tensor is not None:
            _update(identity, name, tensor, _BF16, block, unchanged)
            _update(half, name, tensor, _HALF, block, unchanged)
        elif not exact:
            # The head, say. 4-bit storage may be of a floating dtype too.
            plain = (
                here.is_floating_point()
                and name.endswith((".weight", ".bias"))
                and getattr(stored, "quant_state", None) is None
            )
            _update(packed, name, here, _HALF if plain else (), block, unchanged or not plain)
    return {
        "config": config_hash(model),
        "identity": identity.hexdigest(),
        "half": half.hexdigest(),
        "weights": weights.hexdigest(),
        **({} if exact else {"packed": packed.hexdigest()}),
        "quantisation": quantisation,
    }


def same_model(made_for: dict[str, str], given: dict[str, str]) -> str | None:
    """None when rows made under one fingerprint may be used on the other, else what differs.

    Under the same quantisation every weight must agree; under another one the architecture and
    everything that quantisation leaves alone, in one of the two roundings.
    """
    if made_for.get("config") != given["config"]:
        return "its architecture differs"
    half = made_for.get("half", "unknown") == given.get("half")  # 0.1.1 did not note it
    if made_for.get("identity") != given["identity"] and not half:
        return "its embeddings or norms have other values"
    if made_for.get("quantisation") != given["quantisation"]:
        return None
    exact = given["quantisation"].startswith("none")
    packed = not exact and made_for.get("packed", "unknown") == given.get("packed")  # since 0.6.0
    if made_for.get("weights") != given["weights"] and not packed:
        return "its weights have other values (a fine-tune of the same base?)"
    return None


def difference(made_for: dict[str, str], model: nn.Module) -> str | None:
    """None when rows made under that fingerprint may be used on `model`, else what differs.

    Raises:
        ValueError: as `fingerprint`.
    """
    found = same_model(made_for, fingerprint(model))
    if found and len(blocks_of(made_for)) > 1:
        return found if same_model(made_for, fingerprint(model, blocks_of(made_for)[1])) else None
    return found


def blocks_of(made_for: dict[str, str]) -> tuple[int, ...]:
    """The block sizes that a fingerprint may have been made with."""
    # Version 0.1.1 added larger blocks on a GPU.
    return (_BLOCK,) if "half" in made_for else (_BLOCK, _AT_ONCE)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor]]:
    """(base model's name, the tensor if quantisation leaves it alone, what is stored), sorted."""
    entries = []
    linear = {id(m.weight): row_scales(m) for m in model.modules() if is_quantisable(m)}
    for name, tensor in model.named_parameters():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer", "").removeprefix("base_model.model.")
        plain = tensor.is_floating_point() and id(tensor) not in linear
        entries.append((name, tensor if plain else None, tensor))
        state = getattr(tensor, "quant_state", None)  # bitsandbytes 4-bit
        if state is not None:
            parts = [("absmax", state.absmax)]
            if state.nested:
                parts += [("offset", state.offset), ("absmax2", state.state2.absmax)]
            entries += [(f"{name}.{part}", None, value) for part, value in parts]
        scales = linear.get(id(tensor))
        if scales is not None:
            entries.append((f"{name}.SCB", None, scales))
    return iter(sorted(entries, key=lambda e: e[0]))


def is_quantisable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def update(digest, name: str, tensor: torch.Tensor, block: int) -> None:
    """Add a tensor to a digest; floats of different widths differ by their bytes only."""
    digest.update(_header(name, tensor))
    digest.update(str(_checksum(tensor.detach(), block)).encode())


def _header(name: str, tensor: torch.Tensor) -> bytes:
    kind = "float" if tensor.is_floating_point() else str(tensor.dtype)
    return json.dumps([name, list(tensor.shape), kind]).encode()


def _update(
    digest,
    name: str,
    tensor: torch.Tensor,
    through: tuple[torch.dtype, ...],
    block: int,
    unchanged: bool,
) -> None:
    """`update` by the tensor rounded to the dtypes `through`, remembered for the next time."""
    written = None if tensor.is_inference() else tensor._version
    state = (tensor.data_ptr(), written, tensor.dtype, block)
    read = _READ.setdefault(tensor, {})
    if not (unchanged and written is not None and read.get(through, (None,))[0] == state):
        data = tensor.detach()
        for dtype in through:
            data = data.to(dtype)
        read[through] = state, str(_checksum(data, block))
    digest.update(_header(name, tensor))
    digest.update(read[through][1].encode())


def _checksum(tensor: torch.Tensor, block: int, at_once: int | None = None) -> list[int]:
    """Σ_i word_i · (2i+1)·c mod 2^64 per block of the tensor's bytes: order and value count.

    How many blocks are added `at_once` changes nothing: one on a CPU, as many as fill a GPU.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    tail = data.numel() % 8
    words = data[: data.numel() - tail].view(torch.int64)
    at_once = at_once or (1 if words.device.type == "cpu" else max(1, _AT_ONCE // block))
    scale = 2 * torch.arange(min(block, len(words)), device=words.device) + 1
    scale *= _ODD
    whole = len(words) - len(words) % block
    sums = [
        (part.view(-1, block) * scale).sum(1)
        for part in words[:whole].split(at_once * block)
        if len(part)
    ]
    if whole < len(words):
        sums.append((words[whole:] * scale[: len(words) - whole]).sum()[None])
    return [*(torch.cat(sums).tolist() if sums else []), *data[data.numel() - tail :].tolist()]


def config_hash(model: nn.Module) -> str:
    """Hash of the architecture, without what loading and tokenizers change."""
    config = model.config.to_dict()
    return hashlib.sha256(json.dumps(stable(config), sort_keys=True).encode()).hexdigest()


def stable(value):
    """A configuration as plain JSON without its volatile keys."""
    if isinstance(value, dict):
        return {
            str(k): stable(v)
            for k, v in value.items()
            if k not in _VOLATILE and not str(k).startswith("_")
        }
    if isinstance(value, list | tuple):
        return [stable(v) for v in value]
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)


def _quantisation(model: nn.Module) -> str:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            double = "-double" if state.nested else ""
            return f"bnb-{state.quant_type}{double}-{state.blocksize}"
        if row_scales(module) is not None:
            return "bnb-int8"
    dtypes = {
        str(m.weight.dtype).removeprefix("torch.") for m in model.modules() if is_quantisable(m)
    }
    return "none:" + "+".join(sorted(dtypes))
