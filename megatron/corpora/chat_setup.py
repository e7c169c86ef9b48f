"""From what is asked of chat records to templates that are proved to work, before any record is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError, DataError
from megatron.corpora.chat_builtin_templates import BUILTIN
from megatron.corpora.chat_options import ChatOptions, ChatSetup, TemplateSource
from megatron.corpora.chat_records import Conversation, Flaw, RecordPlace, learned_messages
from megatron.corpora.chat_targets import rendered
from megatron.corpora.chat_template_files import TOOL_USE, found_templates, special_names, stated_names
from megatron.corpora.chat_templates import ChatTemplate
from megatron.tokenizers.base import Tokenizer, looks_like_marker


def prepare_chat(options: ChatOptions, tokenizer: Tokenizer) -> ChatSetup:
    """Find the template and prove that it works, before any record is read.

    Raises ConfigError where there is none, or several and none is named; DataError where it is no Jinja, renders
    nothing, or puts the loss on no token.
    """
    texts = _texts(options, tokenizer)
    variables: dict[str, Any] = {**special_names(tokenizer), **options.given_variables()}
    name = options.name or ("default" if "default" in texts else next(iter(texts)) if len(texts) == 1 else "")
    if name not in texts:
        problem = f"no chat template is called {name!r}" if name else "there are several chat templates"
        raise ConfigError(
            f"{_where(options, tokenizer)}: {problem}: name one of {', '.join(sorted(texts))} by --chat-template-name"
        )
    sources = {key: TemplateSource(text, origin, variables, options.date) for key, (text, origin) in texts.items()}
    template = ChatTemplate(sources[name], tokenizer.special_ids)
    _prove(template)
    tool_use = sources.get(TOOL_USE) if not options.name and name != TOOL_USE else None
    if tool_use is not None:
        ChatTemplate(tool_use, tokenizer.special_ids)
    notes = tuple(_notes(template, tokenizer))
    return ChatSetup(sources[name], tool_use, template.has_generation, options.max_tokens, options.too_long, notes)


def _where(options: ChatOptions, tokenizer: Tokenizer) -> str:
    return options.template or str(next((path.parent for path in tokenizer.files()), tokenizer.name))


def _texts(options: ChatOptions, tokenizer: Tokenizer) -> Mapping[str, tuple[str, str]]:
    if options.template in BUILTIN:
        return {"default": (BUILTIN[options.template], f"built-in {options.template}")}
    place = Path(options.template) if options.template else next((path.parent for path in tokenizer.files()), None)
    texts = found_templates(place) if place is not None else {}
    if not texts:
        said = "no chat template is beside the tokenizer" if not options.template else "no chat template is there"
        raise ConfigError(
            f"{place or tokenizer.name}: {said} (chat_template.jinja, or chat_template in tokenizer_config.json): give "
            f"--chat-template {'|'.join(BUILTIN)}, or a file"
        )
    return texts


def _prove(template: ChatTemplate) -> None:
    """Render a small conversation. Raises DataError where no form of it gives a text with a loss on some of it."""
    user, answer = {"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four."}
    forms = ([user, answer], [{"role": "system", "content": "count"}, user, answer])
    reasons = []
    for messages in forms:
        chat = Conversation("", list(messages), None, RecordPlace("", 1, None, b""), learned_messages(messages))
        try:
            found = rendered(template, chat)
        except Flaw as flaw:
            reasons.append(str(flaw))
            continue
        learned = "".join(segment.text for segment in found.segments if segment.learned)
        if "four" in learned.lower():
            return
        what = f"{learned.strip()!r}, without the answer" if learned.strip() else "white space only"
        reasons.append(f"the chat template puts the loss on {what}")
    raise DataError(
        f"{template.source.origin}: {reasons[0]}: this was a question and an answer of a few words. Correct the "
        "template, or choose another with --chat-template"
    )


def _notes(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    notes = []
    known = tokenizer.special_ids
    missing = [word for word in stated_names(template.source.text) if looks_like_marker(word) and word not in known]
    if missing:
        notes.append(
            f"the chat template writes {', '.join(missing)}, which {tokenizer.name} has no token for: it is text like "
            "any other, and a message that has the same words cannot be told from it"
        )
    return notes
