"""What low-rank updates read, set once: what the task uses beside what general text uses.

    A = Eᵀ P / √3,   E [I, r]: the leading eigenvectors of P C P,   C = Σ x xᵀ/‖x‖²

over the ordinary tokens of some of the task's texts; P = I - V Vᵀ is that of general text, as in
`reading`. From there A stands still and B alone trains, as in LoRA-FA (arXiv 2308.03303). So no
directions are held while it trains: the adapter is a plain LoRA all along, and half of it trains.
A row of Eᵀ/√3 is as long as those that PEFT draws. Near FoLoRA (2606.00132), which weighs
directions by a task's gain per forgetting; CorDA (2406.05223) starts A and B from such matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm import tqdm

from ..analysing.attribution.quiet import quiet
from ..analysing.precision import exact_products
from ..model.anatomy import find_anatomy
from ..model.causal import looks_ahead
from ..model.linears import PREFIX
from ..model.positions import check_lengths
from .eigen import budget
from .finding import grouped
from .moments import Moments, Reader, batched, casting
from .packed import Packed
from .reading import ProtectedA, outside
from .reads import Behind, Reads
from .solving import Wanted, solve

# Rounds of the subspace iteration, whose block holds twice the columns that are asked for.
_ROUNDS = 30


class FixedA(nn.Linear):
    """A lora_A that does not train: P is folded into it, and it reads as it stands."""

    def __init__(self, weight: torch.Tensor):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """None: PEFT lets these train whenever an adapter was off and is on again. The model's own
        `parameters` has it."""
        return iter(())


def low_rank(model: PeftModel) -> dict[str, LoraLayer]:
    """The linears whose A may stand still, by name: those of which B trains whole. Where only some
    rows of a low-rank B train, A holds nearly all that can be learned, and goes on training."""
    adapter = model.active_adapter
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and adapter in module.lora_B
        and _trains_whole(module.lora_B[adapter])
    }


def _trains_whole(b: nn.Module) -> bool:
    trained = next(b.parameters(), None)  # None: a selector, beside an A of dense rows
    return trained is not None and len(trained) == b.out_features


def fix_reads(model: PeftModel, reads: Mapping[str, torch.Tensor] | None = None) -> None:
    """Let what every low-rank update reads stand still.

    Args:
        reads: A [r, I] by the linear's name, `a` of `task_reads`; None: what is there.
    """
    adapter = model.active_adapter
    for name, layer in low_rank(model).items():
        a = layer.lora_A[adapter]
        weight = a.weight.detach()
        if not weight.is_meta:
            known = a.fold() if isinstance(a, ProtectedA) else weight
            weight.copy_(known if reads is None else reads[name])
        layer.lora_A[adapter] = FixedA(weight)
        layer.__dict__.pop("get_delta_weight", None)  # that of a `ProtectedA`


@torch.no_grad()
def task_reads(
    model: PeftModel,
    texts: Sequence[Sequence[int]],
    general: Sequence[Sequence[int]] | None = None,
    wanted: Wanted | None = None,
) -> Reads:
    """What every low-rank update shall read, and what it is set beside.

    Args:
        model: implanted; its update is zero still.
        texts: token ids of some of what the task trains on; none: what was drawn stays, A P.
        general: token ids of the texts whose directions P is of, as many as `wanted` says, all of
            them on the model's device for one input at a time; None: P is what the linear reads
            through already.

    Raises:
        ValueError: as `input_directions`, or a linear reads zeros of the task's texts.
    """
    beside = list(general or ())
    check_lengths(model, [*texts, *beside])
    layers, anatomy = low_rank(model), find_anatomy(model)
    modules = {name: layer.get_base_layer() for name, layer in layers.items()}
    device, half = model.get_input_embeddings().weight.device, _half(model)
    reader = Reader(model, anatomy, modules, half)
    with casting(device, half):
        alike = looks_ahead(model, anatomy.decoder)
    both = batched(texts, alike), batched(beside, alike)
    found, behind = dict[str, torch.Tensor](), list[Behind]()
    with ExitStack() as ways:
        ways.enter_context(ways.enter_context(quiet(model))())
        ways.enter_context(exact_products())
        every = both[1] or both[0]
        sites = reader.sites(every[len(every) // 2])
        if wanted is not None and beside:
            wanted.check([site.size for site in sites])
        room = budget(device)
        groups = grouped([site.size for site in sites], 4, 2 if beside else 1, room)
        steps = len(groups) * sum(map(len, both))
        bar = ways.enter_context(tqdm(total=steps, desc="loki: what updates read", unit="batch"))
        for group in groups:
            some = {i: sites[i] for i in group}
            seen: tuple[dict[int, Moments], ...] = {}, {}
            for moments, batches in zip(seen, both, strict=True):
                if batches:
                    reader.add(moments, some, batches, bar)
            for i in group:
                known = {n: layers[n].lora_A[model.active_adapter] for n in sites[i].names}
                v = _through(known[sites[i].names[0]])
                if wanted is not None and beside:  # what it is of goes as soon as it is found
                    tokens, text = sum(map(len, beside)), seen[1].pop(i)
                    solved = solve(sites[i], text, None, wanted, None, tokens)
                    v = solved.basis.to(text.ordinary)
                    behind.append(Behind.of(solved))
                task = seen[0].pop(i, None)
                found |= _reads(known, v, task.ordinary if task else None)
    return Reads(found, behind)


def _half(model: PeftModel) -> torch.dtype | None:
    """What the base computes in where it is of 16 bits. By now a host may have cast some of its
    modules to 32 (Axolotl does with norms and routers), which a training runs under autocast."""
    own = {p.dtype for name, p in model.named_parameters() if ".lora_" not in name}
    return next((d for d in (torch.bfloat16, torch.float16) if d in own), None)


def _reads(
    known: Mapping[str, nn.Linear], v: torch.Tensor | Packed | None, moment: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """A of the linears that read one input, whose lora_A are `known`."""
    if moment is None:
        wide = {
            name: a.weight.to(torch.promote_types(a.weight.dtype, torch.float32))
            for name, a in known.items()
        }
        return {name: (a if v is None else outside(a, v)).cpu() for name, a in wide.items()}
    widths = {name: a.out_features for name, a in known.items()}
    found = gaining(moment, v, max(widths.values()), next(iter(known))).cpu()
    return {name: found[:width] for name, width in widths.items()}


def _through(a: nn.Module) -> torch.Tensor | Packed | None:
    """V of what a lora_A reads through, on its device."""
    return a.placed(a.weight.device) if isinstance(a, ProtectedA) else None


def gaining(
    moment: torch.Tensor, v: torch.Tensor | Packed | None, rank: int, name: str
) -> torch.Tensor:
    """A [r, I] = Eᵀ P / √3 of C [I, I] and V [I, u], P = I - V Vᵀ.

    Raises:
        ValueError: C is zero or not finite.
    """
    total = float(moment.diagonal().double().sum())
    if not 0 < total < float("inf"):
        raise ValueError(
            f"{name}: what the task's texts read there has a second moment of trace {total}; the"
            " model computes zeros, infinities or NaN on them"
        )
    seen = moment if v is None else outside(outside(moment, v).T.contiguous(), v)
    found = _leading(seen, rank).T.contiguous()
    return (found if v is None else outside(found, v)) / 3**0.5


def _leading(moment: torch.Tensor, count: int) -> torch.Tensor:
    """The leading eigenvectors [I, count] of a symmetric matrix, by block subspace iteration."""
    width = min(len(moment), 2 * count + 8)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(len(moment), width, generator=generator).to(moment)
    for _ in range(_ROUNDS):
        block = torch.linalg.qr(moment @ block)[0]
    inner = torch.linalg.eigh(block.T @ (moment @ block)).eigenvectors
    return block @ inner.flip(1)[:, :count]
