"""lora_B confined to rows: what exists is stored, and expanded to [H, r] only to be saved or read.

Rows outside the selection take no part in training because they are not there: no optimizer,
weight decay, clipping or NaN can reach them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..model.loading import whole

KEY = "weight"  # what an ordinary lora_B calls its matrix on disk


def rows_outside(b: torch.Tensor, rows: torch.Tensor) -> list[int]:
    """The rows of B [H, r] that are not zero though `rows` [k] does not select them; NaN counts."""
    touched = (b != 0).any(1)
    touched[rows.to(b.device)] = False
    return touched.nonzero()[:, 0].tolist()


def let_train(b: nn.Linear) -> None:
    """Mark an ordinary lora_B of a further linear that trains whole, beside the down-projections'.

    An attribute: a deep copy of the model keeps it.
    """
    b._loki_trains = True


def is_ours(b: nn.Module) -> bool:
    """Whether a lora_B is confined to rows, or one that `let_train` has marked."""
    return isinstance(b, RowScatter) or bool(getattr(b, "_loki_trains", False))


class RowScatter(nn.Module):
    """A lora_B that writes only the selected rows of its output; all others are exact zeros.

    Its state dict holds an ordinary `weight` [H, r], which is also what loading expects.

    Attributes:
        rows: [k] on the CPU, no buffer: neither `to_empty` nor a move to meta can lose them.
    """

    def __init__(self, rows: torch.Tensor, out_features: int, in_features: int):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.rows = rows.cpu()
        self._placed = self.rows
        self.register_parameter("bias", None)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {len(self.rows)} of {self.out_features} rows"

    def placed(self, device: torch.device) -> torch.Tensor:
        """The rows on `device`, copied there once."""
        if self._placed.device != device:
            self._placed = self.rows.to(device)
        return self._placed

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """[..., k] -> [..., H], zero outside the rows."""
        out = values.new_zeros(*values.shape[:-1], self.out_features)
        return out.index_copy(-1, self.placed(values.device), values)

    @property
    def weight(self) -> torch.Tensor:
        """B [H, r], made anew at each reading; PEFT reads it to merge. Writing to it is lost."""
        return self.expanded()

    def expanded(self) -> torch.Tensor:
        raise NotImplementedError

    def compact(self, b: torch.Tensor) -> torch.Tensor | None:
        """What this module stores of an ordinary B [H, r].

        Raises:
            ValueError: B does not belong to these rows; a row is named.
        """
        raise NotImplementedError

    def _check_shape(self, b: torch.Tensor) -> None:
        expected = (self.out_features, self.in_features)
        if tuple(b.shape) != expected:
            raise ValueError(f"lora_B has shape {list(b.shape)}, expected {list(expected)}")

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        weight = self.expanded()
        destination[prefix + KEY] = weight if keep_vars else weight.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
    ):
        if prefix + KEY not in state_dict:
            missing.append(prefix + KEY)
            return
        try:
            stored = self.compact(whole(state_dict[prefix + KEY]))
        except ValueError as error:
            where = f"{prefix}{KEY}: " if prefix else ""
            raise ValueError(
                f"{where}{error}. The adapter was trained on other rows: use the"
                " loki_rows.json that stands beside it"
            ) from error
        own = {
            f"{prefix}{name}": _spread(stored, like)
            for name, like in self._parameters.items()
            if name != "bias"
        }
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing, unexpected, errors
        )


def _spread(complete: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that every rank holds, spread as `like` is."""
    if not isinstance(like, DTensor):
        return complete
    mesh = like.device_mesh
    there = complete.detach().to(mesh.device_type)
    return distribute_tensor(there, mesh, like.placements, src_data_rank=None)


class RowSelector(RowScatter):
    """Dense form: B is the frozen one-hot selector; nothing is stored but the rows.

    Column i goes to row rows[i]; the matrix is never multiplied.
    """

    def __init__(self, rows: torch.Tensor, like: torch.Tensor):
        super().__init__(rows, *like.shape)
        # Carries the dtype and the device of the matrix that is not there. It is there itself, even
        # where a rank's matrices are on the meta device: what is there can be moved.
        device = "cpu" if like.is_meta else like.device
        nothing = torch.empty(0, dtype=like.dtype, device=device)
        self.register_buffer("like", nothing, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scatter(x)

    def expanded(self) -> torch.Tensor:
        return self._one_hot().to(self.like.device)

    def _one_hot(self) -> torch.Tensor:
        selector = torch.zeros(self.out_features, self.in_features, dtype=self.like.dtype)
        selector[self.rows, torch.arange(len(self.rows))] = 1
        return selector

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # On the CPU: saving must not need all layers' matrices on the device at once.
        destination[prefix + KEY] = self._one_hot()

    def compact(self, b: torch.Tensor) -> None:
        self._check_shape(b)
        if b.is_meta:
            return
        outside = rows_outside(b, self.rows)
        inside = b[self.rows.to(b.device)]
        wrong = (inside != torch.eye(len(self.rows), device=b.device)).any(1).nonzero()[:, 0]
        faulty = [*outside, *self.rows[wrong.cpu()].tolist()]
        if faulty:
            raise ValueError(
                f"lora_B is not the one-hot selector of the rows (row {faulty[0]} differs)"
            )


class RowFactor(RowScatter):
    """Low-rank form: the selected rows of B, `values` [k, r], which train from zero."""

    def __init__(self, rows: torch.Tensor, like: torch.Tensor):
        super().__init__(rows, *like.shape)
        self.values = nn.Parameter(like.detach().new_zeros(len(rows), like.shape[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scatter(nn.functional.linear(x, self.values))

    def expanded(self) -> torch.Tensor:
        values = whole(self.values)
        b = values.new_zeros(self.out_features, self.in_features)
        return b.index_copy(0, self.placed(b.device), values)

    def compact(self, b: torch.Tensor) -> torch.Tensor:
        self._check_shape(b)
        outside = [] if b.is_meta else rows_outside(b, self.rows)
        if outside:
            raise ValueError(f"lora_B has non-zero rows outside the selection: {outside[:5]}")
        return b[self.rows.to(b.device)]
