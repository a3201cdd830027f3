"""Where a model keeps its decoder layers and their down-projections.

Found by structure, not by family name. The decoder is what lies around the embeddings of the text:
towers for images and sound have layers and down-projections of their own, but no tokens. A layer's
down-projection is the one linear module outside of what mixes tokens (attention, a recurrence, a
convolution) and of routed experts whose output is the hidden size. In a mixture of experts that is
the shared expert's, or the dense layer's; a layer that has routed experts or a mixer only has none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

# Only used to choose when the shapes leave more than one candidate (I == H).
KNOWN_NAMES = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2")
_ATTENTION = re.compile(r"(^|\.|_)(attn|attention|self_attn|mixer)(\.|$|_)", re.IGNORECASE)
_RECURRENCE = re.compile(r"(^|\.|_)(mamba|conv|temporal_block|ssm|mlstm_layer)(\.|$|_)")
_NORM = re.compile(r"norm\.", re.IGNORECASE)
TOWER = re.compile(r"vision|visual|image|audio|speech|encoder", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)  # in the name of a class
_EXPERTS = re.compile(r"(^|\.)(experts|block_sparse_moe|router)(\.|$)")  # not `shared_experts`

_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_experts_per_token")


@dataclass(frozen=True)
class Anatomy:
    """The parts of a causal LM that LoKI touches, in layer order.

    Attributes:
        decoder: the module that embeds, loops over `layers` and applies the final norm.
        layers: all decoder layers.
        down: the L down-projections; each maps I -> H.
        names: their dotted module names inside the model.
        row_dims: the dimension of `weight` that counts rows: 0 for `nn.Linear` ([H, I]),
            1 for transformers' `Conv1D` ([I, H]).
        places: in which of `layers` each of `down` lies: all of them in order, but for layers that
            have no down-projection (routed experts only, or nothing but a mixer).
        hidden_size: H, rows per layer.
        intermediate_size: I; the largest where layers differ (dense ones, shared experts).
        without: why no layer has a down-projection, and what to do; empty where one has.
    """

    decoder: nn.Module
    layers: list[nn.Module]
    down: list[nn.Module]
    names: list[str]
    row_dims: list[int]
    places: list[int]
    hidden_size: int
    intermediate_size: int
    without: str = ""

    def check_rows(self) -> None:
        """Raises ValueError: no layer has a down-projection, so that there are no rows."""
        if self.without:
            raise ValueError(self.without)

    @property
    def num_layers(self) -> int:
        """L, layers that have rows."""
        return len(self.down)

    @property
    def whole(self) -> bool:
        """Whether every decoder layer has a down-projection."""
        return self.places == list(range(len(self.layers)))

    @property
    def down_of_layers(self) -> list[nn.Module | None]:
        """For each of `layers` its down-projection, or None."""
        known = dict(zip(self.places, self.down, strict=True))
        return [known.get(i) for i in range(len(self.layers))]

    @property
    def input_sizes(self) -> list[int]:
        """I of every layer's down-projection."""
        return [linear_sizes(module)[0] for module in self.down]  # type: ignore[index]


def find_anatomy(model: nn.Module) -> Anatomy:
    """Find decoder layers and down-projections; works on a meta-device model too.

    Raises:
        ValueError: no decoder layers, or a layer with several down-projections; the message says
            what was looked for. `check_rows` raises where no layer has one.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    hidden = _hidden_size(model, family)
    name, layers, owner = _decoder_layers(model, family)
    down, names, row_dims, inner_sizes, places = [], [], [], [], []
    for i, layer in enumerate(layers):
        found = _down_projection(layer, hidden, f"{name}.{i}", family)
        if found is None:
            continue
        local, module, n_in = found
        down.append(module)
        names.append(f"{name}.{i}.{local}")
        row_dims.append(1 if _is_conv1d(module) else 0)
        inner_sizes.append(n_in)
        places.append(i)
    return Anatomy(
        decoder=model.get_submodule(owner) if owner else model,
        layers=list(layers),
        down=down,
        names=names,
        row_dims=row_dims,
        places=places,
        hidden_size=hidden,
        intermediate_size=max(inner_sizes, default=0),
        without="" if down else _without_rows(layers, f"{name}.0", hidden, family),
    )


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear-like module (nn.Linear, bitsandbytes, PEFT, Conv1D) or None."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if _is_conv1d(module):
        return int(module.nx), int(module.nf)
    return None


def in_attention(name: str) -> bool:
    """Whether a module's dotted name inside its layer lies in attention."""
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


def experts_of_a_token(config: Any) -> int:
    """How many routed experts a token meets, of a text configuration; by the names in use.

    Raises:
        ValueError: under none of the known names.
    """
    for name in _CHOSEN:
        chosen = getattr(config, name, None)
        if chosen:
            return max(chosen) if isinstance(chosen, list | tuple) else int(chosen)
    raise ValueError(
        f"model family '{config.model_type}': its configuration does not say how many experts a"
        f" token meets (looked for {', '.join(_CHOSEN)}), so what they take cannot be counted"
    )


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


def _decoder_layers(model: nn.Module, family: str) -> tuple[str, nn.ModuleList, str]:
    """The layers nearest to the embeddings of the text, and of such the longest list; and the name
    of the module that holds both (BERT's layers lie in a module of their own)."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"model family '{family}' has an encoder and a decoder; loki needs a causal language"
            " model, which reads and writes with the same layers"
        )
    around = _around_embeddings(model)
    while True:
        lists = [
            (f"{around}.{name}" if around else name, module)
            for name, module in _outermost_lists(model.get_submodule(around) if around else model)
        ]
        if not around:  # as far from the embeddings as towers are
            lists = [item for item in lists if not TOWER.search(item[0])]
        if lists:
            nearest = min(name.count(".") for name, _ in lists)
            near = [item for item in lists if item[0].count(".") == nearest]
            name, layers = max(near, key=lambda item: len(item[1]))
            return name, layers, around or name.rpartition(".")[0]
        if not around:
            break
        around = around.rpartition(".")[0]
    raise ValueError(
        f"model family '{family}': no list of decoder layers found; looked for an nn.ModuleList of"
        " layers beside the module that embeds tokens"
    )


def _around_embeddings(model: nn.Module) -> str:
    """The name of the module that holds the token embeddings; the model's where none is known."""
    try:
        embeddings: Any = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return ""
    for name, module in model.named_modules():
        if module is embeddings:
            return name.rpartition(".")[0]
    return ""


def _outermost_lists(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Lists of layers, those inside a layer left out: its members have linear modules within."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        inside = [m for n, m in module[0].named_modules() if n]
        if sum(linear_sizes(m) is not None for m in inside) > 1:
            found.append((name, module))
    return found


def _down_projection(
    layer: nn.Module, hidden: int, where: str, family: str
) -> tuple[str, nn.Module, int] | None:
    """Name inside the layer, module, and I; None where a layer has routed experts or a mixer only.

    Raises:
        ValueError: several candidates, or an MLP of which none is the down-projection.
    """
    linears = _linears(layer)
    found = [
        (name, module, sizes[0])
        for name, (module, sizes) in linears.items()
        if sizes[1] == hidden and _in_mlp(layer, name)
    ]
    if len(found) > 1:
        found = [f for f in found if f[0].rpartition(".")[2] in KNOWN_NAMES] or found
    if len(found) > 1:  # the layer's own MLP, before one inside an adapter
        depth = min(name.count(".") for name, _, _ in found)
        found = [f for f in found if f[0].count(".") == depth]
    if len(found) == 1:
        return found[0]
    seen = [name for name, _, _ in found] or [name for name in linears if _in_mlp(layer, name)]
    if not found and (not seen or any(in_experts(name) for name, _ in layer.named_modules())):
        return None
    raise ValueError(
        f"model family '{family}': {where} has {len(found)} candidates for its down-projection"
        f" ({', '.join(seen)}); looked for exactly one linear module"
        f" outside attention with {hidden} outputs (usually named {', '.join(KNOWN_NAMES)})"
    )


def _linears(layer: nn.Module) -> dict[str, tuple[nn.Module, tuple[int, int]]]:
    """Linear modules by name; a PEFT layer counts as one."""
    found: dict[str, tuple[nn.Module, tuple[int, int]]] = {}
    for name, module in layer.named_modules():
        sizes = linear_sizes(module)
        if sizes is not None and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module, sizes
    return found


def _in_mlp(layer: nn.Module, name: str) -> bool:
    """Whether a linear is neither a routed expert's nor of what mixes tokens.

    Some families call an MLP their mixer (Nemotron-H); its class says what it is.
    """
    if in_experts(name) or _NORM.search(name):
        return False
    if not (in_attention(name) or _RECURRENCE.search(name)):
        return True
    owner = layer.get_submodule(name.rpartition(".")[0])
    return bool(_MLP.search(type(owner).__name__))


def _without_rows(layers: nn.ModuleList, where: str, hidden: int, family: str) -> str:
    """Why no layer has a down-projection, and what to do."""
    routed = [name for name, _ in layers[0].named_modules() if in_experts(name)]
    if routed:
        return (
            f"model family '{family}': {where} has routed experts only ({where}.{routed[0]}), and"
            " so has every other layer: there are no rows to train, since routed experts stay as"
            " they are. `targets: all` trains every other linear layer, protected and without an"
            " analysis. Rows need a shared expert or a dense MLP in some layer"
            " (Qwen2-MoE, Granite-MoE-shared, Llama 4, DeepSeek-V3), or a dense model"
        )
    return (
        f"model family '{family}': {where} has no down-projection, nor has any other layer"
        f" ({', '.join(_linears(layers[0])) or 'no linear modules'}); looked for exactly one linear"
        f" module outside attention with {hidden} outputs (usually named {', '.join(KNOWN_NAMES)})"
    )
