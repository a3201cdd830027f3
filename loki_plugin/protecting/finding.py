"""Input directions: what linear layers read on general text.

An update ΔW moves the output on an input x by ΔW·x. With U the leading eigenvectors of the second
moment C of a layer's inputs on general text, an update with ΔW·U = 0 leaves what the model does on
such text where it is. The same matrices serve AlphaEdit (arXiv 2410.02355, the null space of C for
editing facts), LoRA-Null (2503.02659), FORA (2606.31092), Adam-NSCL and GPM (continual learning);
none joins them with a choice of rows. Where few rows train, an update that may not read them at all
needs a high rate and harms more elsewhere; *soft* directions are read in inverse proportion to how
much general text uses them (whitened), as the input factor of K-FAC does to a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..analysing.attribute import unpad
from ..analysing.attribution.quiet import quiet
from ..analysing.precision import exact_products
from ..choices import DOWN
from ..model.anatomy import find_anatomy, linear_sizes
from ..model.causal import looks_ahead
from ..model.linears import chosen, chosen_down
from ..model.positions import check_lengths
from .eigen import EXACT_COPIES, budget
from .moments import Moments, Reader, batched
from .solving import Wanted, solve

# One prompt in so many is kept back to see what the others' directions hold of it.
HELD_OUT = 8


@dataclass(frozen=True)
class Found:
    """What `find_directions` found, per site: linears that read one input.

    Attributes:
        sites: names of the modules that read it.
        basis: V [I, u] on the CPU, orthonormal columns or soft ones (`soften`); those of sinks
            come first.
        energy: share of what ordinary tokens read, tr C, that lies in their span.
        tokens: how many real tokens the moments are made of.
        sinks: of sink tokens: `tokens`, `directions`, `energy` (share of what they read), and
            `longest`, over the median length.
        held_out: share of the energy of every `HELD_OUT`-th prompt that the same number of
            directions, found without those prompts, holds: what U holds of text like the
            calibration that is not in it. None: too few prompts to tell.
        capped: in how many sites memory or the number of tokens, not the share, decided.
    """

    sites: list[list[str]]
    basis: list[torch.Tensor]
    energy: list[float]
    tokens: int
    sinks: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[float] | None = None
    capped: int = 0


def input_directions(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    energy: float = 0.99,
    directions: int | None = None,
    soft: bool = False,
    targets: str | Sequence[str] = DOWN,
) -> list[torch.Tensor] | dict[str, torch.Tensor]:
    """The directions in which the inputs of linear layers lie on general text.

    C = Σ x xᵀ/‖x‖² over all ordinary tokens, x [I] the input of a layer; U: its leading
    eigenvectors, as many as hold `energy` of tr C. Tokens whose input is more than ten times as
    long as the median (sinks) count apart; their directions Q always belong to the result, and U is
    of what they leave. Hand it to `implant(protect=...)`, whose update reads P x, P = I - V Vᵀ,
    with V = [Q, U]; or, with `soft`, the whitened P = (I - Q Qᵀ) - U diag(1 - √(λ_u/λ_i)) Uᵀ (of Q
    a thousandth is read): the i-th direction of eigenvalue λ_i is read so much less that general
    text moves the update no more in it than in the last one.

    Args:
        model: a Hugging Face causal LM, in any precision, as it stands.
        input_ids: [B, T] token ids.
        attention_mask: [B, T], 1 for real tokens; padding left or right. None: no padding.
        energy: share of tr C, in (0, 1).
        directions: the same number for every input, instead of `energy`.
        soft: weaken what is read of them instead of taking it away.
        targets: `down`, `all` linears of the decoder layers, or names as LoRA takes them.

    Returns:
        For `down` L tensors V [I, u_l], else such tensors by module name, one for all modules that
        read the same input. On the CPU, float32 (float64 for a float64 model), the leading
        direction first: orthonormal columns, or with `soft` orthogonal ones of norm
        √(1 - √(λ_u/λ_i)), at most √`SOFTEST`, and none for the last. Needs about 2 GiB besides
        the model, or four matrices [I, I] where those are more. Up to I = 11,585 (8,192 in
        float64) the eigenvectors are exact up to rounding; above, a block iteration finds the same
        energy with at most 1 % more columns.

    Raises:
        ValueError: shapes that do not fit, an empty prompt, padding in the middle, a share or
            number out of range, fewer than 4·u tokens, an unsupported model family, unknown
            targets, soft directions of which there is one in every layer.
    """
    prompts = [torch.tensor(ids) for ids in unpad(input_ids, attention_mask)]
    found = find_directions(model, prompts, Wanted(energy, directions, soft), targets)
    if targets == DOWN:
        return found.basis
    named = zip(found.sites, found.basis, strict=True)
    return {name: basis for names, basis in named for name in names}


def targeted(model: nn.Module, targets: str | Sequence[str] = DOWN) -> dict[str, nn.Module]:
    """The modules that `targets` name, down-projections first."""
    anatomy = find_anatomy(model)
    names = (*chosen_down(anatomy, targets), *chosen(model, anatomy, targets))
    return {name: model.get_submodule(name) for name in names}


def find_directions(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    wanted: Wanted,
    targets: str | Sequence[str] = DOWN,
    coverage: bool = False,
) -> Found:
    """`input_directions` for the token ids of prompts without padding, with what it found.

    With `coverage`, also what directions hold of prompts that they were not found on; that needs a
    second eigendecomposition per site, but no second pass.

    Raises:
        ValueError: as `input_directions`.
    """
    check_lengths(model, prompts)
    anatomy = find_anatomy(model)
    modules = targeted(model, targets)
    sizes = [linear_sizes(m) for m in modules.values()]
    wanted.check([size[0] for size in sizes if size])
    kept = list(prompts[HELD_OUT - 1 :: HELD_OUT]) if coverage else []
    # Prompts that are kept back come last: the moments before them are those without them.
    alike = looks_ahead(model, anatomy.decoder)
    seen = [p for i, p in enumerate(prompts) if not kept or (i + 1) % HELD_OUT]
    batches, last = batched(seen, alike), batched(kept, alike)
    tokens = sum(len(p) for p in prompts)
    wide = next(p for p in model.parameters() if p.is_floating_point()).dtype == torch.float64
    itemsize = 8 if wide else 4
    reader = Reader(model, anatomy, modules)
    with (
        quiet(model) as own_attention,
        own_attention(),
        exact_products(),  # TF32 would lose the small directions
        torch.no_grad(),
    ):
        sites = reader.sites(batches[len(batches) // 2])
        per_site = [site.size for site in sites]
        most = wanted.most(per_site, itemsize)
        device = model.get_input_embeddings().weight.device
        groups = grouped(per_site, itemsize, 2 if kept else 1, budget(device))
        solved = []
        steps = len(groups) * len(batches + last)
        with tqdm(total=steps, desc="loki: input directions", unit="batch") as bar:
            for group in groups:
                moments: dict[int, Moments] = {}
                some = {i: sites[i] for i in group}
                reader.add(moments, some, batches, bar)
                before = {i: moments[i].ordinary.clone() for i in group} if kept else {}  # type: ignore[union-attr]
                reader.add(moments, some, last, bar)
                for i in group:
                    limit = most[i] if most else None
                    solved.append(
                        solve(sites[i], moments.pop(i), before.pop(i, None), wanted, limit, tokens)
                    )
    if wanted.soft and not any(s.basis.shape[1] for s in solved):
        raise ValueError(
            "one direction per layer is all that was asked for, and of soft directions the last is"
            " read as it is, so that nothing would be protected; ask for a larger share, for at"
            " least 2 directions, or for hard ones"
        )
    return Found(
        sites=[s.site.names for s in solved],
        basis=[s.basis for s in solved],
        energy=[s.energy for s in solved],
        tokens=tokens,
        sinks=[s.sinks for s in solved],
        held_out=[s.held_out for s in solved] if kept else None,
        capped=sum(s.capped for s in solved),
    )


def grouped(sizes: Sequence[int], itemsize: int, copies: int, room: int) -> list[list[int]]:
    """Neighbouring sites whose moments fit `room` together, `copies` of each, beside the work on
    one of them. Those of sinks are not counted: few sites have some."""
    groups: list[list[int]] = []
    taken = 0
    room -= (EXACT_COPIES - 1) * max(sizes) ** 2 * itemsize
    for i, size in enumerate(sizes):
        one = copies * size * size * itemsize
        if not groups or taken + one > room:
            groups.append([])
            taken = 0
        groups[-1].append(i)
        taken += one
    return groups
