"""Dialogues through the tokenizer's own chat template; what it leaves out is an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from .dialogues import CALLS, THOUGHTS

Messages = Sequence[dict[str, Any]]
_THEN = datetime(2025, 1, 1)
_OTHER = "zigzag 7"
_PRINTED = ("'type': 'text'", '"type": "text"')


def chat(tokenizer, said: Sequence[tuple[str, str]], where: str) -> list[int]:
    """`dialogue` for pairs of role and content, whatever the template leaves out of them."""
    messages = [{"role": r, "content": c} for r, c in said]
    return dialogue(tokenizer, messages, where, whole=False)


def dialogue(
    tokenizer,
    messages: Messages,
    where: str,
    tools: Sequence[dict[str, Any]] | None = None,
    answer: bool = True,
    whole: bool = True,
) -> list[int]:
    """Token ids of a dialogue; with `answer` up to where the assistant begins to speak.

    Args:
        tools: the functions that the dialogue may call.
        whole: nothing may be left out.

    Raises:
        ValueError: the chat template refuses the dialogue, which stands at `where`, or leaves a
            part of it out; or it has parts that nothing but a chat template can tell.
    """
    if not getattr(tokenizer, "chat_template", None):
        for key in ("tools",) * bool(tools) + (*CALLS, *THOUGHTS):
            if key == "tools" or any(key in m for m in messages):
                raise ValueError(
                    f"{where}: `{key}` of a dialogue is told by a chat template, and the tokenizer"
                    " has none; set `chat_template` in the YAML, or leave the record out"
                )
        return plain_ids(tokenizer, plain(messages), open_end=answer)

    def rendered(said: Messages, functions: Any = tools, tokenize: bool = False) -> Any:
        # A model that thinks before it answers would open its thoughts alike behind every question;
        # templates that know no such thing do not look at it.
        return tokenizer.apply_chat_template(
            list(said),
            **({"tools": list(functions)} if functions else {}),
            add_generation_prompt=answer,
            tokenize=tokenize,
            return_dict=tokenize,
            enable_thinking=False,
            # Some tell today's date, and prompts must not be others tomorrow.
            strftime_now=_THEN.strftime,
        )

    faults, refused, others = [], [], []
    for said in _ways(messages):
        try:
            text = rendered(said)
        except Exception as error:  # a template is a program of somebody else
            refused.append(f"the chat template refuses the dialogue: {error}")
            continue
        if _is_printed(said, text):
            continue
        left_out = _left_out(tokenizer, said, tools, text, rendered)
        if left_out is None:
            return list(rendered(said, tokenize=True)["input_ids"])
        others.append(said)
        faults.append(
            f"the chat template leaves out {left_out}; take a template that tells it"
            " (`chat_template` in the YAML), or leave it out of the record"
        )
    if others and not whole:
        return list(rendered(others[0], tokenize=True)["input_ids"])
    raise ValueError(f"{where}: {(faults + refused)[0]}")


def _ways(messages: Messages) -> Iterator[list[dict[str, Any]]]:
    """The same dialogue as templates want it; they disagree about calls, and about words.

    Some look for calls where the content is null only, and some print a null as "None". Most write
    arguments as JSON themselves, and some, as DeepSeek's, want them written. Those of many models
    that see look for words in parts alone, and tell a content that is plain text as none.
    """
    yield list(messages)
    if any(map(_calls, messages)):
        for null, written in ((True, False), (False, True), (True, True)):
            yield [_with_calls(m, null, written) if _calls(m) else m for m in messages]
    else:
        yield [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if m["content"] else m
            for m in messages
        ]


def _with_calls(message: dict[str, Any], null: bool, written: bool) -> dict[str, Any]:
    message = json.loads(json.dumps(message))
    if null and not message["content"]:
        message["content"] = None
    for key in (k for k in CALLS if k in message and written):
        for call in message[key] if isinstance(message[key], list) else [message[key]]:
            function = call.get("function", call)
            if not isinstance(function.get("arguments", ""), str):
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return message


def plain(messages: Messages) -> str:
    """Without a template the messages stand one after another, each ended by a line break."""
    return "".join(c if c.endswith("\n") else c + "\n" for c in (m["content"] for m in messages))


def untold_keys(tokenizer, messages: Iterable[dict[str, Any]]) -> set[str]:
    """Keys of messages that the chat template never names."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    told = ("role", "content", *CALLS, *THOUGHTS)
    return {key for m in messages for key in m if key not in told and key not in template}


def _calls(message: dict[str, Any]) -> bool:
    return any(key in message for key in CALLS)


def _words(message: dict[str, Any]) -> str:
    content = message["content"] or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _is_printed(messages: Messages, text: str) -> bool:
    """Whether the template prints parts as Python or JSON does, instead of reading them."""
    parts = [m for m in messages if isinstance(m["content"], list)]
    said = "".join(map(_words, parts))
    return bool(parts) and any(mark in text and mark not in said for mark in _PRINTED)


def _others(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The message without words, which some templates refuse, and with others behind them."""
    for words in ("", f"{_words(message)} {_OTHER}"):
        content = message["content"]
        parts = [{"type": "text", "text": words}]
        yield {**message, "content": words if isinstance(content, str) else parts}


def _left_out(
    tokenizer, messages: Messages, tools: Any, text: str, rendered: Callable[..., str]
) -> str | None:
    """The first part of a dialogue without which the template writes the same, in words.

    A thought that the template knows counts as told: templates drop those of earlier turns, and
    that is how the model was trained.
    """
    template = str(tokenizer.chat_template)

    def same(said: Messages, functions: Any = tools) -> bool:
        try:
            return rendered(said, functions) == text
        except Exception:  # it looked at what is missing
            return False

    if tools and same(messages, None):
        return "`tools`"
    for i, message in enumerate(messages):
        before, after = messages[:i], messages[i + 1 :]
        said = f"message {i + 1} ({message['role']})"
        for key in (k for k in (*CALLS, *THOUGHTS) if k in message):
            without = {k: v for k, v in message.items() if k != key}
            if (key not in THOUGHTS or key not in template) and same([*before, without, *after]):
                return f"`{key}` of {said}"
        content = _words(message).strip()
        # A few letters may stand in the text by chance.
        usual = message["role"] in ("user", "assistant") and not _calls(message)
        if content and not (usual and content in text):
            if any(same([*before, other, *after]) for other in _others(message)):
                return f"the content of {said}"
    return None


def plain_ids(tokenizer, text: str, open_end: bool) -> list[int]:
    """Token ids of a text that no chat template tells.

    Args:
        open_end: the text goes on, so what the tokenizer puts behind every text (the end of it)
            is left out.
    """
    ids = list(tokenizer(text)["input_ids"])
    if not open_end:
        return ids
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for start in reversed(range(len(ids) - len(bare) + 1)):
        if ids[start : start + len(bare)] == bare:
            return ids[: start + len(bare)]
    return ids
