"""Chat records on a command line: `add_chat_arguments(parser)`, then `with_chat(read_options(args), args)`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from megatron.config.errors import ConfigError
from megatron.corpora.chat_builtin_templates import BUILTIN
from megatron.corpora.chat_options import ChatOptions
from megatron.corpora.read_options import ReadOptions

_GIVEN = {
    "chat_format": "auto",
    "chat_template": "",
    "chat_template_name": "",
    "chat_template_options": "",
    "chat_date": "",
    "max_tokens": None,
    "too_long": "error",
}


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that `with_chat` reads, in a group of their own."""
    group = parser.add_argument_group("conversations (--format chat): the loss is on the assistant's part only")
    add = group.add_argument
    add(
        "--format",
        dest="records",
        choices=("text", "chat"),
        default="text",
        help="text: documents; chat: conversations through a chat template, with a loss mask in P.mask (default: text)",
    )
    add(
        "--chat-format",
        choices=("auto", "alpaca", "sharegpt", "messages", "prompt-completion"),
        default="auto",
        help="of the records (default: auto, by each record's fields)",
    )
    add(
        "--chat-template",
        default="",
        metavar="T",
        help=f"{', '.join(BUILTIN)}, a Jinja file, or a folder of a tokenizer (default: the tokenizer's own)",
    )
    add("--chat-template-name", default="", metavar="N", help="which of several templates (default: default)")
    add(
        "--chat-template-options",
        default="",
        metavar="JSON",
        help='what the template is told, such as {"enable_thinking": false}',
    )
    add("--chat-date", default="", metavar="DATE", help="the day that templates write which tell the date: YYYY-MM-DD")
    add("--max-tokens", type=int, metavar="N", help="the longest conversation, its end-of-document token counted")
    add(
        "--too-long",
        choices=("truncate", "drop", "error"),
        default="error",
        help="what becomes of longer ones: cut at N, left out, or bad records as --on-error says (default: error); "
        "the first two are counted in the manifest",
    )


def with_chat(read: ReadOptions, args: argparse.Namespace) -> tuple[ReadOptions, ChatOptions | None]:
    """Reading options, and what is asked of conversations; None where records are texts.

    Raises ConfigError for an option of conversations that was given without `--format chat`.
    """
    if args.records == "text":
        for name, value in _GIVEN.items():
            if getattr(args, name) != value:
                raise ConfigError(f"--{name.replace('_', '-')} is for conversations: give --format chat too")
        return replace(read, chat_format=""), None
    if args.too_long != "error" and args.max_tokens is None:
        raise ConfigError(f"--too-long {args.too_long}: nothing is too long without a limit: give --max-tokens N too")
    options = ChatOptions(
        args.chat_template,
        args.chat_template_name,
        args.chat_template_options,
        args.chat_date,
        args.max_tokens,
        args.too_long,
    )
    return replace(read, chat_format=args.chat_format), options
