"""Where a model keeps its decoder layers and their down-projections.

Found by structure, not by family name: the longest list of decoder layers, and in each layer the
one linear module outside attention and routed experts whose output is the hidden size. In a mixture
of experts that is the shared expert's, or the dense layer's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

# Only used to choose when the shapes leave more than one candidate (I == H).
KNOWN_NAMES = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2")
_ATTENTION = re.compile(
    r"(^|\.|_)(attn|attention|self_attn|mixer|mamba|conv|temporal_block)(\.|$|_)", re.IGNORECASE
)
_EXPERTS = re.compile(r"(^|\.)(experts|block_sparse_moe|router)(\.|$)")  # not `shared_experts`


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal LM that LoKI touches, in layer order.

    Attributes:
        decoder: the module that embeds, loops over `layers` and applies the final norm.
        layers: the L decoder layers.
        down: the L down-projections; each maps I -> H.
        names: their dotted module names inside the model.
        row_dims: the dimension of `weight` that counts rows: 0 for `nn.Linear` ([H, I]),
            1 for transformers' `Conv1D` ([I, H]).
        hidden_size: H, rows per layer.
        intermediate_size: I; the largest where layers differ (dense ones, shared experts).
    """

    decoder: nn.Module
    layers: list[nn.Module]
    down: list[nn.Module]
    names: list[str]
    row_dims: list[int]
    hidden_size: int
    intermediate_size: int

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def input_sizes(self) -> list[int]:
        """I of every layer's down-projection."""
        return [linear_sizes(module)[0] for module in self.down]  # type: ignore[index]


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find decoder layers and down-projections; works on a meta-device model too.

    Raises:
        ValueError: no decoder layers, or a layer without exactly one down-projection (one that has
            only routed experts, say); the message says what was looked for.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    hidden = _hidden_size(model, family)
    name, layers = _decoder_layers(model, family)
    down, names, row_dims, inner_sizes = [], [], [], []
    for i, layer in enumerate(layers):
        local, module, n_in = _down_projection(layer, hidden, f"{name}.{i}", family)
        down.append(module)
        names.append(f"{name}.{i}.{local}")
        row_dims.append(1 if _is_conv1d(module) else 0)
        inner_sizes.append(n_in)
    owner = name.rpartition(".")[0]
    return Anatomy(
        decoder=model.get_submodule(owner) if owner else model,
        layers=list(layers),
        down=down,
        names=names,
        row_dims=row_dims,
        hidden_size=hidden,
        intermediate_size=max(inner_sizes),
    )


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear-like module (nn.Linear, bitsandbytes, PEFT, Conv1D) or None."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if _is_conv1d(module):
        return int(module.nx), int(module.nf)
    return None


def in_attention(name: str) -> bool:
    """Whether a module's dotted name inside its layer lies in attention, or in a recurrence or
    convolution that stands for it."""
    return bool(_ATTENTION.search(name))


def attention_widths(layer: nn.Module, hidden: int) -> tuple[int, int]:
    """Elements of one token's queries, and of its keys and values, in a decoder layer.

    By the linears of its attention: the last one that answers with H takes what the heads found,
    which is as wide as the queries; the others make queries, keys and values.
    """
    sizes = [s for n, m in layer.named_modules() if in_attention(n) and (s := linear_sizes(m))]
    outward = max((i for i, s in enumerate(sizes) if s[1] == hidden), default=None)
    if outward is None:
        return hidden, 2 * hidden
    queries = sizes.pop(outward)[0]
    return queries, max(sum(outputs for _, outputs in sizes) - queries, 0)


def in_experts(name: str) -> bool:
    """Whether a module's dotted name inside its layer lies in routed experts or a router."""
    return bool(_EXPERTS.search(name))


def _is_conv1d(module: nn.Module) -> bool:
    module = getattr(module, "base_layer", module)
    return type(module).__name__ == "Conv1D"


def _hidden_size(model: nn.Module, family: str) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden = getattr(text, "hidden_size", None)
    if not isinstance(hidden, int):
        raise ValueError(
            f"model family '{family}': its config has no integer `hidden_size`; loki needs a"
            " Hugging Face causal language model"
        )
    return hidden


def _decoder_layers(model: nn.Module, family: str) -> tuple[str, nn.ModuleList]:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and not re.search(r"vision|visual|audio|encoder\.", name)
        # Some mix tokens by a recurrence in their first layers.
        and any(in_attention(n) for layer in module for n, _ in layer.named_modules())
    ]
    if not lists:
        raise ValueError(
            f"model family '{family}': no list of decoder layers found; looked for an"
            " nn.ModuleList whose members contain an attention module"
        )
    return max(lists, key=lambda item: len(item[1]))


def _down_projection(
    layer: nn.Module, hidden: int, where: str, family: str
) -> tuple[str, nn.Module, int]:
    found: list[tuple[str, nn.Module, int]] = []
    wrapped: list[str] = []
    for name, module in layer.named_modules():
        if any(name.startswith(w + ".") for w in wrapped):
            continue  # inside a PEFT layer, which counts as one linear
        sizes = linear_sizes(module)
        if sizes is None:
            continue
        wrapped.append(name)
        if sizes[1] == hidden and not in_attention(name) and not in_experts(name):
            found.append((name, module, sizes[0]))
    if len(found) > 1:
        named = [f for f in found if f[0].rpartition(".")[2] in KNOWN_NAMES]
        found = named or found
    if len(found) == 1:
        return found[0]
    routed = [name for name, _ in layer.named_modules() if in_experts(name)]
    if routed and not found:
        raise ValueError(
            f"model family '{family}': {where} has routed experts only ({where}.{routed[0]}), which"
            " loki refuses: few calibration prompts reach any one of them. A mixture of experts"
            " needs a shared expert or a dense MLP in every layer (Qwen2-MoE, Granite-MoE-shared,"
            " Llama 4); or use a dense model (Llama, Qwen2/2.5/3, Mistral, Gemma 2/3, ...)"
        )
    seen = [name for name, _, _ in found] or [w for w in wrapped]
    raise ValueError(
        f"model family '{family}': {where} has {len(found)} candidates for its down-projection"
        f" ({', '.join(seen) or 'no linear modules'}); looked for exactly one linear module outside"
        f" attention with {hidden} outputs (usually named {', '.join(KNOWN_NAMES)})"
    )
