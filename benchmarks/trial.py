"""One model's whole life, tiny: built, analysed, trained one step, merged, verified.

Each stage that the package has runs for real on a stand-in; the first that refuses ends the life,
and its sentence is kept.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig

from loki_plugin import attribute, implant
from loki_plugin.choices import ALL, DOWN
from loki_plugin.implanting import naming
from loki_plugin.implanting.carrier import check_adaptable
from loki_plugin.implanting.checkpoint import Base, open_checkpoint
from loki_plugin.implanting.merge import merge_adapter
from loki_plugin.implanting.verify import verify
from loki_plugin.model.anatomy import find_anatomy
from loki_plugin.model.building import Kind, kinds
from loki_plugin.model.fingerprint import fingerprint
from loki_plugin.model.linears import chosen, has_routed_experts
from loki_plugin.rows import RowSelection

_ANY = (Exception,)  # a stand-in may fail in any way; what it said is the result
_AGREE = 1e-4  # logits of the tuned and of the merged model, float32


@dataclass
class Life:
    """How far a model came.

    Attributes:
        kind: its class.
        rows: layers with rows, of all layers; empty where none was found.
        analysed: yes, or why not.
        trains: yes (and stock PEFT loads the adapter), or why not.
        merges: yes (and verified byte by byte), or why not.
    """

    kind: str
    rows: str = ""
    analysed: str = ""
    trains: str = ""
    merges: str = ""

    def to_row(self) -> dict[str, str]:
        return asdict(self)


def live(base: Path, work: Path, named: str | None = None, analyse: bool = True) -> Life:
    """Go through the life of a stand-in that `save_standin` made; `work` is made and removed.

    Args:
        named: the class that the YAML names (`model_type`).
    """
    config = AutoConfig.from_pretrained(base)
    if hasattr(config, "quantization_config"):  # what it was quantised from is merged into
        del config.quantization_config
        base = Path(shutil.copytree(base, work / "base"))
        config.save_pretrained(base)
    life = Life("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            life.kind = kinds(config, named)[0].name
            _train_and_merge(life, base, work, config, named, analyse)
        except _ANY as error:
            life.trains = life.trains or _said(error)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return life


def save_standin(config: Any, folder: Path) -> Kind:
    """Make the model of a small configuration, of the class that Axolotl loads, and save it.

    Raises:
        Exception: whatever its constructor raises.
    """
    kind = kinds(config)[0]
    torch.manual_seed(0)
    build = getattr(kind.loader, "from_config", None) or kind.loader._from_config
    model = build(config).float()
    with torch.no_grad():  # large enough that a step shows
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return kind


def _train_and_merge(
    life: Life, base: Path, folder: Path, config: Any, named: str | None, analyse: bool
) -> None:
    where = Base(base, kind=named)
    try:
        kind = kinds(config, named)[0]
        model = kind.loader.from_pretrained(base, config=config, dtype=torch.float32).eval()
        anatomy = find_anatomy(model)
        life.rows = f"{anatomy.num_layers} of {len(anatomy.layers)}"
        targets = DOWN if anatomy.down else ALL  # without rows all else trains
        linears = chosen(model, anatomy, targets)
        if not has_routed_experts(anatomy):
            anatomy.check_rows()
        check_adaptable(anatomy, model, linears)
        open_checkpoint(where)
    except _ANY as error:
        life.trains = _said(error)
        return
    ids = torch.arange(5, 23).view(2, 9)
    if analyse:
        try:
            scores = attribute(model, ids)
            life.analysed = "yes" if bool(torch.isfinite(scores).all()) else "scores with NaN"
        except _ANY as error:
            life.analysed = _said(error)
    try:
        rows = [torch.arange(1, 7) + i for i in range(anatomy.num_layers)]
        mark = fingerprint(model)
        selection = RowSelection(rows, anatomy.hidden_size, mark, linears=linears)
        tuned = implant(model, selection, targets=targets)
        for first in (True, False) if linears else (False,):
            tuned(input_ids=ids, labels=ids).loss.backward()
            _step(tuned, first)
        with torch.no_grad():
            after = tuned.eval()(input_ids=ids).logits
        tuned.save_pretrained(folder / "adapter")
        selection.save(folder / "adapter" / "loki_rows.json")
        with stock_peft(), torch.no_grad():
            stock = PeftModel.from_pretrained(
                kind.loader.from_pretrained(base, config=config, dtype=torch.float32),
                folder / "adapter",
            )
            _compare(stock.eval()(input_ids=ids).logits, after, "what stock PEFT loads")
        life.trains = "yes"
    except _ANY as error:
        life.trains = _said(error)
        return
    try:
        merge_adapter(where, folder / "adapter", folder / "merged", selection, progress=False)
        proof = verify(where, folder / "merged", selection, progress=False)
        if not proof.ok:
            raise ValueError(proof.faults[0])
        if not all(proof.changed_rows):
            raise ValueError("a layer's rows have not changed")
        merged = kind.loader.from_pretrained(folder / "merged", dtype=torch.float32).eval()
        with torch.no_grad():
            found = merged(input_ids=ids).logits
        _compare(found, after, "the merged model")
        life.merges = "yes"
    except _ANY as error:
        life.merges = _said(error)


def _compare(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < _AGREE:
        raise ValueError(f"{what} answers otherwise: its logits differ by {difference:.2g}")


@contextmanager
def stock_peft() -> Iterator[None]:
    """PEFT as it is where this package is not."""
    name = "convert_peft_config_for_transformers"
    ours = getattr(naming.peft_conversion, name)
    setattr(naming.peft_conversion, name, getattr(ours, "keeps_modules", ours))
    try:
        yield
    finally:
        setattr(naming.peft_conversion, name, ours)


def _step(model: torch.nn.Module, first: bool) -> None:
    """One step of size; every layer must have a gradient, but A in the first step beside B = 0."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or (first and "lora_A" in name):
            continue
        if parameter.grad is None or not float(parameter.grad.abs().max()) > 0:
            raise ValueError(f"{name} gets no gradient")
        with torch.no_grad():
            parameter -= 0.05 * parameter.grad / parameter.grad.abs().max()
            parameter.grad = None


def _said(error: BaseException) -> str:
    line = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"
