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
from ..model.linears import chosen, chosen_down
from .directions import SOFTEST
from .eigen import (
    EXACT_COPIES,
    Leading,
    beside,
    budget,
    leading,
    sink_directions,
    soften,
    without,
)
from .moments import Moments, Reader, Site, batched
from .packed import BYTES, narrowed, rounded

# An eigenvector that stands on fewer tokens than this says more about them than about the language.
TOKENS_PER_DIRECTION = 4
# One prompt in so many is kept back to see what the others' directions hold of it.
HELD_OUT = 8


@dataclass(frozen=True)
class Wanted:
    """How many directions are asked for, and of which kind.

    Attributes:
        energy: share of tr C; or
        directions: that many of every input.
        soft: weaken what is read of them instead of taking it away.
        memory: bytes that all of them may take; None: no limit. Where a share needs more, every
            input gets the same part of its size.
        dtype: of the result; None: float32, or float64 of a float64 model. int8: bfloat16, rounded
            to what packs into 8 bits (`packed`); those of sinks as they are.
        settles: take fewer directions where there are too few tokens for a share, instead of
            refusing.
    """

    energy: float | None = None
    directions: int | None = None
    soft: bool = False
    memory: int | None = None
    dtype: torch.dtype | None = None
    settles: bool = False

    def check(self, sizes: Sequence[int]) -> None:
        """Raises ValueError: a share or a number out of range for inputs of these sizes."""
        energy, count, smallest = self.energy, self.directions, min(sizes)
        if count is None and not (energy is not None and 0 < energy < 1):
            raise ValueError(
                f"energy = {energy}, expected a share between 0 and 1, such as 0.99; at 1 nothing"
                " would be left for the update to read"
            )
        if count is not None and not 1 <= count < smallest:
            raise ValueError(
                f"directions = {count}, expected a number from 1 to {smallest - 1}: the layers read"
                f" {smallest} inputs, and the update must keep some of them"
            )

    def most(self, sizes: Sequence[int], itemsize: float) -> list[int] | None:
        """The largest number of directions of each input that fits `memory`; None: no limit.

        `itemsize`: bytes of one of their numbers where `dtype` says nothing.
        """
        if self.memory is None or self.directions is not None:
            return None
        if self.dtype is not None:
            itemsize = BYTES if self.dtype == torch.int8 else self.dtype.itemsize
        part = self.memory / (itemsize * sum(size * size for size in sizes))
        return [max(1, min(size - 1, int(part * size))) for size in sizes]


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
    anatomy = find_anatomy(model)
    modules = targeted(model, targets)
    sizes = [linear_sizes(m) for m in modules.values()]
    wanted.check([size[0] for size in sizes if size])
    kept = list(prompts[HELD_OUT - 1 :: HELD_OUT]) if coverage else []
    # Prompts that are kept back come last: the moments before them are those without them.
    batches = batched([p for i, p in enumerate(prompts) if not kept or (i + 1) % HELD_OUT])
    last = batched(kept)
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


@dataclass(frozen=True)
class Solved:
    site: Site
    basis: torch.Tensor
    energy: float
    sinks: dict[str, Any]
    held_out: float
    capped: bool


def solve(
    site: Site,
    moments: Moments,
    before: torch.Tensor | None,
    wanted: Wanted,
    most: int | None,
    tokens: int,
) -> Solved:
    """The directions of one site, from its moments."""
    count, moment = wanted.directions, moments.ordinary
    assert moment is not None
    apart = sink_directions(moments.sinks, site.size)
    if apart and count is not None:
        apart = apart.first(max(1, count - 1))
    taken = apart.vectors.shape[1] if apart else 0
    rest = without(moment, apart.vectors) if apart else moment
    if wanted.settles:
        most = min(most or site.size - 1, tokens // TOKENS_PER_DIRECTION)
    room = None if most is None else max(1, most - taken)
    found = leading(rest, wanted.energy, None if count is None else max(1, count - taken), room)
    if apart:
        found = beside(found, apart.vectors)
    ordinary = len(found.values)
    capped = room is not None and ordinary == room and found.energy < (wanted.energy or 0)
    if not capped:
        _check_tokens(site, ordinary + taken, tokens, wanted)
    small = wanted.dtype == torch.int8
    inside = [soften(found) if wanted.soft else found.vectors]
    dtype = (torch.bfloat16 if small else wanted.dtype) or inside[0].dtype
    if small:
        inside = [rounded(inside[0], SOFTEST)]
    if apart:
        sinks = apart.vectors * (SOFTEST**0.5 if wanted.soft else 1)
        if small:  # rounded up to 1 it would be a hard direction
            sinks = narrowed(sinks, SOFTEST, dtype)
        inside.insert(0, sinks)
    basis = torch.cat([v.to("cpu", dtype) for v in inside], 1)
    whole = moment.diagonal().double().sum()
    left = rest.diagonal().double().sum() * (1 - found.energy)
    return Solved(
        site,
        basis.contiguous(),
        float(1 - left / whole),
        _of_sinks(moments, apart),
        _held_out(before, moment, ordinary) if before is not None else 0.0,
        capped,
    )


def _of_sinks(moments: Moments, apart: Leading | None) -> dict[str, Any]:
    if apart is None:
        return {"tokens": 0, "directions": 0, "energy": None, "longest": None}
    return {
        "tokens": moments.sink_tokens,
        "directions": len(apart.values),
        "energy": round(apart.energy, 6),
        "longest": round(moments.longest, 1),
    }


def _held_out(before: torch.Tensor, moment: torch.Tensor, count: int) -> float:
    """The share of what came after `before` that `before`'s leading directions hold."""
    vectors = leading(before, None, count).vectors
    held = (vectors * (moment @ vectors - before @ vectors)).double().sum()
    return float(held / (moment.diagonal().double() - before.diagonal().double()).sum())


def _check_tokens(site: Site, count: int, tokens: int, wanted: Wanted) -> None:
    needed = TOKENS_PER_DIRECTION * count
    if tokens >= needed:
        return
    what = (
        f"{count} directions"
        if wanted.directions is not None
        else f"the {count} directions that hold {100 * (wanted.energy or 1):g} % of its inputs'"
        " energy"
    )
    raise ValueError(
        f"{site.names[0]}: {what} cannot be told from {tokens} tokens of calibration; about"
        f" {needed} are needed ({TOKENS_PER_DIRECTION} per direction). Give more text"
        " (`protect.text`, or more calibration prompts), or protect less (a lower `protect.inputs`)"
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
