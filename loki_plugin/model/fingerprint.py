"""Which model is this? Answers that survive loading details, and tell two fine-tunes apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import torch
from torch import nn

from .quantised import unpack

# What loading, tokenizers and trainers change without changing the function of the model.
_VOLATILE = {
    "_name_or_path", "architectures", "attn_implementation", "bos_token_id", "dtype",
    "eos_token_id", "max_position_embeddings", "pad_token_id", "quantization_config", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so no single change of a word can cancel


def fingerprint(model: nn.Module) -> dict[str, str]:
    """What identifies `model`, the same before and after an adapter is wrapped around it.

    Returns:
        `config`: hash of the architecture. `identity`: hash of what quantisation leaves alone
        (embeddings, norms, biases), each rounded to bfloat16, so that a 32-bit, a 16-bit and a
        4-bit load of one checkpoint agree. `weights`: checksum over every stored byte, including
        4-bit storage and its scales. `quantisation`: how the weights are stored.
    """
    unpack(model)
    identity, weights = hashlib.sha256(), hashlib.sha256()
    for name, tensor, stored in _tensors(model):
        _update(weights, name, stored)
        if tensor is not None:
            _update(identity, name, tensor.to(torch.bfloat16))
    return {
        "config": _config_hash(model),
        "identity": identity.hexdigest(),
        "weights": weights.hexdigest(),
        "quantisation": _quantisation(model),
    }


def same_model(made_for: dict[str, str], given: dict[str, str]) -> str | None:
    """None when rows made under one fingerprint may be used on the other, else what differs.

    Under the same quantisation every weight must agree; under another one the architecture and
    everything that quantisation leaves alone.
    """
    if made_for.get("config") != given["config"]:
        return "its architecture differs"
    if made_for.get("identity") != given["identity"]:
        return "its embeddings or norms have other values"
    same_storage = made_for.get("quantisation") == given["quantisation"]
    if same_storage and made_for.get("weights") != given["weights"]:
        return "its weights have other values (a fine-tune of the same base?)"
    return None


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | None, torch.Tensor]]:
    """(base model's name, the tensor if quantisation leaves it alone, what is stored), sorted."""
    entries = []
    linear = {id(m.weight) for m in model.modules() if _is_quantisable(m)}
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
        if getattr(tensor, "SCB", None) is not None:  # bitsandbytes 8-bit
            entries.append((f"{name}.SCB", None, tensor.SCB))
    return iter(sorted(entries, key=lambda e: e[0]))


def _is_quantisable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _update(digest, name: str, tensor: torch.Tensor) -> None:
    data = tensor.detach()
    header = [name, list(data.shape), str(data.dtype) if not data.is_floating_point() else "float"]
    digest.update(json.dumps(header).encode())
    digest.update(str(_checksum(data)).encode())


def _checksum(tensor: torch.Tensor) -> list[int]:
    """Σ_i word_i · (2i+1)·c mod 2^64 per block of the tensor's bytes: order and value count."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    tail = data.numel() % 8
    words = data[: data.numel() - tail].view(torch.int64)
    # Blocks that stay in a core's cache, or that fill a GPU.
    block = 1 << (24 if words.is_cuda else 15)
    scale = 2 * torch.arange(min(block, len(words)), device=words.device) + 1
    scale *= _ODD
    sums = [(part * scale[: len(part)]).sum() for part in words.split(block)]
    return [*(torch.stack(sums).tolist() if sums else []), *data[data.numel() - tail :].tolist()]


def _config_hash(model: nn.Module) -> str:
    config = model.config.to_dict()
    return hashlib.sha256(json.dumps(_stable(config), sort_keys=True).encode()).hexdigest()


def _stable(value):
    if isinstance(value, dict):
        return {
            str(k): _stable(v)
            for k, v in value.items()
            if k not in _VOLATILE and not str(k).startswith("_")
        }
    if isinstance(value, list | tuple):
        return [_stable(v) for v in value]
    return value if isinstance(value, bool | int | float | str | type(None)) else str(value)


def _quantisation(model: nn.Module) -> str:
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            double = "-double" if state.nested else ""
            return f"bnb-{state.quant_type}{double}-{state.blocksize}"
        if getattr(weight, "SCB", None) is not None:
            return "bnb-int8"
    dtypes = {
        str(m.weight.dtype).removeprefix("torch.") for m in model.modules() if _is_quantisable(m)
    }
    return "none:" + "+".join(sorted(dtypes))
