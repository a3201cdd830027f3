"""Do scores tell what rows matter? Silence some and see what becomes of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ..model.anatomy import find_anatomy
from ..model.hooks import removing


@contextmanager
def suppressed(model: nn.Module, rows: Sequence[torch.Tensor]) -> Iterator[None]:
    """z_l[j] = 0 for the given rows j of every layer l, at all positions (paper, section 4).

    Works on quantised weights too: the down-projection's output is masked, no weight is touched.

    Args:
        rows: L tensors of row indices.

    Raises:
        ValueError: another number of layers than the model has.
    """
    anatomy = find_anatomy(model)
    if len(rows) != anatomy.num_layers:
        raise ValueError(f"rows of {len(rows)} layers given, the model has {anatomy.num_layers}")
    with ExitStack() as hooks:
        for module, silent in zip(anatomy.down, rows, strict=True):
            if len(silent):
                hooks.enter_context(removing(module.register_forward_hook(_silencing(silent))))
        yield


def _silencing(rows: torch.Tensor) -> Callable[..., torch.Tensor]:
    def silence(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, rows.to(output.device), 0)

    return silence
