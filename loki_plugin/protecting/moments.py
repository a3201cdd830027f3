"""Second moments of what linear layers read on general text, and which of them read the same.

    C = Σ x xᵀ / ‖x‖²   over all ordinary tokens,   S = Σ x xᵀ / ‖x‖²   over sinks

In pretrained models the input of a layer on a *sink* token, usually the first of a text, can be
hundreds of times as long as on any other (massive activations, arXiv 2402.17762, 2603.05498). In
Σ x xᵀ that one direction would hold nearly all energy and hide all others. So every input counts by
its direction, and a token whose input is more than `SINK` times as long as the median counts apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from ..model.anatomy import Anatomy, linear_sizes
from ..model.hooks import removing

SINK = 10.0  # times the median length
# Tokens that run at once.
TOKENS = 2048
# In how many strips a moment is computed: with so many, 5/8 of it.
_STRIPS = 4


@dataclass
class Site:
    """Linear modules that read one and the same input.

    Attributes:
        names: inside the model, in the order in which they run.
        size: I, of their input.
        length: the median ‖x‖ of some tokens.
    """

    names: list[str]
    size: int
    length: float = 0.0


@dataclass
class Moments:
    """Of one site, on its device, float32 or wider.

    Attributes:
        ordinary: C [I, I].
        sinks: S [I, I], or None where no token is a sink.
        tokens: how many ordinary ones; inputs that are zero count as none.
        sink_tokens: how many sinks.
        longest: of a sink's input over the median.
    """

    ordinary: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    tokens: int = 0
    sink_tokens: int = 0
    longest: float = 0.0

    def add(self, x: torch.Tensor, length: float) -> None:
        """The inputs x [n, I] of n real tokens."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        lengths = x.norm(dim=-1, keepdim=True)
        directions = x / lengths.clamp_min(torch.finfo(x.dtype).tiny)  # a zero input stays zero
        apart = (lengths > SINK * length).squeeze(-1)
        if length and bool(apart.any()):
            found = directions[apart]
            self.sinks = _plus(self.sinks, found)
            self.sink_tokens += len(found)
            self.longest = max(self.longest, float(lengths.max()) / length)
            directions = directions[~apart]
        self.ordinary = _plus(self.ordinary, directions)
        self.tokens += len(directions)


def _plus(moment: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """moment + xᵀ x, of which what lies above the diagonal is computed, and mirrored."""
    size = x.shape[1]
    if moment is None:
        moment = x.new_zeros(size, size)
    width = -(-size // _STRIPS)
    for start in range(0, size, width):
        end = start + width
        moment[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
        moment[end:, start:end] = moment[start:end, end:].T
    return moment


@dataclass
class Reader:
    """What runs a model over prompts and sees what its linears read.

    Attributes:
        modules: by name, those whose inputs are wanted.
        autocast: to this dtype, as in a training whose weights are of several; None: as it stands.
    """

    model: nn.Module
    anatomy: Anatomy
    modules: dict[str, nn.Module]
    autocast: torch.dtype | None = None

    def sites(self, batch: Sequence[torch.Tensor]) -> list[Site]:
        """Which modules read the same tensor, in the order in which they run on `batch`.

        Raises:
            ValueError: a module that does not run on text, or not once for each token.
        """
        found: list[Site] = []
        inputs: list[torch.Tensor] = []  # alive, so that no two of them lie in one place
        reached: set[str] = set()

        def see(name: str, module: nn.Module, x: torch.Tensor, real: torch.Tensor) -> None:
            if name in reached:
                return
            reached.add(name)
            same = next((s for s, seen in zip(found, inputs, strict=True) if _same(seen, x)), None)
            if same is not None:
                same.names.append(name)
                return
            if x.shape[:-1].numel() != real.numel():
                raise ValueError(
                    f"{name} reads {x.shape[:-1].numel()} vectors where the texts have"
                    f" {real.numel()} tokens, padding included: which of them general text is"
                    " cannot be told. Leave it out of `loki.targets`, or set `protect: off`"
                )
            lengths = _rows(x, real).float().norm(dim=-1)
            sizes = linear_sizes(module)
            assert sizes is not None
            found.append(Site([name], sizes[0], float(lengths.median())))
            inputs.append(x)

        self._run(batch, self.modules, see)
        missing = [name for name in self.modules if name not in reached]
        if missing:
            raise ValueError(
                f"{missing[0]} does not run on text ({len(missing)} modules do not), so that what"
                " general text does there cannot be protected; name the others in `loki.targets`:"
                " a list of names, or a regular expression for whole names"
            )
        return found

    def add(
        self, moments: dict[int, Moments], sites: dict[int, Site], batches: list, bar: tqdm
    ) -> None:
        """Add the batches to the moments of some sites; the model runs up to the last of them."""
        first = {site.names[0]: i for i, site in sites.items()}
        last = sites[max(sites)].names[0]
        modules = {name: self.modules[name] for name in first}

        def see(name: str, module: nn.Module, x: torch.Tensor, real: torch.Tensor) -> None:
            i = first[name]
            moments.setdefault(i, Moments()).add(_rows(x, real), sites[i].length)
            if name == last:
                raise _Enough

        for batch in batches:
            self._run(batch, modules, see)
            bar.update()

    def _run(self, batch: Sequence[torch.Tensor], modules: dict[str, nn.Module], see) -> None:
        device = self.model.get_input_embeddings().weight.device
        # Padding stands on the right, after every real token, where causal attention never looks.
        ids = nn.utils.rnn.pad_sequence(list(batch), batch_first=True).to(device)
        lengths = torch.tensor([len(p) for p in batch], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        real = mask.flatten()
        with ExitStack() as hooks, suppress(_Enough):
            for name, module in modules.items():
                hook = _seeing(see, name, real)
                hooks.enter_context(removing(module.register_forward_pre_hook(hook)))
            hooks.enter_context(casting(device, self.autocast))
            self.anatomy.decoder(input_ids=ids, use_cache=False)


class _Enough(Exception):
    """The last site has been seen; what comes above it need not run."""


def casting(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to a dtype, or none."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _seeing(see, name: str, real: torch.Tensor):
    def enter(module, args):
        with casting(args[0].device, None):  # moments are summed in float32
            see(name, module, args[0], real)

    return enter


def _rows(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The inputs of real tokens [n, I] of x [B, T, I], or [B·T, I]: some families flatten it."""
    return x.reshape(-1, x.shape[-1])[real.to(x.device)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]


def batched(prompts: Sequence[Sequence[int]], alike: bool = False) -> list[list[torch.Tensor]]:
    """Prompts of like length together, at most `TOKENS` tokens with padding; one may exceed it.

    With `alike`, of the same length: nothing is padded.
    """
    batches: list[list[torch.Tensor]] = []
    for prompt in sorted(prompts, key=len):
        full = batches and (len(batches[-1]) + 1) * len(prompt) > TOKENS
        if not batches or full or (alike and len(batches[-1][0]) < len(prompt)):
            batches.append([])
        batches[-1].append(torch.as_tensor(prompt))
    return batches
