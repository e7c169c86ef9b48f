"""Records of instruction data to conversations: Alpaca, ShareGPT, OpenAI messages, prompt and completion.

Whatever the format, a conversation is a list of messages as Hugging Face chat templates take them: "role" and
"content", and "tool_calls" with their arguments as objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron.corpora.document import BadRecord
from megatron.corpora.records import kind_of

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bing", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}
# what decides the format; each is also read by it
_SIGNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
}
FIELDS = ("messages", "conversations", "instruction", "input", "output", "prompt", "completion", "system", "tools")


class Flaw(Exception):
    """Why a record is not a conversation; for the user."""


@dataclass(frozen=True)
class RecordPlace:
    """Where a record stands: as in `BadRecord`."""

    file: str
    line: int
    byte: int | None
    content: bytes


@dataclass
class Conversation:
    """Messages in order, the tools that the assistant may call, and the numbers of the messages to be learned."""

    id: str
    messages: list[dict[str, Any]]
    tools: list[Any] | None
    place: RecordPlace
    learned: frozenset[int] = field(default_factory=frozenset)
    language: str = ""
    source: str = ""
    licence: str = ""

    def bad(self, reason: str) -> BadRecord:
        """The record as one that cannot be used."""
        return BadRecord(self.place.file, self.place.line, self.place.byte, reason, self.place.content)


def conversation_of(record: dict[str, Any], chat_format: str) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Messages and tools of a record in a format, or in the one that it shows ("auto"). Raises Flaw.

    The messages are what `transformers` hands to a template: keys whose value is null are left out. Contents are
    strings: text parts of a message are joined.
    """
    name = format_of(record) if chat_format == "auto" else chat_format
    missing = [key for key in _SIGNS[name] if key not in record]
    if missing:
        raise Flaw(f"field {missing[0]!r} is missing, which the format {name} needs ({_fields_of(record)})")
    messages = _READERS[name](record)
    if isinstance(system := record.get("system"), str) and system and not _has_system(messages):
        messages.insert(0, {"role": "system", "content": system})
    _check(messages)
    return messages, _tools(record.get("tools"))


def format_of(record: dict[str, Any]) -> str:
    """The one format that a record shows. Raises Flaw where it shows none, or two."""
    shown = [name for name, signs in _SIGNS.items() if all(record.get(sign) is not None for sign in signs)]
    if not shown:
        wanted = "; ".join(f"{name}: {' and '.join(signs)}" for name, signs in _SIGNS.items())
        raise Flaw(f"no chat format has these fields ({_fields_of(record)}): one of them is expected: {wanted}")
    if len(shown) > 1:
        raise Flaw(f"the record can be read as {' and as '.join(shown)}: name the one that is meant by --chat-format")
    return shown[0]


def learned_messages(messages: list[dict[str, Any]]) -> frozenset[int]:
    """Numbers of the assistant's messages, without those whose "weight" is 0 (OpenAI's fine-tuning format).

    Raises Flaw where none is left, or one has nothing to learn.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise Flaw("no message is the assistant's: there is nothing to learn")
    learned = [number for number in turns if _weight(messages[number], number)]
    if not learned:
        raise Flaw("every message of the assistant has weight 0: there is nothing to learn")
    for number in learned:
        message = messages[number]
        said = any(str(message.get(key) or "").strip() for key in ("content", "reasoning_content", "thinking"))
        if not said and not message.get("tool_calls"):
            raise Flaw(f"a message of the assistant is empty (message {number}): there is nothing to learn")
    return frozenset(learned)


def _weight(message: dict[str, Any], number: int) -> bool:
    weight = message.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise Flaw(f"weight {weight!r} is unknown (message {number}): 0, not learned, and 1 are known")
    return bool(weight)


def _check(messages: list[dict[str, Any]]) -> None:
    if not messages:
        raise Flaw("the conversation has no message")
    for number, message in enumerate(messages):
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise Flaw(f"a message has no content (message {number}, {message['role']})")
        if content is not None and not isinstance(content, str):
            raise Flaw(
                f"content: a string is expected, this is {kind_of(content)} (message {number}, {message['role']})"
            )


def _has_system(messages: list[dict[str, Any]]) -> bool:
    return bool(messages) and messages[0]["role"] in ("system", "developer")


def _fields_of(record: dict[str, Any]) -> str:
    return f"fields: {', '.join(map(repr, list(record)[:8])) or 'none'}"


def _string(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise Flaw(f"field {key!r}: a string is expected, this is {kind_of(value)}")
    return value


def _alpaca(record: dict[str, Any]) -> list[dict[str, Any]]:
    instruction, answer = _string(record, "instruction"), _string(record, "output")
    more = _string(record, "input") if record.get("input") is not None else ""
    if not instruction.strip():
        raise Flaw("field 'instruction' is empty")
    question = {"role": "user", "content": f"{instruction}\n\n{more}" if more else instruction}
    # the published prompt has a place of its own for the input: the template "alpaca" reads these
    question |= {"instruction": instruction, "input": more}
    return [question, {"role": "assistant", "content": answer}]


def _sharegpt(record: dict[str, Any]) -> list[dict[str, Any]]:
    turns = record["conversations"]
    if not isinstance(turns, list):
        raise Flaw(f"field 'conversations': a list is expected, this is {kind_of(turns)}")
    if turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return _list_of_messages(turns, "conversations")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") is None or "value" not in turn:
            raise Flaw(f"an object with 'from' and 'value' is expected (conversations, turn {number})")
        name, value = turn["from"], turn["value"]
        if not isinstance(name, str) or (role := SHAREGPT_ROLES.get(name)) is None:
            raise Flaw(
                f"from {name!r} is unknown (conversations, turn {number}): {', '.join(SHAREGPT_ROLES)} are known"
            )
        if not isinstance(value, str):
            raise Flaw(f"value: a string is expected, this is {kind_of(value)} (conversations, turn {number})")
        message: dict[str, Any] = {"role": role, "content": value}
        if name == "function_call":
            message = {
                "role": role,
                "tool_calls": _calls(_parsed(value, f"a function_call (turn {number})"), f"turn {number}"),
            }
        if turn.get("weight") is not None:
            message["weight"] = turn["weight"]
        messages.append(message)
    return messages


def _messages(record: dict[str, Any]) -> list[dict[str, Any]]:
    return _list_of_messages(record["messages"], "messages")


def _prompt_completion(record: dict[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[key]
        if isinstance(value, list):
            messages += _list_of_messages(value, key)
        elif isinstance(value, str):
            messages.append({"role": role, "content": value})
        else:
            raise Flaw(f"field {key!r}: a string or a list of messages is expected, this is {kind_of(value)}")
    asked = len(record["prompt"]) if isinstance(record["prompt"], list) else 1
    for message in messages[:asked]:
        if message["role"] == "assistant":
            message.setdefault("weight", 0)  # only the completion is learned
    return messages


def _list_of_messages(value: object, field_name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Flaw(f"field {field_name!r}: a list of messages is expected, this is {kind_of(value)}")
    return [_message(item, number) for number, item in enumerate(value)]


def _message(item: object, number: int) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise Flaw(f"an object is expected, this is {kind_of(item)} (message {number})")
    message = {key: value for key, value in item.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Flaw(f"role {role!r} is unknown (message {number}): {', '.join(ROLES)} are known")
    if role == "function":
        message["role"] = "tool"
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], number)
    call = message.pop("function_call", None)  # before tool_calls, OpenAI's messages had this
    calls = message.get("tool_calls") or ([call] if call else [])
    if calls:
        message["tool_calls"] = _calls(calls, f"message {number}")
    else:
        message.pop("tool_calls", None)
    return message


def _joined(parts: list[Any], number: int) -> str:
    """Parts of a message's content as one text."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise Flaw(
                f"a content part of type {kind!r} (message {number}): only text is trained on, leave the record out"
            )
        texts.append(text)
    return "".join(texts)


def _calls(value: object, where: str) -> list[dict[str, Any]]:
    """Tool calls as templates take them: {"type": "function", "function": {"name", "arguments": an object}}."""
    calls = value if isinstance(value, list) else [value]
    found = []
    for call in calls:
        if not isinstance(call, dict):
            raise Flaw(f"a tool call is an object, this is {kind_of(call)} ({where})")
        inner = call.get("function", call)
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise Flaw(f"a tool call has no name ({where})")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"arguments of a tool call ({where})")
        function = {"name": inner["name"], "arguments": arguments}
        kept = {key: item for key, item in call.items() if key == "id" and item is not None}
        found.append({**kept, "type": "function", "function": function})
    return found


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Flaw(f"{where} is not JSON: {text[:80]!r}") from None


def _tools(value: object) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "the field 'tools'")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise Flaw(f"field 'tools': a list of JSON schemas is expected, this is {kind_of(value)}")
    return value


_READERS: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt-completion": _prompt_completion,
}
