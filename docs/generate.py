"""Writes the pages that are read out of the package: fields, options, commands, Python functions.

    python docs/generate.py

A test fails while a page differs from what this would write.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import loki_plugin
from loki_plugin.args import LokiConfig
from loki_plugin.choices import AUTO
from loki_plugin.cli import loki
from loki_plugin.host import options as tables
from loki_plugin.host.sharding import NOT_WITH_FSDP2, OVERRIDDEN_WITH_FSDP2

HERE = Path(__file__).parent
NOTE = "<!-- Written by docs/generate.py; do not edit. -->\n\n"
INTERNAL = {"form"}
KINDS = {
    int: "integer",
    float: "number",
    Decimal: "number",
    str: "string",
    bool: "true or false",
    NoneType: "null",
}
EXAMPLE = """\
from loki_plugin import attribute, implant, input_directions, select_rows

scores = attribute(model, input_ids, attention_mask)  # [B, L, H]
rows = select_rows(scores, quota=10)  # L tensors of row indices
directions = input_directions(model, input_ids, attention_mask, soft=True)  # L tensors, optional
peft_model = implant(model, rows, protect=directions)
"""
# Sections of a docstring that list names; `Returns` and `Raises` are told as they stand.
LISTS = ("Args:", "Attributes:")


def fields() -> str:
    """Every field of the `loki:` block."""
    parts = [
        NOTE + "# Every field of the `loki:` block\n\n"
        "Read from the model that checks your YAML (`loki_plugin/args.py`, `blocks.py`). An unknown"
        " field is an error. All faults of a block are shown at once.\n\n"
        "The whole block, each field with its default; what you leave out has it too (of `protect`"
        " this is what `auto` stands for):\n\n"
        f"```yaml\n{_full_block()}```\n\n"
        "`quota` may be a decimal such as 2.5; it is exact. `protect` also takes one word:"
        f" `protect: auto`, the default, is `protect: {{{_flow(AUTO)}}}`, and what stands beside"
        " `auto: true` in the block counts; a block without it has only what stands in it;"
        " `protect: off` protects nothing.\n\n"
        "## `loki`\n\n" + _table(LokiConfig)
    ]
    for name, field in LokiConfig.model_fields.items():
        if _is_block(field):
            parts.append(
                f"## `loki.{name}`\n\n{inspect.getdoc(field.annotation)}\n\n"
                + _table(field.annotation)
            )
    return "\n".join(parts)


def _full_block() -> str:
    """The block as YAML with every default."""
    lines = ["loki:"]
    for name, field in LokiConfig.model_fields.items():
        if name in INTERNAL:
            continue
        if _is_block(field):
            lines.append(f"  {name}:")
            lines += [f"    {n}: {_yaml(value)}" for n, value in dict(_default(field)).items()]
        else:
            lines.append(f"  {name}: {_yaml(_default(field))}")
    return "\n".join(lines) + "\n"


def _flow(block: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {_yaml(value)}" for name, value in block.items())


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True)


def _is_block(field: FieldInfo) -> bool:
    return inspect.isclass(field.annotation) and issubclass(field.annotation, BaseModel)


def _table(block: type[BaseModel]) -> str:
    lines = ["| field | type | default | what it does |", "|---|---|---|---|"]
    for name, field in block.model_fields.items():
        if name in INTERNAL:
            continue
        if _is_block(field):
            about = inspect.getdoc(field.annotation)
            row = (f"[`{name}`](#loki{name})", "block", "", about)
        else:
            default = _yaml(_default(field))
            row = (
                f"`{name}`",
                _type(field.annotation, field.metadata),
                f"`{default}`",
                field.description,
            )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def _type(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """A type as a user writes it, with its range."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        more = [m for given in inner[1:] for m in getattr(given, "metadata", [given])]
        return _type(inner[0], [*limits, *more])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(way, () if way is NoneType else limits) for way in inner)
    if origin is list:
        return f"list of {_type(inner[0])}s"
    if origin is dict:
        ways = get_args(inner[1]) if get_origin(inner[1]) in (Union, UnionType) else inner[1:]
        kinds = ("lists" if get_origin(way) is list else "strings" for way in ways)
        return f"mapping of {' or '.join(kinds)}"
    return ", ".join([KINDS[annotation], *(_limit(m) for m in limits if _limit(m))])


def _limit(given: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return "".join(f"{s} {getattr(given, k)}" for k, s in signs.items() if hasattr(given, k))


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def commands() -> str:
    """Every command with its options, as `--help` shows them."""
    parts = [
        NOTE + "# Commands\n\nEach stands as `loki ...` and as `axolotl loki ...`. A mistake ends"
        " with one line and exit code 1; wrong options end with exit code 2.\n"
    ]
    for path, command in sorted(_commands(loki, ("loki",))):
        context = click.Context(command, info_name=" ".join(path), max_content_width=96)
        context.terminal_width = 96
        parts.append(f"## `{' '.join(path)}`\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def _commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[tuple, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        elif command is not None:
            yield (*path, name), command


def python() -> str:
    """The public functions and classes, from their docstrings."""
    parts = [
        NOTE + "# Python\n\nWhat `loki_plugin` offers. Shapes: B prompts in a batch, N prompts in"
        " all, T tokens, L layers, H rows per layer, I inputs, V vocabulary.\n\n"
        "It works with any trainer that takes a PEFT model:\n\n"
        f"```python\n{EXAMPLE}```\n"
    ]
    for name in loki_plugin.__all__:
        what = getattr(loki_plugin, name)
        parts.append(f"## `{name}`\n\n{_signature(name, what)}{_prose(inspect.getdoc(what) or '')}")
        if name == "RowSelection":
            parts += [
                f"### `{name}.{method}`\n\n{_signature(method, getattr(what, method))}"
                f"{_prose(inspect.getdoc(getattr(what, method)) or '')}"
                for method in vars(what)
                if not method.startswith("_") and callable(getattr(what, method))
            ]
    return "\n".join(parts)


def _signature(name: str, what: Callable) -> str:
    if inspect.isclass(what) and name != "RowSelection":
        return ""  # made by Axolotl, not by callers
    arguments = []
    for parameter in inspect.signature(what).parameters.values():
        text = str(parameter.replace(annotation=inspect.Parameter.empty))
        annotation = str(parameter.annotation).replace("torch.Tensor", "Tensor")
        if parameter.annotation is not inspect.Parameter.empty and parameter.name != "self":
            text = text.replace(parameter.name, f"{parameter.name}: {annotation}", 1)
            text = text.replace("=", " = ", 1)
        arguments.append(text)
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.insert(-1, "*")
    arguments = [a for a in arguments if a not in ("self", "cls")]
    one = f"{name}({', '.join(arguments)})"
    if len(one) > 96:
        one = f"{name}(\n" + "".join(f"    {a},\n" for a in arguments) + ")"
    return f"```text\n{one}\n```\n\n"


def _prose(docstring: str) -> str:
    """A docstring of this house as Markdown: sections become bold words, arguments a list."""
    out, section = [], ""
    for line in docstring.splitlines():
        if line.endswith(":") and line[:-1] in ("Args", "Attributes", "Returns", "Raises"):
            section = line
            out += [f"**{line[:-1]}**", ""]
        elif section and line.startswith("    "):
            deeper = line.startswith("     ")
            text = line.strip()
            if section in LISTS and not deeper:
                key, _, rest = text.partition(": ")
                text = f"- `{key}`: {rest}"
            elif section in LISTS:
                text = f"  {text}"
            out.append(text)
        else:
            section = section if not line else ""
            out.append(line)
    # Outside of `code`, an index is an index and no emphasis.
    parts = re.split(r"(`[^`]*`)", "\n".join(out).rstrip() + "\n")
    return "".join(p if p.startswith("`") else p.replace("_", "\\_") for p in parts)


def options() -> str:
    """Axolotl's options that are refused or overridden."""
    said = tables.WHY | dict.fromkeys(("lora_r", "lora_alpha"), "they are set from the rows")
    said |= {
        "lora_target_modules": "they are read as `loki.targets`",
        "lora_target_linear": "`true` is read as `loki.targets: all`; beside named linears it is"
        " not followed",
    }
    now = {**tables.OVERRIDDEN, "lora_r": "the rows", "lora_alpha": "the rows"}
    now["lora_target_modules"] = "the rows and `loki.targets`"
    parts = [
        NOTE + "# Axolotl's options with LoKI\n\n"
        "Read from the tables that check your YAML (`loki_plugin/host/options.py` and"
        " `sharding.py`). All refusals of a YAML are shown at once, before anything is loaded, each"
        " with what to do; what is overridden stands in the log, in the block `loki: settings`."
        " What is not named here goes through to Axolotl as it stands; [Ways to train](ways.md)"
        " says what of it has been run.\n",
        "## Overridden\n\n| key | becomes | for |\n|---|---|---|",
        *(f"| `{key}` | {_becomes(value)} | {said[key]} |" for key, value in sorted(now.items())),
        "",
        "`lora_modules_to_save` is set where the YAML adds tokens, for a check of Axolotl's, and"
        " taken away again before the adapter is made. With `adapter: lora` or `qlora`, `lora_r` is"
        " the rank of the low-rank form.\n",
        "## Overridden under FSDP2\n\n| key | becomes |\n|---|---|",
        *(f"| `{key}` | {text} |" for key, text in OVERRIDDEN_WITH_FSDP2.items()),
        "",
        "## Refused\n\n| key | why | what to do |\n|---|---|---|",
        *(
            f"| `{key}` | {why} | {tables.DO.get(key, tables.REMOVE)} |"
            for key, why in sorted(tables.REFUSED.items())
        ),
        *(
            f"| `plugins: [...{name}]` | {why} | take it out |"
            for name, why in tables.REFUSED_PLUGINS.items()
        ),
        "",
        "## Refused under FSDP2\n\n| key | why, and what to do |\n|---|---|",
        *(f"| `{key}` | {why} |" for key, why in NOT_WITH_FSDP2.items()),
        "",
        "Values of `rl`, `optimizer`, `deepspeed`, `fsdp_config`, `lr_groups`, `nf4_backend`,"
        " `context_parallel_size` and `tensor_parallel_size` that cannot be used are refused with a"
        " line of their own.",
    ]
    return "\n".join(parts) + "\n"


def _becomes(value: Any) -> str:
    if isinstance(value, str):
        return f"set from {value}"
    return "not set" if value is None else f"`{_yaml(value)}`"


PAGES: dict[str, Callable[[], str]] = {
    "fields.md": fields,
    "options.md": options,
    "commands.md": commands,
    "python.md": python,
}

if __name__ == "__main__":
    for name, write in PAGES.items():
        (HERE / name).write_text(write(), encoding="utf-8")
        print(f"docs/{name}")
