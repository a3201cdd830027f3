"""Models on devices that are not there."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes


def llama(
    layers: int,
    hidden: int,
    intermediate: int,
    kv_heads: int,
    head_size: int,
    vocabulary: int,
    heads: int | None = None,
    tied: bool = False,
    dtype: str = "bfloat16",
):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads or hidden // head_size,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM._from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()


def quantise(model: nn.Module) -> None:
    """The layers' linears as bitsandbytes keeps them in NF4 with nested scales."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="cuda:0")

    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if not isinstance(linear, nn.Linear):
                continue
            outputs, inputs = linear.weight.shape
            count = outputs * inputs
            with _disable_current_modes():  # bitsandbytes' own parameter class cannot be fake
                small = bnb.nn.Linear4bit(64, 64, False, torch.bfloat16, quant_type="nf4")
            small.in_features, small.out_features = inputs, outputs
            nested = QuantState(
                absmax=empty(count // 64 // 256), code=empty(256), blocksize=256,
                dtype=torch.float32,
            )  # fmt: skip
            weight = nn.Parameter(empty(count // 2, 1, dtype=torch.uint8), requires_grad=False)
            weight.quant_state = QuantState(
                absmax=empty(count // 64, dtype=torch.uint8), shape=torch.Size((outputs, inputs)),
                code=empty(16), blocksize=64, quant_type="nf4", dtype=torch.bfloat16,
                offset=empty(()), state2=nested,
            )  # fmt: skip
            del small._parameters["weight"]
            small.register_parameter("weight", weight)
            layer.set_submodule(name, small)


def split(model: nn.Module) -> nn.Module:
    """The upper half of the layers and the head on a second device, by accelerate, as users do."""
    from accelerate import dispatch_model

    half = len(model.model.layers) // 2
    place = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    place |= {f"model.layers.{i}": int(i >= half) for i in range(len(model.model.layers))}
    for name, device in place.items():
        for module in model.get_submodule(name).modules():
            for key, value in module._parameters.items():
                if value is not None:
                    there = torch.empty_like(value, device=f"cuda:{device}")
                    module._parameters[key] = nn.Parameter(there, requires_grad=False)
            for key, value in module._buffers.items():
                if value is not None:
                    module._buffers[key] = torch.empty_like(value, device=f"cuda:{device}")
    return dispatch_model(model, place, main_device=0, force_hooks=True)


def resident(model: nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and what quantised weights keep beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            nested = state.state2
            tensors += [state.absmax, state.code, state.offset, nested.absmax, nested.code]
    return tensors
