"""Dialogues as people store them, in the form that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# As Axolotl maps them where `roles` says nothing.
_SPEAKERS = {"human": "user", "gpt": "assistant"}
ROLES: tuple[str, ...] = ("system", "developer", "user", "assistant", "tool")
# Each of them says something; a message without `content` needs one.
CALLS = ("tool_calls", "function_call")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# What training makes of a message is no part of what it says.
_TRAINING = ("train", "training", "training_detail", "weight")
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Spelling:
    """How a data set spells its messages, as in Axolotl's `datasets:`.

    Attributes:
        message_property_mappings: the template's names to the data's; None: `role` and `content`,
            or `from` and `value`.
        roles: the template's roles to the data's; None: `human` is a user, `gpt` an assistant.
    """

    message_property_mappings: Mapping[str, str] | None = None
    roles: Mapping[str, list[str]] | None = None


def messages_of(
    given: Any, where: str, spelling: Spelling | None = None, system: Any = None
) -> list[dict[str, Any]]:
    """Messages with `role` and `content` (and `tool_calls`, ...), without what is null.

    Args:
        given: a list of messages, or one stored as JSON.
        system: what stands in a column of its own; it goes before a first turn that is no system's.

    Raises:
        ValueError: what cannot be read, with the number of its message; messages count from 1.
    """
    spelling = spelling or Spelling()
    given = _decoded(_without_null(given), "messages", where)
    if not isinstance(given, list | tuple) or not given:
        raise ValueError(
            f"{where}: `messages` must be a list of {_expected(spelling)}, got {given!r}"
        )
    found = [_message(m, f"{where}: message {i}", spelling) for i, m in enumerate(given, 1)]
    if system is not None:
        if not isinstance(system, str):
            raise ValueError(f"{where}: `system` must be a text, got {system!r}")
        if found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": system})
        elif found[0]["content"] != system:
            raise ValueError(
                f"{where}: `system` and the first message are two different system messages; keep"
                " one of them"
            )
    if not any(m["role"] == "user" and m["content"].strip() for m in found):
        raise ValueError(f"{where}: `messages` holds nothing that a user says")
    return found


def tools_of(given: Any, where: str) -> list[dict[str, Any]] | None:
    """The functions that a dialogue may call; None where there is none.

    Raises:
        ValueError: no list of JSON objects.
    """
    given = _decoded(_without_null(given), "tools", where)
    if not isinstance(given, list | tuple):
        raise ValueError(f"{where}: `tools` must be a list of functions, got {given!r}")
    found = []
    for i, tool in enumerate(given, 1):
        tool = _decoded(tool, f"tools[{i}]", where)
        if not isinstance(tool, dict):
            raise ValueError(f"{where}: `tools` must be a list of functions, got {tool!r} in it")
        function = tool.get("function")
        if isinstance(function, dict) and isinstance(function.get("parameters"), str):
            said = _decoded(function["parameters"], "parameters", where)
            tool["function"] = {**function, "parameters": said}
        found.append(tool)
    return found or None


def _without_null(value: Any) -> Any:
    """Without keys that hold null, as Axolotl reads: tables give every row the keys of all rows."""
    if isinstance(value, dict):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list | tuple) else value


def _message(given: Any, where: str, spelling: Spelling) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: must be {_expected(spelling)}, got {given!r}")
    own = {k: v for k, v in given.items() if v is not None}
    names = spelling.message_property_mappings
    if names is None:
        names = {
            "role": "from" if "from" in given and "role" not in given else "role",
            "content": "value" if "value" in given and "content" not in given else "content",
        }
    names = {"role": "role", "content": "content", **names}
    said = {k: v for k, v in own.items() if k not in names.values() and k not in _TRAINING}
    said |= {ours: own[theirs] for ours, theirs in names.items() if theirs in own}
    if "role" not in said:
        raise ValueError(f"{where}: must be {_expected(spelling)}, got {given!r}")
    said["role"] = _role(said["role"], where, spelling)
    said |= {key: _text(said[key], key, where) for key in THOUGHTS if key in said}
    for key in CALLS:
        if key in said:
            said[key] = _calls(said[key], key, where)
            if not said[key]:
                del said[key]
    if "content" in said:
        said["content"] = _text(said["content"], "content", where)
    elif any(key in said for key in CALLS):
        said["content"] = ""
    else:
        raise ValueError(
            f'{where}: has neither a `{names["content"]}` nor `tool_calls`; give its text, "" for'
            " an empty one"
        )
    return said


def _expected(spelling: Spelling) -> str:
    names = spelling.message_property_mappings
    if names is None:
        return "{'role': ..., 'content': text} or {'from': ..., 'value': text}"
    given = {"role": "role", "content": "content", **names}
    return f"{{'{given['role']}': ..., '{given['content']}': text}}"


def _role(given: Any, where: str, spelling: Spelling) -> str:
    known, speakers = ROLES, _SPEAKERS
    if spelling.roles is not None:
        known = (*ROLES, *spelling.roles)
        speakers = {theirs: ours for ours, all_ in spelling.roles.items() for theirs in all_}
    role = speakers.get(given, given) if isinstance(given, str) else None
    if role not in known:
        raise ValueError(
            f"{where}: the role {given!r} is not known; known: {', '.join((*known, *speakers))}."
            f" Say whose it is, e.g. `roles: {{tool: [{given}]}}`, as in Axolotl's `datasets:`"
        )
    return role


def _text(given: Any, key: str, where: str) -> str:
    """A text, or parts of one, joined without anything between them as Axolotl joins them."""
    if not isinstance(given, list):
        if not isinstance(given, str):
            raise ValueError(
                f"{where}: `{key}` must be a text or a list of parts"
                f" {{'type': 'text', 'text': ...}}, got {given!r}"
            )
        return given
    texts = []
    for part in given:
        text = None
        if isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS:
            text = next((part[k] for k in ("text", "content", "value") if k in part), None)
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: a part of `{key}` is no text, and only parts {{'type': 'text', 'text':"
                f" ...}} can be read; got {part!r}"
            )
        texts.append(text)
    return "".join(texts)


def _calls(given: Any, key: str, where: str) -> Any:
    """Calls with arguments that are objects: templates write them as JSON themselves."""
    found = _decoded(given, key, where)
    calls = found if key == "tool_calls" else [found]
    if not isinstance(calls, list) or not all(isinstance(c, dict) for c in calls):
        raise ValueError(
            f"{where}: `{key}` must be a list of calls {{'function': {{'name': ..., 'arguments':"
            f" ...}}}}, got {given!r}"
        )
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: a call in `{key}` has no `name` of its function: {call!r}")
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _decoded(function["arguments"], "arguments", where) or {}
    return found


def _decoded(given: Any, key: str, where: str) -> Any:
    """What is stored as JSON, as what it is."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given) if given.strip() else []
    except ValueError as error:
        raise ValueError(f"{where}: `{key}` is a text and not JSON ({error}): {given!r}") from error
