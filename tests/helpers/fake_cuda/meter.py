"""What operations on fake CUDA tensors would cost."""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# They allocate or look at memory from another side, and start no kernel.
_FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach"}
_FREE |= {"alias", "lift_fresh", "lift", "_unsafe_view", "_reshape_alias", "view", "set_"}
# Their result's shape depends on values, so the host waits for them.
_ASK = {"nonzero", "masked_select", "_unique2", "unique_dim"}
_OURS = ("loki_plugin", "transformers", "bitsandbytes", "accelerate")


class Meter(TorchDispatchMode):
    """Counts while `counting()`.

    Attributes:
        kernels: by phase.
        operations: "phase: name of the kernel" -> how often.
        flops: of matrix products, by phase.
        moved: bytes read and written, by phase.
        costs: (phase, kernels, FLOPs, bytes) -> how often, for a roofline.
        waits: the host waits for the device: "phase: what at line" -> how often.
        peak: bytes of live CUDA memory, largest sum, above what was there when counting began.
        peaks: the same by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.flops, self.moved = Counter(), Counter(), Counter()
        self.operations: Counter[str] = Counter()
        self.costs: Counter[tuple[str, int, int, int]] = Counter()
        self.waits: Counter[str] = Counter()
        self.live = 0
        self.peaks: Counter[str] = Counter()
        self._phases = ["other"]
        self._known: dict[int, int] = {}
        self._counting = False

    @contextmanager
    def counting(self, resident: list[torch.Tensor]) -> Iterator[None]:
        """Count; the `resident` tensors (weights) are there already."""
        for tensor in resident:
            self._known[tensor.untyped_storage()._cdata] = 0
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    @property
    def peak(self) -> int:
        return max(self.peaks.values(), default=0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._phases.append(name)
        try:
            yield
        finally:
            self._phases.pop()

    def within(self, name: str) -> bool:
        return name in self._phases

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name == "_local_scalar_dense":
            if args[0].device.type == "cuda":
                self._wait("value read")
            # A fake has no value: the one that lets most callers go on.
            dtype = args[0].dtype
            return True if dtype == torch.bool else 0.0 if dtype.is_floating_point else 0
        if not self._counting or func.namespace == "prim":
            return func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in _ASK and given[0].device.type == "cuda":
            self._wait(name)
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self._copies(name, args, kwargs, given, made)
        self._track(made)
        if any(t.device.type == "cuda" for t in given + made):
            self._account(func, name, args, kwargs, given, made, out)
        return out

    def _wait(self, what: str) -> None:
        if not self._counting:
            return
        frames = [
            f
            for f in traceback.extract_stack()
            if any(o in f.filename for o in _OURS) and f.name != "__torch_function__"
        ]
        line = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        self.waits[f"{self._phases[-1]}: {what} at {line}"] += 1

    def _copies(self, name, args, kwargs, given, made) -> None:
        if name not in ("_to_copy", "copy_") or not given or not made or not made[0].numel():
            return
        source = args[1] if name == "copy_" else args[0]
        devices = {source.device.type, made[0].device.type}
        if devices != {"cpu", "cuda"}:
            return
        if not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])):
            self._wait("blocking copy")
        elif source.device.type == "cpu" and not getattr(source, "pinned", False):
            self._wait("copy of pageable memory")

    def _track(self, made: list[torch.Tensor]) -> None:
        for tensor in made:
            storage = tensor.untyped_storage()
            if tensor.device.type != "cuda" or storage._cdata in self._known:
                continue
            self._known[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self._at_peak(0)
            weakref.finalize(storage, self._gone, storage._cdata)

    def _at_peak(self, more: int) -> None:
        phase = self._phases[-1]
        self.peaks[phase] = max(self.peaks[phase], self.live + more)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key, 0)

    def _account(self, func, name, args, kwargs, given, made, out) -> None:
        before = {t.untyped_storage()._cdata for t in given}
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if name in _FREE or (
            not writes and made and all(t.untyped_storage()._cdata in before for t in made)
        ):
            return
        phase = self._phases[-1]
        self.operations[f"{phase}: {name}"] += 1
        if name == "gemm_4bit":  # two scales, the weight made whole, an ordinary product
            tokens, (outputs, inputs) = args[0].numel() // args[0].shape[-1], args[2]
            whole = 2 * outputs * inputs
            self._at_peak(whole)  # gone when the product is made
            self._add(phase, 2, 0, 9 * outputs * inputs // 64)
            self._add(phase, 1, 0, whole + whole // 4)
            product = 2 * tokens * outputs * inputs
            self._add(phase, 1, product, whole + 2 * tokens * (outputs + inputs))
            return
        moved = sum(
            min(t.numel() * t.itemsize, t.untyped_storage().nbytes())
            for t in given + made
            if t.device.type == "cuda"
        )
        flops = 0
        if name in ("attend", "attend_back"):  # causal; its backward is five products of two
            (batch, heads, tokens, size), keys = (
                args[0].shape,
                args[1 if name == "attend" else 2].shape[2],
            )
            products = 2 if name == "attend" else 5
            flops = products * batch * heads * tokens * keys * size
        elif name == "embedding":  # reads what it answers
            moved = 2 * made[0].nbytes
        elif func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        self._add(phase, 1, flops, moved)

    def _add(self, phase: str, kernels: int, flops: int, moved: int) -> None:
        self.kernels[phase] += kernels
        self.flops[phase] += flops
        self.moved[phase] += moved
        self.costs[phase, kernels, flops, moved] += 1
