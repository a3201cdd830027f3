"""Protected inputs: an update that reads less, or nothing, of what general text consists of.

    ΔW_l = B_l · A_l · P_l,  P_l = I - V_l V_lᵀ

Hard directions: V = U, orthonormal, and the update reads nothing of them. Soft ones: P whitens,
V Vᵀ = U diag(1 - √(λ_u/λ_i)) Uᵀ, so that general text moves the update alike in all of them.

In training the adapter sees P x; that is the same function as A P on x itself, and is computed in
whichever order is cheaper. Unlike projecting gradients or updates (Adam-NSCL, GPM) it holds exactly
under Adam, whose moments mix coordinates. What is saved or merged is folded, A <- A P: an ordinary
LoRA adapter. AlphaEdit (arXiv 2410.02355) and LoRA-Null (2503.02659) use the null space of the same
matrices, for edits and for the start of A; CorDA (2406.05223) starts A and B from them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from .. import ranks
from ..model.anatomy import find_anatomy
from ..model.linears import PREFIX
from .directions import FILE_NAME, Directions, is_soft
from .packed import Packed, packed

# Folding again takes away what rounding left; it converges at once.
_FOLDS = 4
# ‖ΔW U‖/‖ΔW‖ of an adapter in half precision stays below this.
LEAKAGE = 1e-2


class ProtectedA(nn.Linear):
    """A lora_A that reads P x of its input: x -> A (x - V Vᵀ x).

    `weight` [r, I] is the parameter A; what is saved, loaded or merged is A P.

    Attributes:
        directions: V [I, u], as it was found: in 8 bits, bfloat16, or float32 or wider; it is
            computed with in float32 or wider. No buffer: it is neither saved with the adapter nor
            cast, sharded or sent to other ranks with the model. Modules that read one input share
            it.
        soft: whether P can be undone.
    """

    directions: torch.Tensor | Packed

    def __init__(self, weight: nn.Parameter, directions: torch.Tensor | Packed):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        whole = directions.whole() if isinstance(directions, Packed) else directions
        self.soft = is_soft(whole)
        self.rounded = whole.dtype == torch.bfloat16
        if isinstance(directions, torch.Tensor):
            dtype = directions.dtype if self.rounded else self.wide
            directions = packed(directions) or _shared(directions, dtype, directions.device)
        self.directions = directions
        self._folded: torch.Tensor | None = None  # A P as saved, while A has that version
        self._version = -1

    def extra_repr(self) -> str:
        kind = "softly_protected" if self.soft else "protected"
        return f"{super().extra_repr()}, {kind}={self.directions.shape[1]}"

    def placed(self, device: torch.device) -> torch.Tensor | Packed:
        """V on `device`, moved there once."""
        self.directions = _placed(self.directions, device)
        return self.directions

    def whole(self, device: torch.device) -> torch.Tensor:
        """V on `device`, float64."""
        v = self.placed(device)
        return (v.whole() if isinstance(v, Packed) else v).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._folded = None  # the weight may change next, also unseen by its version
        weight, tokens = self.weight, x.numel() // x.shape[-1]
        v = self.placed(x.device)
        # In half precision V would not be orthogonal, and much of what it takes out would stay.
        with torch.autocast(x.device.type, enabled=False):
            if tokens < self.out_features:
                x = _Outside.apply(x.to(self.wide), v).to(x.dtype)
            else:
                weight = _Outside.apply(weight.to(self.wide), v).to(weight.dtype)
        return nn.functional.linear(x, weight)

    def fold(self) -> torch.Tensor:
        """What is saved: A P [r, I]. A becomes what loading that gives, in place.

        The running model then goes on exactly as one that is resumed from what was saved. Until it
        trains again, folding gives the same bytes. Of a sharded weight these are the rows that
        this rank holds.
        """
        weight = self._held()
        if weight.is_meta:
            return weight
        if not self.soft:
            self._take_out(weight)
            return weight
        if self._folded is None or self._version != weight._version:
            v = self.whole(weight.device)
            self._keep(outside(weight.double(), v).to(weight.dtype))
        assert self._folded is not None
        return self._folded.to(weight.device)

    def _held(self) -> torch.Tensor:
        """The weight, or of a sharded one the rows that this rank holds."""
        weight = self.weight.detach()
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def _take_out(self, weight: torch.Tensor) -> None:
        """The part inside span(U), which has no effect, goes; a folded weight keeps its bytes."""
        u = self.whole(weight.device)
        done = torch.finfo(weight.dtype).eps * float(weight.double().norm())
        for _ in range(_FOLDS):
            inside = weight.double() @ u
            if float(inside.norm()) <= done:
                return
            weight.copy_(weight.double() - inside @ u.T)

    def _keep(self, folded: torch.Tensor) -> None:
        """A <- (A P) P⁻¹, and remember what it is of.

        P⁻¹ = I + V (I - VᵀV)⁻¹ Vᵀ; VᵀV is diagonal up to the rounding of V.
        """
        v, wide = self.whole(folded.device), folded.double()
        seen = wide @ v
        if self.rounded:
            left = torch.eye(v.shape[1], dtype=v.dtype, device=v.device) - v.T @ v
            apart = torch.linalg.solve(left, seen, left=False)
        else:
            apart = seen / (1 - v.square().sum(0))
        weight = self._held()
        weight.copy_(wide + apart @ v.T)
        self._folded, self._version = folded, weight._version

    def take_folded(self) -> None:
        """The weight is one that was saved: undo what was folded into it."""
        if self.soft and not self.weight.is_meta:
            self._keep(self._held().clone())

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        folded = self.fold()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.soft and not folded.is_meta:
            if isinstance(self.weight, DTensor):
                mesh, placements = self.weight.device_mesh, self.weight.placements
                shape, stride = self.weight.shape, self.weight.stride()
                folded = DTensor.from_local(folded, mesh, placements, shape=shape, stride=stride)
            destination[prefix + "weight"] = folded

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if prefix + "weight" in state_dict:
            self.take_folded()


def outside(x: torch.Tensor, u: torch.Tensor | Packed) -> torch.Tensor:
    """P x of the vectors x [..., I]: x - U(Uᵀx), for orthonormal U what lies outside span(U)."""
    if not isinstance(u, Packed):
        u = u.to(x.dtype)
        return x - (x @ u) @ u.T
    left = x.clone()
    for part in u.parts(x.dtype):
        left -= (x @ part) @ part.T
    return left


class _Outside(torch.autograd.Function):
    """`outside`, which keeps nothing for its backward but U itself: P is symmetric."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, u: torch.Tensor | Packed) -> torch.Tensor:
        ctx.u = u
        return outside(x, u)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return outside(gradient, ctx.u), None


def _placed(v: torch.Tensor | Packed, device: torch.device) -> torch.Tensor | Packed:
    if isinstance(v, Packed):
        if v.numbers.device == device:
            return v
        held = (v.wide, v.numbers, v.scales)
        return Packed(*(_shared(tensor, tensor.dtype, device) for tensor in held))
    return v if v.device == device else _shared(v, v.dtype, device)


def _shared(directions: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """V in a dtype and on a device; modules that were given one tensor get one, the same."""
    # The layout is part of what a product rounds to: computed and loaded ones must agree.
    same = (directions.dtype, directions.device) == (dtype, device)
    if same and directions.is_contiguous() and not directions.requires_grad:
        return directions
    known = _COPIES.setdefault(directions, {})
    if (dtype, device) not in known:
        known[dtype, device] = directions.detach().to(device, dtype).contiguous()
    return known[dtype, device]


_COPIES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def protect_inputs(
    model: PeftModel,
    directions: Directions | Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    fresh: bool = True,
    checked: bool = False,
) -> None:
    """Make the adapter of an implanted model read less, or nothing, of the directions.

    Args:
        model: a LoRA model whose targeted linears carry the adapter.
        directions: what `input_directions` returns, or a `Directions`.
        fresh: False for an adapter that was saved with these directions.
        checked: they were found on this model, or checked on it, before what hosts do to a base
            ahead of training: casting what is not quantised, growing embeddings.

    Raises:
        ValueError: directions that do not fit the model, or DeepSpeed ZeRO-3, which saves weights
            past their modules.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "protected inputs do not work with DeepSpeed ZeRO-3: it saves the adapter's weights"
            " without folding them. Use ZeRO-2 or DDP, or leave `loki.protect` out"
        )
    found = Directions.of(directions)
    if checked:
        found.check_sizes(model)
    else:
        found.check(model)
    adapter = model.active_adapter
    known = found.by_module([n.removeprefix(PREFIX) for n in find_anatomy(model).names])
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in module.lora_A:
            continue
        basis = known.get(name.removeprefix(PREFIX))
        if basis is None:
            raise ValueError(
                f"there are no directions for {name.removeprefix(PREFIX)}, which trains; find them"
                " for the same `targets`"
            )
        if basis.shape[1]:
            weight = module.lora_A[adapter].weight
            module.lora_A[adapter] = ProtectedA(weight, basis)
            if not fresh:
                module.lora_A[adapter].take_folded()
            module.get_delta_weight = functools.partial(folded_delta, module)
    model._loki_directions = found  # saved beside the adapter and its rows


def folded_delta(module: LoraLayer, adapter: str) -> torch.Tensor:
    """PEFT's ΔW, which it merges; it reads lora_A's weight past its forward."""
    a = module.lora_A[adapter]
    if not isinstance(a, ProtectedA):  # another adapter of the same layer
        return type(module).get_delta_weight(module, adapter)
    folded, own = a.fold(), a.weight.data
    if a.soft:
        a.weight.data = folded
    try:
        return type(module).get_delta_weight(module, adapter)
    finally:
        a.weight.data = own


def protected_modules(model: nn.Module) -> Iterable[tuple[str, ProtectedA]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, ProtectedA))


def fold(model: nn.Module) -> None:
    """Fold every protected A of `model`."""
    for _, module in protected_modules(model):
        module.fold()


class DirectionsBesideCheckpoints(TrainerCallback):
    """A checkpoint without its directions could be resumed with others."""

    def __init__(self, directions: Directions):
        self.directions = directions

    def on_save(self, args, state, control, model=None, **kwargs):
        # Only the rank that saves has folded; the others must hold the same bytes.
        fold(model)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if ranks.is_first() and folder.is_dir() and not (folder / FILE_NAME).exists():
            self.directions.save(folder / FILE_NAME)


def leakage(update: torch.Tensor, u: torch.Tensor) -> float:
    """‖ΔW U‖ / ‖ΔW‖ of an update's rows [k, I]: the share that reads protected directions.

    0 for a zero update; √(u/I) for one that knows nothing of U. Soft directions count in full.
    """
    update, u = update.detach().double(), u.to(update.device).double()
    u = u / u.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    whole = float(update.norm())
    return float((update @ u).norm()) / whole if whole else 0.0
