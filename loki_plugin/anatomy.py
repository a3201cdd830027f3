"""Where a model keeps its decoder layers and their down-projections.

Found by structure, not by family name: the longest list of decoder layers, and in each layer the
one linear module outside attention whose output is the hidden size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

# Only used to choose when the shapes leave more than one candidate (I == H).
KNOWN_NAMES = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2")
_ATTENTION = re.compile(r"(^|\.|_)(attn|attention|self_attn|mixer)(\.|$|_)", re.IGNORECASE)
_EXPERTS = re.compile(r"(^|\.)(experts|block_sparse_moe|router)(\.|$)")


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
        intermediate_size: I.
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


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find decoder layers and down-projections; works on a meta-device model too.

    Raises:
        ValueError: mixture-of-experts model, no decoder layers, or a layer without exactly one
            down-projection; the message says what was looked for.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    hidden = _hidden_size(model, family)
    name, layers = _decoder_layers(model, family)
    _refuse_experts(model, name, family)

    down, names, row_dims, inner_sizes = [], [], [], set()
    for i, layer in enumerate(layers):
        local, module, n_in = _down_projection(layer, hidden, f"{name}.{i}", family)
        down.append(module)
        names.append(f"{name}.{i}.{local}")
        row_dims.append(1 if _is_conv1d(module) else 0)
        inner_sizes.add(n_in)
    if len(inner_sizes) != 1:
        raise ValueError(
            f"model family '{family}': the down-projections have different input sizes"
            f" {sorted(inner_sizes)}; loki needs one intermediate size for all layers"
        )
    owner = name.rpartition(".")[0]
    return Anatomy(
        decoder=model.get_submodule(owner) if owner else model,
        layers=list(layers),
        down=down,
        names=names,
        row_dims=row_dims,
        hidden_size=hidden,
        intermediate_size=inner_sizes.pop(),
    )


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear-like module (nn.Linear, bitsandbytes, PEFT, Conv1D) or None."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if _is_conv1d(module):
        return int(module.nx), int(module.nf)
    return None


def _is_conv1d(module: nn.Module) -> bool:
    module = getattr(module, "base_layer", module)
    return type(module).__name__ == "Conv1D"


def _hidden_size(model: nn.Module, family: str) -> int:
    config = getattr(model, "config", None)
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
        and any(_ATTENTION.search(n) for n, _ in module[0].named_modules())
    ]
    if not lists:
        raise ValueError(
            f"model family '{family}': no list of decoder layers found; looked for an"
            " nn.ModuleList whose members contain an attention module"
        )
    return max(lists, key=lambda item: len(item[1]))


def _refuse_experts(model: nn.Module, layers_name: str, family: str) -> None:
    prefix = layers_name + "."
    for name, module in model.named_modules():
        if name.startswith(prefix) and _EXPERTS.search(name[len(prefix) :]):
            raise ValueError(
                f"model family '{family}' is a mixture of experts ({name}:"
                f" {type(module).__name__}), which loki does not support yet: a routed expert"
                " has no single down-projection per layer. Use a dense model (Llama, Qwen2/2.5/3,"
                " Mistral, Gemma 2/3, Phi-3, Granite, OLMo 2, ...)"
            )


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
        if sizes[1] == hidden and not _ATTENTION.search(name):
            found.append((name, module, sizes[0]))
    if len(found) > 1:
        named = [f for f in found if f[0].rpartition(".")[2] in KNOWN_NAMES]
        found = named or found
    if len(found) == 1:
        return found[0]
    seen = [name for name, _, _ in found] or [w for w in wrapped]
    raise ValueError(
        f"model family '{family}': {where} has {len(found)} candidates for its down-projection"
        f" ({', '.join(seen) or 'no linear modules'}); looked for exactly one linear module outside"
        f" attention with {hidden} outputs (usually named {', '.join(KNOWN_NAMES)})"
    )
