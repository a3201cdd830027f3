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

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from .directions import is_soft
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
        _count_updates()
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
        # A P as the passes of one training step read it, and of which state of A it was made.
        self._read: torch.Tensor | None = None
        self._read_of: tuple | None = None
        self._spent = False  # a backward went through it: A may change next

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
        weight, v = self.weight, self.placed(x.device)
        # Which way is for the number of tokens alone to say: a checkpoint that is not reentrant
        # hands what it computes again to the graph of the first time.
        few = x.numel() // x.shape[-1] < self.out_features
        known = None if few else self._known(x)
        if known is not None:
            return nn.functional.linear(x, _Known.apply(weight, known, self))
        # In half precision V would not be orthogonal, and much of what it takes out would stay.
        with torch.autocast(x.device.type, enabled=False):
            if few:
                x = _Outside.apply(x.to(self.wide), v).to(x.dtype)
            else:
                weight = _Outside.apply(weight.to(self.wide), v).to(weight.dtype)
        return nn.functional.linear(x, weight)

    def _known(self, x: torch.Tensor) -> torch.Tensor | None:
        """A P, made once for all passes of a micro batch: a recomputing checkpoint's, and in a
        step's first one the anchor's too.

        It stays until A may have changed. Optimizers write past its version, so that outside a
        backward it is made anew as soon as one went through it or an optimizer has stepped. None in
        an evaluation, which makes none.
        """
        if torch.compiler.is_compiling() or not self.weight.requires_grad:
            return None
        kind, dtype = x.device.type, self.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        of = (id(self.weight), self.weight._version, _UPDATES[0], x.device, dtype)
        inside = torch._C._current_graph_task_id() != -1
        if self._read is None or self._read_of != of or (self._spent and not inside):
            self._read = None
            if self.training or torch.is_grad_enabled():
                with torch.no_grad(), torch.autocast(kind, enabled=False):
                    whole = outside(self.weight.to(self.wide), self.placed(x.device))
                    self._read = whole.to(self.weight.dtype).to(dtype)
                self._read_of, self._spent = of, False
        return self._read

    def fold(self) -> torch.Tensor:
        """What is saved: A P [r, I]. A becomes what loading that gives, in place.

        The running model then goes on exactly as one that is resumed from what was saved. Until it
        trains again, folding gives the same bytes. Of a sharded weight these are the rows that
        this rank holds.
        """
        weight, self._read = self._held(), None
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
    rows = x.reshape(-1, x.shape[-1])
    left = rows.clone()
    for part in u.parts(x.dtype):
        left.addmm_(rows @ part, part.T, alpha=-1)
    return left.view_as(x)


class _Outside(torch.autograd.Function):
    """`outside`, which keeps nothing for its backward but U itself: P is symmetric."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, u: torch.Tensor | Packed) -> torch.Tensor:
        ctx.u = u
        return outside(x, u)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return outside(gradient, ctx.u), None


class _Known(torch.autograd.Function):
    """A P that is there already; its backward is that of `_Outside`."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, known: torch.Tensor, module: ProtectedA):
        ctx.module, ctx.dtype = module, weight.dtype
        return known.detach()  # each pass has a tensor of its own, and all one memory

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        module = ctx.module
        module._spent = True
        v = module.placed(gradient.device)
        return outside(gradient.to(module.wide), v).to(ctx.dtype), None, None


# Steps of all optimizers of this process so far.
_UPDATES = [0]


@functools.cache
def _count_updates() -> None:
    def count(*_):
        _UPDATES[0] += 1

    register_optimizer_step_post_hook(count)


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


def leakage(update: torch.Tensor, u: torch.Tensor) -> float:
    """‖ΔW U‖ / ‖ΔW‖ of an update's rows [k, I]: the share that reads protected directions.

    0 for a zero update; √(u/I) for one that knows nothing of U. Soft directions count in full.
    """
    update, u = update.detach().double(), u.to(update.device).double()
    u = u / u.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    whole = float(update.norm())
    return float((update @ u).norm()) / whole if whole else 0.0
