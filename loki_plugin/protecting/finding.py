"""Input directions: what the down-projections read on general text.

An update ΔW moves the output on an input x by ΔW·x. With U_l the leading eigenvectors of
C_l = Σ x xᵀ over all tokens of general text, an update with ΔW·U = 0 leaves what the model does on
such text where it is. The same matrices serve AlphaEdit (arXiv 2410.02355, the null space of C for
editing facts), LoRA-Null (2503.02659), Adam-NSCL and GPM (continual learning); none joins them with
a choice of rows. Where few rows train, an update that may not read them at all needs a high rate
and harms more elsewhere; *soft* directions are read in inverse proportion to how much general text
uses them (whitened), as the input factor of K-FAC does to a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from ..analysing.attribute import unpad
from ..analysing.attribution.quiet import quiet
from ..analysing.precision import exact_products
from ..model.anatomy import Anatomy, find_anatomy
from ..model.hooks import removing
from . import eigen
from .eigen import leading, soften

# Tokens that run at once.
_TOKENS = 2048
# An eigenvector that stands on fewer tokens than this says more about them than about the language.
TOKENS_PER_DIRECTION = 4
# One prompt in so many is kept back to see what the others' directions hold of it.
HELD_OUT = 8


@dataclass(frozen=True)
class Found:
    """What `find_directions` found.

    Attributes:
        basis: L tensors [I, u_l] on the CPU with orthonormal columns, or soft ones (`soften`).
        energy: L shares of tr C_l that U_l holds.
        tokens: how many real tokens the moments are made of.
        held_out: L shares of the energy of every `HELD_OUT`-th prompt that the same number of
            directions, found without those prompts, holds: what U holds of text like the
            calibration that is not in it. None: too few prompts to tell.
    """

    basis: list[torch.Tensor]
    energy: list[float]
    tokens: int
    held_out: list[float] | None = None


def input_directions(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    energy: float = 0.99,
    directions: int | None = None,
    soft: bool = False,
) -> list[torch.Tensor]:
    """The directions in which the down-projections' inputs lie on general text.

    C_l = Σ x xᵀ over all real tokens, x [I] the input of layer l's down-projection; U_l: its
    leading eigenvectors, as many as hold `energy` of tr C_l. Hand them to `implant(protect=...)`,
    whose update reads P x, P = I - V Vᵀ, with V = U; or, with `soft`, the whitened
    P = I - U diag(1 - √(λ_u/λ_i)) Uᵀ: the i-th direction of eigenvalue λ_i is read so much less
    that general text moves the update no more in it than in the last one.

    Args:
        model: a Hugging Face causal LM of a supported family, in any precision, as it stands.
        input_ids: [B, T] token ids.
        attention_mask: [B, T], 1 for real tokens; padding left or right. None: no padding.
        energy: share of tr C_l, in (0, 1).
        directions: u, the same number in every layer, instead of `energy`.
        soft: weaken what is read of them instead of taking it away.

    Returns:
        L tensors V [I, u_l] on the CPU, float32 (float64 for a float64 model), the leading
        direction first: orthonormal columns, or with `soft` u_l - 1 orthogonal ones of norm
        √(1 - √(λ_u/λ_i)), at most √`SOFTEST`. Needs about 2 GiB besides the model, or four matrices
        [I, I] where those are more. Up to I = 11,585 (8,192 in float64) the eigenvectors are
        exact up to rounding; above, a block iteration finds the same energy with at most 1 % more
        columns.

    Raises:
        ValueError: shapes that do not fit, an empty prompt, padding in the middle, a share or
            number out of range, fewer than 4·u_l tokens, an unsupported model family, soft
            directions of which there is one in every layer.
    """
    prompts = [torch.tensor(ids) for ids in unpad(input_ids, attention_mask)]
    return find_directions(model, prompts, energy, directions, soft=soft).basis


def find_directions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    energy: float | None,
    directions: int | None,
    coverage: bool = False,
    soft: bool = False,
) -> Found:
    """`input_directions` for the token ids of prompts without padding, with what it found.

    With `coverage`, also what directions hold of prompts that they were not found on; that needs a
    second eigendecomposition per layer, but no second pass.

    Raises:
        ValueError: as `input_directions`.
    """
    anatomy = find_anatomy(model)
    sizes = anatomy.input_sizes
    _check_arguments(energy, directions, min(sizes))
    kept = list(prompts[HELD_OUT - 1 :: HELD_OUT]) if coverage else []
    # Prompts that are kept back come last: the moments before them are those without them.
    batches = _batches([p for i, p in enumerate(prompts) if not kept or (i + 1) % HELD_OUT])
    last = _batches(kept)
    tokens = sum(len(p) for p in prompts)
    wide = next(p for p in model.parameters() if p.is_floating_point()).dtype == torch.float64
    groups = _groups(sizes, (8 if wide else 4) * (2 if kept else 1))
    basis: list[torch.Tensor] = []
    held: list[float] = []
    covered: list[float] = []
    with (
        quiet(model) as own_attention,
        own_attention(),
        exact_products(),  # TF32 would lose the small directions
        torch.no_grad(),
        tqdm(
            total=len(groups) * len(batches + last), desc="loki: input directions", unit="batch"
        ) as bar,
    ):
        for group in groups:
            moments: dict[int, torch.Tensor] = {}
            _add_moments(moments, model, anatomy, batches, group, bar)
            before = {i: moments[i].clone() for i in group} if kept else {}
            _add_moments(moments, model, anatomy, last, group, bar)
            for layer in group:
                moment = moments.pop(layer)
                vectors, share = leading(moment, energy, directions)
                if kept:
                    covered.append(_held_out(before.pop(layer), moment, vectors.shape[1]))
                _check_tokens(layer, vectors.shape[1], tokens, energy, directions)
                basis.append((soften(moment, vectors) if soft else vectors).cpu())
                held.append(share)
    if soft and not any(vectors.shape[1] for vectors in basis):
        raise ValueError(
            "one direction per layer is all that was asked for, and of soft directions the last is"
            " read as it is, so that nothing would be protected; ask for a larger share, for at"
            " least 2 directions, or for hard ones"
        )
    return Found(basis, held, tokens, covered or None)


def _held_out(before: torch.Tensor, moment: torch.Tensor, count: int) -> float:
    """The share of what came after `before` that `before`'s leading directions hold."""
    vectors = leading(before, None, count)[0]
    held = (vectors * (moment @ vectors - before @ vectors)).double().sum()
    return float(held / (moment.diagonal().double() - before.diagonal().double()).sum())


def _check_arguments(energy: float | None, directions: int | None, smallest: int) -> None:
    if directions is None and not (energy is not None and 0 < energy < 1):
        raise ValueError(
            f"energy = {energy}, expected a share between 0 and 1, such as 0.99; at 1 nothing would"
            " be left for the update to read"
        )
    if directions is not None and not 1 <= directions < smallest:
        raise ValueError(
            f"directions = {directions}, expected a number from 1 to {smallest - 1}: the"
            f" down-projections read {smallest} inputs, and the update must keep some of them"
        )


def _check_tokens(layer: int, count: int, tokens: int, energy, directions) -> None:
    needed = TOKENS_PER_DIRECTION * count
    if tokens >= needed:
        return
    what = (
        f"{count} directions"
        if directions is not None
        else f"the {count} directions that hold {100 * energy:g} % of its inputs' energy"
    )
    raise ValueError(
        f"layer {layer}: {what} cannot be told from {tokens} tokens of calibration; about"
        f" {needed} are needed ({TOKENS_PER_DIRECTION} per direction). Give more text"
        " (`protect.text`, or more calibration prompts), or protect less (a lower `protect.inputs`)"
    )


def _batches(prompts: Sequence[Sequence[int]]) -> list[list[torch.Tensor]]:
    """Prompts of like length together, at most `_TOKENS` tokens with padding; one may exceed it."""
    batches: list[list[torch.Tensor]] = []
    for prompt in sorted(prompts, key=len):
        if not batches or (len(batches[-1]) + 1) * len(prompt) > _TOKENS:
            batches.append([])
        batches[-1].append(torch.as_tensor(prompt))
    return batches


def _groups(sizes: list[int], itemsize: int) -> list[list[int]]:
    """Neighbouring layers whose C fit the budget together, beside the work on one of them."""
    groups: list[list[int]] = []
    taken = 0
    for layer, size in enumerate(sizes):
        one = size * size * itemsize
        room = eigen.BUDGET - (eigen.EXACT_COPIES - 1) * max(sizes) ** 2 * itemsize
        if not groups or taken + one > room:
            groups.append([])
            taken = 0
        groups[-1].append(layer)
        taken += one
    return groups


class _Enough(Exception):
    """The last layer of the group has been seen; what comes above it need not run."""


def _add_moments(
    moments: dict[int, torch.Tensor],
    model: nn.Module,
    anatomy: Anatomy,
    batches: list,
    group: list[int],
    bar: tqdm,
) -> None:
    """Add to C_l [I, I] of the layers of `group`, each on its device; one pass up to the last."""
    device = model.get_input_embeddings().weight.device
    for batch in batches:
        # Padding stands on the right, after every real token, where causal attention never looks.
        ids = nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
        lengths = torch.tensor([len(p) for p in batch], device=device)
        real = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).flatten()
        with ExitStack() as hooks, suppress(_Enough):
            for layer in group:
                hook = _adding(moments, layer, real, layer == group[-1])
                hooks.enter_context(removing(anatomy.down[layer].register_forward_pre_hook(hook)))
            anatomy.decoder(input_ids=ids, use_cache=False)
        bar.update()


def _adding(moments: dict[int, torch.Tensor], layer: int, real: torch.Tensor, last: bool):
    def enter(module, args):
        x = args[0].reshape(-1, args[0].shape[-1])  # [B·T, I]; some families flatten it themselves
        x = x[real.to(x.device)]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if layer in moments:
            moments[layer].addmm_(x.T, x)
        else:
            moments[layer] = x.T @ x
        if last:
            raise _Enough

    return enter
