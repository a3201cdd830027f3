"""Floating-point operations, and the time that named cards should take for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..model.anatomy import (
    Anatomy,
    attention_widths,
    experts_of_a_token,
    in_experts,
    linear_sizes,
)

# The share of a card's peak that is left when everything around the products is counted in: a
# roofline over all kernels of a dry run gives it within a quarter.
_SHARE_OF_PEAK = {"consumer": 0.5, "data centre": 0.4}
# Bytes moved to make one 4-bit weight whole in 16 bits and read it again.
_BYTES_WHOLE = 5.2


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: dense bf16 TFLOP/s with float32 sums, GB/s, GB, float32 TFLOP/s."""

    name: str
    tflops: float
    bandwidth: float
    gigabytes: int
    kind: str
    wide_tflops: float

    def seconds(self, flops: float, made_whole: float, wide: float = 0.0) -> float:
        """Of so many operations; `made_whole`: 4-bit weights dequantised on the way, in all;
        `wide`: operations in float32."""
        products = flops / (1e12 * self.tflops * _SHARE_OF_PEAK[self.kind])
        products += wide / (1e12 * self.wide_tflops * _SHARE_OF_PEAK[self.kind])
        return products + _BYTES_WHOLE * made_whole / (1e9 * self.bandwidth)


CARDS = (
    Card("RTX 3090", 71, 936, 24, "consumer", 35.6),
    Card("RTX 4090", 165, 1008, 24, "consumer", 82.6),
    Card("H100", 989, 3350, 80, "data centre", 67),
    Card("H200", 989, 4800, 141, "data centre", 67),
)


@dataclass(frozen=True)
class Work:
    """What the operations of a pass depend on.

    Attributes:
        layer: per layer, products per token in its linears (of routed experts, those it meets).
        keys: products per token that make keys and values.
        attention: heads times head size, of the last layer.
        head: H·V.
    """

    layer: tuple[int, ...]
    keys: int
    attention: int
    head: int

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy) -> Work:
        config: Any = model.config.get_text_config()
        queries, keys = attention_widths(anatomy.layers[-1], anatomy.hidden_size)
        return cls(
            layer=tuple(_products(layer, config) for layer in anatomy.layers),
            keys=keys * anatomy.hidden_size,
            attention=queries,
            head=config.hidden_size * config.vocab_size,
        )

    def analysis(self, length: int, steps: int) -> float:
        """FLOPs of one prompt of T tokens.

        Prefix: T tokens through all layers but the last, of which keys and values are made. Stack:
        1 + S·l tokens into layer l, forwards and, but for the plain one, backwards. Head: both
        ways.
        """
        *lower, _ = self.layer
        prefix = 2 * length * (sum(lower) + self.keys)
        prefix += 2 * self.attention * length**2 * len(lower)
        stack = sum(
            (1 + 2 * steps * i) * (2 * n + 4 * length * self.attention)
            for i, n in enumerate(self.layer)
        )
        return prefix + stack + 4 * len(self.layer) * steps * self.head

    def training(
        self, tokens: int, length: int, adapter: int, checkpointing: bool, fixed: int = 0
    ) -> float:
        """FLOPs of one step on `tokens` tokens in sequences of `length`.

        Forward, again where activations are not kept, and backward to the inputs; the frozen
        weights get no gradient, the adapter's do. `adapter`: its parameters that train; `fixed`:
        those that do not.
        """
        passes = 3 if checkpointing else 2
        linears = passes * 2 * tokens * sum(self.layer)
        # Causal: half of T² pairs; its backward takes two and a half times its forward.
        pairs = 2 * tokens * length * self.attention * len(self.layer)
        attention = pairs * (passes - 1 + 2.5)
        # Gradients to A's weights, and to its input.
        own = 2 * tokens * (adapter * (passes + 1) + fixed * passes)
        return linears + attention + own + 2 * 2 * tokens * self.head

    def anchor(self, tokens: int, new: bool = False) -> float:
        """FLOPs of anchor texts: forwards, and backwards to the inputs; nothing is made again.

        `new`: what the base says of them is not known yet, which takes one pass more, once a text.
        """
        return (2 + new) * 2 * tokens * (sum(self.layer) + self.head)


def _products(layer: nn.Module, config: Any) -> int:
    total = 0
    for name, module in layer.named_modules():
        sizes = linear_sizes(module)
        if sizes:
            total += sizes[0] * sizes[1]
        elif in_experts(name):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 3:
                    total += parameter.numel() // len(parameter) * experts_of_a_token(config)
    return total
