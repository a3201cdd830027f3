"""Which YAMLs of a folder train with one more line: Axolotl's examples, or a user's own.

    python -m benchmarks.examples FOLDER [--work DIR] [--csv FILE] [--results]

Every YAML gets `plugins: [loki]` and goes through registration and Axolotl's validation as on one
H100; its base is a tiny stand-in of the same class and structure (its own configuration, shrunk,
where that can be read; else what `known_bases.py` knows of its id). The stand-in is then analysed,
trained for a step, merged and verified for real. Nothing is downloaded but configurations.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from benchmarks.known_bases import known
from benchmarks.standins import shrink
from benchmarks.trial import Life, live, save_standin
from benchmarks.writer import write
from loki_plugin.commands.shared import stdout_is_free

_H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
# A base of 2026: the newest that the examples of Axolotl 0.19 train.
NEWEST = (
    "gemma-4-", "qwen3.5-", "mistral-small-4-", "mistral-medium-3.5", "glm-4.7-flash", "glm-5.2",
    "deepseek-v4", "nemotron-3-super", "paddleocr-vl-1.6",
)  # fmt: skip


@dataclass
class Outcome:
    """One YAML.

    Attributes:
        axolotl: "takes it", or what it said, without loki.
        loki: the same with one more line.
        obeyed: the same after doing what loki said; empty where it took the YAML at once.
        analysed: of the base's stand-in, as in `Life`; so `trains` and `merges`.
    """

    file: str
    base: str
    family: str = ""
    axolotl: str = ""
    loki: str = ""
    obeyed: str = ""
    analysed: str = ""
    trains: str = ""
    merges: str = ""

    @property
    def taken(self) -> bool:
        """By Axolotl itself, without loki."""
        return self.axolotl == _TAKEN

    @property
    def accepted(self) -> bool:
        """By loki too, as it stands."""
        return self.taken and self.loki == _TAKEN

    @property
    def possible(self) -> bool:
        """The base trains, merges and verifies, whatever the settings; maybe without analysis."""
        return self.taken and self.trains == self.merges == "yes"

    @property
    def whole(self) -> bool:
        """Accepted, and its base trains, merges and verifies."""
        return self.accepted and self.possible

    @property
    def in_the_end(self) -> bool:
        """The same, with what loki said done."""
        return self.possible and _TAKEN in (self.loki, self.obeyed)

    @property
    def why(self) -> str:
        """The first thing that stands in the way."""
        if not self.taken:
            return f"Axolotl: {self.axolotl}"
        return next((s for s in (self.loki, self.trains, self.merges) if s not in _FINE), "")


# The 250 YAMLs of Axolotl's examples at commit 067b021 as earlier versions took them.
EARLIER = """Axolotl's examples (commit 067b021) with earlier versions:

| version | taken by Axolotl | base trains, merges, verifies | accepted as they stand | both \
| both, after doing what loki says | newest bases that train |
|---|---|---|---|---|---|---|
| 0.6.0 | 221 | - | 149 | 81 (37 %) | 117 (53 %) | 3 of 19 |
| 0.7.0 | 218 | 197 (90 %) | 141 (65 %) | 140 (64 %) | 187 (86 %) | 15 of 17 |"""
_TAKEN = "takes it"
_FINE = (_TAKEN, "yes", "")


def _timm() -> str:
    """Gemma 3n's tower is built with it."""
    try:
        return f"timm {version('timm')}"
    except PackageNotFoundError:
        return "without timm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, help="where the stand-ins are made; default: /tmp")
    parser.add_argument("--csv", type=Path, help="write what became of each YAML")
    parser.add_argument("--results", action="store_true", help="write benchmarks/results")
    options = parser.parse_args()
    with stdout_is_free():
        found = list(sweep(options.folder, options.work))
    if not found:
        parser.error(f"'{options.folder}' has no YAML with a base_model")
    print(told(found))
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*asdict(found[0]), "why"])
            writer.writeheader()
            writer.writerows(asdict(o) | {"why": o.why} for o in found)
    if options.results:
        write(
            "examples",
            f"{len(found)} YAMLs with one more line, on stand-ins of their bases; {_timm()}.",
            "python -m benchmarks.examples FOLDER --results",
            by_base(found),
            more=f"{told(found)}\n\n{EARLIER}",
            as_csv=True,
        )


def sweep(folder: Path, work: Path | None = None) -> Iterable[Outcome]:
    """Every YAML under `folder` that names a base, in order."""
    logging.disable(logging.WARNING)  # every YAML would say what was overridden
    place = Path(tempfile.mkdtemp(prefix="loki-examples-", dir=work))
    lives: dict[tuple[str, str], Life] = {}
    try:
        for file in sorted([*folder.rglob("*.yml"), *folder.rglob("*.yaml")]):
            run = _read(file)
            if run is not None:
                yield _outcome(str(file.relative_to(folder)), run, place, lives)
    finally:
        logging.disable(logging.NOTSET)
        shutil.rmtree(place, ignore_errors=True)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        run = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return run if isinstance(run, dict) and isinstance(run.get("base_model"), str) else None


def _outcome(
    name: str, run: dict[str, Any], place: Path, lives: dict[tuple[str, str], Life]
) -> Outcome:
    base = run["base_model"]
    outcome = Outcome(name, base)
    folder = place / base
    if not (folder / "config.json").is_file():
        config, stored = _configuration(run)
        if config is None:
            outcome.axolotl = "not tried: the base's configuration cannot be read here"
            return outcome
        _serve(config, stored, folder)
    from transformers import AutoConfig

    outcome.family = AutoConfig.from_pretrained(folder).model_type
    served = run | {"base_model": str(folder)}
    outcome.axolotl = _validate(served)
    if not outcome.taken:
        return outcome
    outcome.loki = _validate(served | {"plugins": [*_plugins(run), "loki"]})
    if not outcome.accepted:
        outcome.obeyed = _obey(served, outcome.loki)
    if "is quantised with" in outcome.loki:  # another base is meant than this one
        return outcome
    named = str(run.get("model_type") or "")
    if (base, named) not in lives:
        lives[base, named] = live(folder, place / "life", named or None)
    life = lives[base, named]
    outcome.analysed, outcome.trains, outcome.merges = life.analysed, life.trains, life.merges
    return outcome


def _obey(run: dict[str, Any], said: str) -> str:
    """Take out the settings that are named, or take the targets that there are; try again. What
    Axolotl then says of a key that needs one of those is done too."""
    changed = dict(run)
    for _ in range(3):
        if "cannot be used with loki" in said:
            listed = said.split("cannot be used with loki")[1].partition(":")[2]
            keys = re.findall(r"(\w+)[\w.]*: ", listed)
            changed = {k: v for k, v in changed.items() if k not in keys}
        elif "`targets: all` trains" in said or "or write `all`" in said:
            changed["loki"] = {"targets": "all"}
        elif needs := re.search(r"Value error, (\w+) requires", said):
            changed.pop(needs[1], None)
        else:
            return said
        said = _validate(changed | {"plugins": [*_plugins(run), "loki"]})
        if said == _TAKEN:
            return said
    return said


def _plugins(run: Mapping[str, Any]) -> list[str]:
    given = run.get("plugins") or []
    return [given] if isinstance(given, str) else list(given)


def _configuration(run: Mapping[str, Any]) -> tuple[Any, str | None]:
    """A small configuration of the base, and how it is stored quantised."""
    from loki_plugin.host.base import Unreadable, quantisation_of, read_config

    try:
        own = read_config({"base_model": run["base_model"]})
    except Unreadable:
        return known(run["base_model"]) or (None, None)
    return shrink(own), quantisation_of(own)


def _serve(config: Any, stored: str | None, folder: Path) -> None:
    """The stand-in as a checkpoint; where its class cannot be made, its configuration alone."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save_standin(config, folder)
    except Exception:  # noqa: BLE001 - others' constructors; registration will say the same
        config.save_pretrained(folder)
    if stored:
        from transformers import AutoConfig

        again = AutoConfig.from_pretrained(folder)
        again.quantization_config = {"quant_method": stored}
        again.save_pretrained(folder)


def _validate(run: dict[str, Any]) -> str:
    """Registration of the plugins and Axolotl's validation, in this process."""
    import torch
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    PluginManager.get_instance().plugins.clear()
    cfg = DictDefault(copy.deepcopy(run))
    version = {"torch_version": torch.__version__.split("+", maxsplit=1)[0]}
    try:
        with patch("loki_plugin.host.base._check_quota"):  # a stand-in has not the base's rows
            prepare_plugins(cfg)
        validate_config(cfg, capabilities=_H100, env_capabilities=version)
    except Exception as error:  # noqa: BLE001 - what any plugin or validator of others raises
        return _short(error)
    return _TAKEN


def _short(error: BaseException) -> str:
    lines = [s.strip() for s in str(error).splitlines() if s.strip()]
    kept = [s for s in lines if "validation error" not in s and "https://" not in s]
    return " ".join(kept or lines or [type(error).__name__])[:1000]


def by_base(found: Iterable[Outcome]) -> list[dict[str, Any]]:
    """A line per base."""
    rows: dict[str, dict[str, Any]] = {}
    for o in found:
        row = rows.setdefault(
            o.base, {"base": o.base, "family": o.family, "YAMLs": 0, "taken": 0, "accepted": 0,
                     "analysed": "", "train and merge": 0, "why not": ""}
        )  # fmt: skip
        row["YAMLs"] += 1
        row["taken"] += o.taken
        row["accepted"] += o.accepted
        row["train and merge"] += o.possible
        row["analysed"] = row["analysed"] or ("yes" if o.analysed == "yes" else "")
        row["why not"] = row["why not"] or ("" if o.whole else reason(o.why).replace("|", "/"))
    return sorted(rows.values(), key=lambda r: r["base"].lower())


def told(found: list[Outcome]) -> str:
    """The figures, and what stands in the way by class of reason."""
    taken = [o for o in found if o.taken]
    newest = {o.base for o in taken if any(n in o.base.lower() for n in NEWEST)}
    new = {o.base for o in taken if o.possible and o.base in newest}

    def counted(which: str) -> str:
        some = [o for o in taken if getattr(o, which)]
        share = 100 * len(some) / max(len(taken), 1)
        analysed = sum(o.analysed == "yes" for o in some)
        return f"{len(some)} ({share:.0f} %; analysed {analysed})"

    lines = [
        f"{len(found)} YAMLs, of which Axolotl takes {len(taken)} here. Of these",
        f"{counted('possible')} have a base that trains, merges and verifies",
        f"{counted('accepted')} are accepted as they stand",
        f"{counted('whole')} both",
        f"{counted('in_the_end')} both, after doing what loki says",
        f"Newest bases that train: {len(new)} of {len(newest)}",
        "",
        "What stands in the way:",
    ]
    reasons = Counter(reason(o.why) for o in found if not o.whole)
    lines += [f"{count:4}  {why}" for why, count in reasons.most_common()]
    return "\n".join(lines)


_REASONS = {
    "Axolotl: not tried": "the configuration of the base cannot be read here",
    "Axolotl:": "Axolotl itself refuses it here",
    "routed experts only": "a mixture with routed experts only",
    "PEFT takes an adapter": "a mixture whose targets PEFT takes for routed experts",
    "is quantised with": "a base that is stored quantised, not by bitsandbytes",
    "cannot be analysed": "the model cannot be analysed",
    "is called": "names of `lora_target_modules` that the base does not have",
    "no down-projection": "no down-projection in any layer",
    "gets no gradient": "layers that text alone does not reach",
    "cannot be built": "its class cannot be built here (a package is missing)",
    "cannot be used with loki": "a setting that cannot be used with loki",
    "adapter:": "another kind of adapter",
}


def reason(why: str) -> str:
    """The class of a reason."""
    return next((said for part, said in _REASONS.items() if part in why), why[:100])


if __name__ == "__main__":
    main()
