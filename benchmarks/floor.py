"""What the attribution of one prompt cannot do without."""

from __future__ import annotations


def flops(
    layers: int,
    hidden: int,
    intermediate: int,
    kv_heads: int,
    head_size: int,
    vocabulary: int,
    *,
    length: int,
    steps: int,
) -> float:
    """Multiplications and additions (times two) of one prompt of `length` tokens on a Llama.

    Prefix: T tokens through L - 1 layers, the last layer's keys and values. Stack: 1 + S·l tokens
    into layer l, forwards and (but for the plain one) backwards. Head: L·S tokens, both ways.
    """
    h, kv = hidden, head_size * kv_heads
    layer = 2 * (2 * h * h + 2 * h * kv + 3 * h * intermediate)
    prefix = length * ((layers - 1) * layer + 4 * h * kv) + 2 * h * length**2 * (layers - 1)
    forward = sum(1 + steps * m for m in range(layers))
    backward = sum(steps * m for m in range(layers))
    stack = (forward + backward) * (layer + 4 * length * h)
    return prefix + stack + 2 * layers * steps * 2 * vocabulary * h
