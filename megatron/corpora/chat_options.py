"""What is asked of chat records, and what comes of it: templates with their variables. Renders nothing itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from megatron.config.errors import ConfigError

TooLong = Literal["truncate", "drop", "error"]


@dataclass(frozen=True)
class ChatOptions:
    """What a user asks. Raises ConfigError for what cannot be.

    template: a built-in name, a file or folder, or "" for the tokenizer's own. name: of one among several. variables:
    options of the template, a JSON object. date: what strftime_now tells. max_tokens: of a conversation with its
    end-of-document token, None for no limit. too_long: what becomes of longer ones.
    """

    template: str = ""
    name: str = ""
    variables: str = ""
    date: str = ""
    max_tokens: int | None = None
    too_long: TooLong = "error"

    def __post_init__(self) -> None:
        if self.too_long not in ("truncate", "drop", "error"):
            raise ConfigError(f"too_long = {self.too_long!r}: one of truncate, drop, error")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ConfigError(
                f"max_tokens = {self.max_tokens}: at least 2 are needed: one, and the end of the document"
            )
        try:
            datetime.fromisoformat(self.date or "2000-01-01")
        except ValueError:
            raise ConfigError(
                f"chat_date = {self.date!r}: give YYYY-MM-DD, or with a time YYYY-MM-DDTHH:MM:SS"
            ) from None
        self.given_variables()

    def given_variables(self) -> dict[str, Any]:
        """The template's options by name. Raises ConfigError."""
        try:
            given = json.loads(self.variables or "{}")
        except ValueError as error:
            raise ConfigError(f"chat_template_options = {self.variables!r}: not JSON ({error})") from None
        if not isinstance(given, dict):
            raise ConfigError(
                f'chat_template_options = {self.variables!r}: an object is expected, such as {{"a": true}}'
            )
        return given


@dataclass(frozen=True)
class TemplateSource:
    """A template before it is compiled, as processes hand it to each other.

    origin: where it is from, for people. variables: what it is given beside the conversation: names of special tokens
    ("bos_token": "<s>"), and options of its own. now: what `strftime_now` tells, ISO date and time, "" where it must
    not be asked.
    """

    text: str
    origin: str
    variables: Mapping[str, Any] = field(default_factory=dict)
    now: str = ""


@dataclass(frozen=True)
class ChatSetup:
    """Templates that are ready for work: what a worker needs. `tool_use` is for records that have tools.

    notes: for the user, about what is not wrong and easily not meant.
    """

    template: TemplateSource
    tool_use: TemplateSource | None
    generation: bool
    max_tokens: int | None
    too_long: TooLong
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Everything here that decides the output, for work plan and manifest."""
        described = {
            "template": _described(self.template),
            "loss_from": "generation blocks of the template" if self.generation else "what the assistant's turn adds",
            "max_tokens": self.max_tokens,
            "too_long": self.too_long if self.max_tokens is not None else None,
            "notes": list(self.notes),
        }
        return described | ({"tool_use_template": _described(self.tool_use)} if self.tool_use else {})


def _described(source: TemplateSource) -> dict[str, Any]:
    return {
        "origin": source.origin,
        "sha256": hashlib.sha256(source.text.encode()).hexdigest(),
        "text": source.text,
        "variables": dict(source.variables),
        "date": source.now,
    }
