"""What our section of a model card says: the words of the page, as Markdown."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from ..implanting import card
from ..implanting.merge import MergeReport
from ..implanting.rounded import ORIGINAL
from ..implanting.saved import FAILED_NAME, PICTURE_NAME
from ..implanting.verify import VerifyReport
from ..model.writing import write_text
from ..rows import FILE_NAME as ROWS_NAME
from ..rows import RowSelection
from . import telling
from .drawing.forgetting import forgetting_figure
from .drawing.style import svg_file
from .page import read_report
from .telling import Report, Section

LOG = logging.getLogger("loki_plugin")
METHOD = "Fine-tuned with LoKI (Low-damage Knowledge Implanting)"
_EACH, _TOGETHER = "of every layer's down-projection", "of all down-projections together"
_LEAST, _MOST = (
    f"only those rows train that contribute {much} to what the model knows in general"
    for much in ("least", "most")
)
_TRAINS = {
    "layer_balanced": f"{_EACH} {_LEAST}",
    "layer_highest": f"{_EACH} {_MOST}",
    "global_lowest": f"{_TOGETHER} {_LEAST}",
    "global_highest": f"{_TOGETHER} {_MOST}",
    "random": f"{_EACH} only rows train that were drawn at random",
}
_UNSEEN = "; nothing was analysed"
_GIVEN = f"{_EACH} only the rows train that are listed in `{ROWS_NAME}`"
_AUTO, _WHOLE = "AutoModelForCausalLM", "ForConditionalGeneration"
_LOAD = {
    "adapter": (
        "from peft import PeftModel",
        "model = {kind}.from_pretrained({base})",
        "model = PeftModel.from_pretrained(model, {folder})",
    ),
    "merged": (
        "from transformers import {kind}, AutoTokenizer",
        "model = {kind}.from_pretrained({folder})",
        "tokenizer = AutoTokenizer.from_pretrained({folder})",
    ),
}


def write_adapter_card(folder: Path) -> None:
    """Write the card of a finished run from its report and its rows file.

    What goes wrong is said and raises nothing: the adapter is saved by now.
    """
    try:
        report, selection = read_report(folder), RowSelection.load(folder / ROWS_NAME)
        found = telling.verdict(report, (folder / FAILED_NAME).exists())
        text = _section(report, selection, _said(found), [], "adapter", folder)
        card.put(folder, text, _fields(report.get("base_model"), "peft"))
    except (OSError, ValueError) as error:
        LOG.warning("loki: the model card in %s could not be written: %s", folder, error)


def write_merged_card(
    base: str,
    adapters: list[Path],
    merged: MergeReport,
    proof: VerifyReport,
    onto: str = ORIGINAL,
) -> None:
    """Write the card of a merged model, from what was merged and the report beside its adapter.

    The reports of several adapters are about one adapter each, so that none of them is told.

    Args:
        onto: the base that it was compared with, as in `merge_run`.
    """
    folder = merged.output
    try:
        report = read_report(adapters[0]) if len(adapters) == 1 else {}
        selection = RowSelection.load(folder / ROWS_NAME)
        report = {**report, "base_model": base}
        rounding = merged.rounding
        rows: list[tuple[str, Any]] = [
            ("Merged", f"{merged.rows:,} rows of {merged.layers} layers"),
            ("Further linears", f"{merged.linears} merged whole" if merged.linears else None),
            ("Adapters", len(adapters) if len(adapters) > 1 else None),
            ("Rounded away", f"{100 * rounding.lost_share:.1f} % of the update ({merged.dtype})"),
            ("Compared", f"{proof.compared} tensors with the base, byte by byte"),
        ]
        section: Section = {"title": "The merge", "rows": rows}
        said = f"**Verified:** nothing outside {telling.which_rows(selection)}"
        said += " and the targeted linears" if merged.linears else ""
        said += " and new tokens" if merged.new_tokens else ""
        said += " has changed"
        if onto != ORIGINAL:
            said += (
                f" of `{plain(merged.output.name)}-base`, the base as the run's quantisation holds"
                f" it. From {plain(base)} itself every quantised weight differs by that rounding"
            )
        text = _section(report, selection, f"{said}.", [section], "merged", folder)
        card.put(folder, text, _fields(base, "transformers"))
    except (OSError, ValueError) as error:
        LOG.warning("loki: the model card in %s could not be written: %s", folder, error)


def _fields(base: Any, library: str) -> dict[str, Any]:
    known = {"base_model": str(base)} if base else {}
    return {**known, "library_name": library, "tags": ["loki"]}


def _said(verdict: dict[str, Any]) -> str:
    faults = "".join(f"\n- {plain(fault)}" for fault in verdict["faults"])
    return f"**{verdict['title']}:** {verdict['text']}" + (f"\n{faults}" if faults else "")


def _section(
    report: Report,
    selection: RowSelection,
    verdict: str,
    more: list[Section],
    kind: str,
    folder: Path,
) -> str:
    linears = len(selection.linears)
    method = _method(report, selection)
    also = f"; {linears} further linear layers trained a LoRA" if linears else ""
    parts = ["## LoKI", f"{method}{also}.", verdict]
    for section in [*more, *telling.sections(report, selection)]:
        if kind == "merged" and section["title"] == "The proof":
            continue  # that of the adapter
        rows = [(k, v) for k, v in section["rows"] if v not in (None, "")]
        table = "\n".join(f"| {plain(k)} | {plain(v)} |" for k, v in rows)
        parts.append(f"### {section['title']}\n\n| | |\n|---|---|\n{table}")
    parts += _picture(report, folder)
    lines = list(_LOAD[kind])
    if kind == "adapter":
        lines[0] = f"{lines[0]}; from transformers import {{kind}}"
    names = {"base": _quoted(report.get("base_model") or "BASE"), "folder": _quoted(folder.name)}
    names["kind"] = _loader(report)
    parts.append("### How to load\n\n```python\n" + "\n".join(lines).format(**names) + "\n```")
    if kind == "adapter" and names["kind"] != _AUTO:
        parts.append(
            f"The adapter has the names of modules of `{names['kind']}`. What loads the text model"
            " alone needs them as `loki export ADAPTER OUT --names text` writes them."
        )
    return "\n\n".join(parts)


def _method(report: Report, selection: RowSelection) -> str:
    """What trained, as the rows file has it: whose rows were chosen how, or all of them."""
    if not any(selection.counts):
        return "Fine-tuned with LoKI's protection of inputs" if report.get("protection") else METHOD
    made = selection.made
    if telling.has_all_rows(selection.counts, selection.hidden_size):
        unseen = "strategy" in made and not made.keys() & {"analysis", "scores"}
        return f"{METHOD}: {_EACH} all rows train{_UNSEEN if unseen else ''}"
    # Of adapters that were merged at once each has its own record.
    ways = {str(part.get("strategy")) for part in made.get("parts") or [made]}
    way = ways.pop() if len(ways) == 1 else ""
    if way not in _TRAINS:
        return f"{METHOD}: {_GIVEN}"
    but = ", without those that were excluded" if made.get("exclude") else ""
    return f"{METHOD}: {_TRAINS[way]}{but}{_UNSEEN if way == 'random' else ''}"


def _picture(report: Report, folder: Path) -> list[str]:
    """Forgetting along the run as a picture in `folder`, and the Markdown that shows it.

    Nothing, and no picture of an earlier run, where no evaluation has measured it.
    """
    (folder / PICTURE_NAME).unlink(missing_ok=True)
    found = report.get("forgetting_while_training") or {}
    path = [e for e in found.get("path") or () if e.get("kl") is not None]
    if not path:
        return []
    loss = [e["loss"] if e.get("loss") is not None else math.nan for e in path]
    stopped = found.get("stopped") or {}
    limit = stopped.get("threshold")
    try:
        figure = forgetting_figure([e["step"] for e in path], [e["kl"] for e in path], loss, limit)
        write_text(folder / PICTURE_NAME, svg_file(figure, PICTURE_NAME))
    except Exception as error:  # a picture must not cost the card, whatever is wrong with it
        LOG.warning("loki: %s could not be drawn: %s", folder / PICTURE_NAME, error)
        return []
    texts = f"{found.get('prompts')} prompts and {found.get('own_texts')} texts of the model"
    way = [path[0], path[-1]] if len(path) > 1 else path
    told = " to ".join(_point(e) for e in way)
    alt = f"KL to the base while it trained, nats per token: {told}"
    parts = [
        "### Forgetting while it trained",
        f"![{plain(alt)}]({PICTURE_NAME})",
        f"{alt}. Measured at every evaluation on {texts} that were held back: another figure than"
        " that above.",
    ]
    if limit is not None:
        saved = stopped.get("saved")
        kept = f"what is saved is {saved}, with {stopped['saved_kl']:.4f}" if saved else ""
        parts.append(
            f"The training stopped above {limit:g} nats (dashed);"
            f" {kept or 'no checkpoint under that was kept'}."
        )
    return ["\n\n".join(parts)]


def _point(evaluation: dict[str, Any]) -> str:
    loss = evaluation.get("loss")
    more = "" if loss is None else f" (evaluation loss {loss:.4f})"
    return f"{evaluation['kl']:.4f} at step {evaluation['step']}{more}"


def _loader(report: Report) -> str:
    """The class that loads the base: by name where the automatic one leads elsewhere, or nowhere,
    because the whole of a model for images or sound and text was trained."""
    import transformers

    fits = str(report.get("adapter_fits") or "")
    return fits if fits.endswith(_WHOLE) and hasattr(transformers, fits) else _AUTO


def _quoted(value: Any) -> str:
    return json.dumps(str(value), ensure_ascii=False).replace("<", "\\u003c").replace("`", "\\x60")


def plain(value: Any) -> str:
    """Text that Markdown shows as it is, in one line of a table."""
    text = " ".join(str(value).split())
    return "".join(f"&#{ord(c)};" if c in "&<>|`*[]\\" else c for c in text)
