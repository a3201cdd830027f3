"""`loki doctor`: what LoKI needs on a machine, what is there, and what to do about the rest."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import EXTRA, has_axolotl, need_axolotl

OK, NOTE, BROKEN = "ok", "note", "broken"
# Shown also where all is well with them; the other requirements only where not.
_SHOWN = ("torch", "axolotl", "transformers", "peft", "bitsandbytes")
# What an import or a kernel of somebody else's raises where its installation is damaged.
_FAULTS = (ImportError, AttributeError, ValueError, OSError, RuntimeError)
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
# An NF4 value is off by less than this share of a normal tensor's norm.
_NF4_ERROR = 0.2
_LITTLE_DISK = 5e9
_WITHOUT = "is not installed; the stages, and all commands but `analyse` and `estimate`, need none"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        state: `ok`, `note` (LoKI works, but read it), or `broken` (LoKI needs it).
        found: what is there.
        do: what to do about it; empty where there is nothing to do.
    """

    what: str
    state: str
    found: str
    do: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(folder: str | None = None, given: Mapping[str, Any] | None = None) -> list[Finding]:
    """Everything that `loki doctor` looks at.

    Args:
        folder: as `loki.cache_dir`; None: what the YAML says.
        given: the keys of an Axolotl YAML, or None.
    """
    block = (given or {}).get("loki")
    if folder is None and isinstance(block, Mapping) and block.get("cache_dir"):
        folder = str(block["cache_dir"])
    return [
        *(run(given) if given is not None else []),
        *versions(),
        *plugin(),
        gpu(),
        flash_attention(),
        bitsandbytes(),
        offline(os.environ),
        telemetry(os.environ),
        *cache(folder),
    ]


def run(given: Mapping[str, Any]) -> list[Finding]:
    """What a run would be refused for: by its settings, and by its base's configuration.

    Raises:
        ImportError: Axolotl is not installed; the settings are its own.
    """
    need_axolotl("`loki doctor` with a CONFIG")
    from axolotl.utils.dict import DictDefault

    from . import settings
    from .base import check_registered, look_at

    cfg, do = DictDefault(dict(given)), "change the YAML as the sentence says"
    try:
        settings.prepare(cfg)
    except ValueError as error:
        return [Finding("settings", BROKEN, str(error), do)]
    found = [Finding("settings", OK, "can be used with LoKI")]
    try:
        anatomy = look_at(cfg)[1]
        check_registered(cfg)
    except ValueError as error:
        return [*found, Finding("base_model", BROKEN, str(error), do)]
    layers = f"{anatomy.num_layers} of {len(anatomy.layers)} layers"
    said = f"{given['base_model']}: rows in {layers} train, and can be merged"
    return [*found, Finding("base_model", OK, said)]


def text(found: list[Finding]) -> str:
    """The findings as a table for the terminal, with the verdict."""
    width = max(len(f.what) for f in found)
    lines = []
    for f in found:
        lines.append(
            f"{f.state.upper() if f.state == BROKEN else f.state:6}  {f.what:{width}}  {f.found}"
        )
        if f.do:
            lines.append(f"{'':6}  {'':{width}}  -> {f.do}")
    broken = [f.what for f in found if f.state == BROKEN]
    if broken:
        return "\n".join([*lines, f"LoKI cannot work as it should: {', '.join(broken)}"])
    missing = any(f.what == "axolotl" and f.state == NOTE for f in found)
    but = ", but for Axolotl, which only the plugin needs" if missing else ""
    return "\n".join([*lines, f"everything that LoKI needs is there{but}"])


def versions() -> list[Finding]:
    """Python and the packages, against the ranges that this package was built with."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = metadata.metadata("loki_plugin")
        needed = [Requirement(r) for r in metadata.requires("loki_plugin") or []]
    except metadata.PackageNotFoundError:
        do = "`pip install .` in a clone of its repository"
        return [Finding("loki_plugin", BROKEN, "is not installed in this Python", do)]
    python = sys.version.split()[0]
    allowed = about["Requires-Python"]
    fits = SpecifierSet(allowed).contains(python, prereleases=True)
    do = "" if fits else f"make a virtual environment with Python {allowed}"
    found = [Finding("python", OK if fits else BROKEN, f"{python} ({allowed})", do)]
    found.append(Finding("loki_plugin", OK, about["Version"]))
    for each in needed:
        ours = each.name == "axolotl"  # an extra: only the plugin needs it
        if ours and not has_axolotl():
            found.append(Finding("axolotl", NOTE, _WITHOUT, f"for the plugin: {EXTRA}"))
        elif ours or each.marker is None:
            finding = _version(each.name, each.specifier)
            if finding.state != OK or each.name in _SHOWN:
                found.append(finding)
    return found


def _version(name: str, specifier) -> Finding:
    allowed = f"{name}{specifier}"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, BROKEN, f"is not installed ({allowed})", f"pip install '{allowed}'")
    if specifier.contains(version, prereleases=True):
        return Finding(name, OK, f"{version} ({specifier})")
    said = f"{version}, but LoKI was run with {specifier} only"
    return Finding(name, BROKEN, said, f"pip install '{allowed}'")


def plugin() -> list[Finding]:
    """Does Axolotl load us, under the long name and under the short one?

    Nothing where there is no Axolotl; `versions` says so.
    """
    if not has_axolotl():
        return []
    try:
        from axolotl.integrations.base import load_plugin

        load_plugin("loki_plugin.LokiPlugin")
    except _FAULTS as error:
        do = "mend the installation: `pip install --force-reinstall .` in a clone of its repository"
        return [Finding("plugin", BROKEN, f"Axolotl cannot load it: {_short(error)}", do)]
    found = [Finding("plugin", OK, "`plugins: [loki_plugin.LokiPlugin]` loads")]
    try:
        load_plugin("loki")
    except _FAULTS:
        do = "write `plugins: [loki_plugin.LokiPlugin]`, which is the same"
        if os.environ.get("LOKI_NO_SHORT_NAME") == "1":
            do = f"unset LOKI_NO_SHORT_NAME, or {do}"
        else:
            do = f"install the package (its .pth file is not in site-packages), or {do}"
        return [*found, Finding("short name", NOTE, "`plugins: [loki]` does not load", do)]
    return [*found, Finding("short name", OK, "`plugins: [loki]` loads")]


def gpu() -> Finding:
    """What torch computes on."""
    import torch

    if not torch.cuda.is_available():
        do = "analysis and training run on the CPU, which suits models up to about 1B"
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            do = "there is an NVIDIA driver, but this torch is a CPU build: install one for CUDA"
        return Finding("GPU", NOTE, f"none that torch {torch.__version__} can use", do)
    cards = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        cards.append(
            f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
        )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        do = "set `bf16: false` and `fp16: true`: this card has no bfloat16"
        return Finding("GPU", NOTE, "; ".join(cards), do)
    return Finding("GPU", OK, f"{'; '.join(cards)}, bfloat16")


def flash_attention() -> Finding:
    """The optional kernels that training may use; analysing has its own attention."""
    name = "flash-attn"
    if find_spec("flash_attn") is None:
        do = "nothing, unless the YAML asks for it: pip install flash-attn"
        return Finding(name, OK, "is not installed; attention runs through SDPA", do)
    try:
        import flash_attn
    except _FAULTS as error:
        do = (
            "build it for this torch: pip install --no-build-isolation --force-reinstall flash-attn"
        )
        return Finding(name, NOTE, f"cannot be imported: {_short(error)}", do)
    return Finding(name, OK, str(flash_attn.__version__))


def bitsandbytes() -> Finding:
    """A real NF4 round trip, where training would make it."""
    name = "NF4"
    do = "pip install --force-reinstall 'bitsandbytes' ; `python -m bitsandbytes` says more"
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        weight = torch.linspace(-3, 3, 64 * 64, device=device).view(64, 64)
        packed, state = quantize_4bit(weight, quant_type="nf4")
        error = float((dequantize_4bit(packed, state) - weight).norm() / weight.norm())
    except _FAULTS as fault:
        return Finding(name, BROKEN, f"bitsandbytes does not quantise: {_short(fault)}", do)
    if not error < _NF4_ERROR:
        said = f"bitsandbytes quantises wrongly on {device}: the error is {error:.2f}"
        return Finding(name, BROKEN, said, do)
    return Finding(name, OK, f"bitsandbytes quantises on {device} (error {100 * error:.0f} %)")


def offline(environment: Mapping[str, str]) -> Finding:
    """Flags that keep Hugging Face's libraries from the network."""
    flags = [f for f in _OFFLINE if environment.get(f, "").upper() in ("1", "ON", "YES", "TRUE")]
    if not flags:
        return Finding("offline", OK, "no flag is set; models and data sets can be downloaded")
    do = f"nothing if all files are here; else unset {' '.join(flags)}"
    return Finding("offline", NOTE, f"{', '.join(flags)}: nothing is downloaded", do)


def telemetry(environment: Mapping[str, str]) -> Finding:
    """LoKI sends nothing; Axolotl has a switch."""
    said = "LoKI sends nothing"
    if not has_axolotl():
        return Finding("telemetry", OK, said)
    if any(
        environment.get(f, "").lower() in ("1", "true")
        for f in ("AXOLOTL_DO_NOT_TRACK", "DO_NOT_TRACK")
    ):
        return Finding("telemetry", OK, f"{said}, and Axolotl's is switched off")
    do = "export AXOLOTL_DO_NOT_TRACK=1 to switch it off"
    return Finding("telemetry", OK, f"{said}; Axolotl reports its use to its makers", do)


def cache(given: str | None) -> list[Finding]:
    """Where analyses are kept: can it be written, how full is it, how much room is left?"""
    from ..analysing.scores.cache import cache_folder, entries, kept, why_not_writable
    from ..args import LokiConfig
    from ..blocks import at_home

    do = "set LOKI_CACHE_DIR, or `loki.cache_dir` in the YAML, to a folder of yours"
    try:
        folder = cache_folder(at_home(given))
    except ValueError as error:
        return [Finding("cache", BROKEN, str(error), do)]
    why = why_not_writable(folder)
    if why is not None:
        return [Finding("cache", BROKEN, f"{folder} cannot be written: {why}", do)]
    analyses = entries(folder)
    size = sum(a.bytes for a in analyses) + sum(k.bytes for k in kept(folder))
    limit = LokiConfig().cache_limit
    said = f"{folder}: {len(analyses)} analyses, {size / 1e9:.2f} GB of {limit:g} GB"
    said += " (loki.cache_limit)"
    free = shutil.disk_usage(folder).free
    return [Finding("cache", OK, said), _disk(folder, free)]


def _disk(folder: Path, free: int) -> Finding:
    said = f"{free / 1e9:.0f} GB free where the cache is"
    if free >= _LITTLE_DISK:
        return Finding("disk", OK, said)
    do = f"an analysis of an 8B model takes 0.3 GB, a merged one 16 GB: free some of {folder}"
    return Finding("disk", NOTE, said, f"{do}, or `loki cache clear`")


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
