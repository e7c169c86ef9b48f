"""A conversation through a template: its text in segments, each special or text, and learned or not.

Learned are the assistant's content and its end-of-turn token. Where the template marks them with {% generation %}, they
are what it marks. Elsewhere they are what the conversation has with the assistant's turn and does not have without it:
from the end of the generation prompt to the first special token behind the content, or, where none follows, to the last
character that is not white space.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron.corpora.chat_records import Conversation, Flaw
from megatron.corpora.chat_templates import ChatTemplate, Marks, RenderingFailed
from megatron.tokenizers.continuation import Place

_KEPT = ("role", "name", "type", "id", "tool_call_id", "weight")


class Segment(NamedTuple):
    """A special token (`special` is its id, `text` its name) or a text (`special` is -1), and whether it is learned."""

    text: str
    special: int
    learned: bool
    place: Place


@dataclass(frozen=True)
class RenderedChat:
    """A conversation's text, as transformers renders it too, and the same in segments.

    ends_open: the last segment is learned and no special token: the end of the document is then its end of turn.
    unseen: messages whose content the template did not write.
    """

    text: str
    segments: tuple[Segment, ...]
    ends_open: bool
    unseen: int


def rendered(template: ChatTemplate, chat: Conversation) -> RenderedChat:
    """The conversation in segments. No segment is learned in part, so that no token can be either.

    Raises Flaw where the template refuses the conversation, puts the loss on nothing of it, leaves out tool calls, or
    cannot say which part is the assistant's.
    """
    _refuse_what_is_lost(template, chat)
    marks = _free_marks(template, chat)

    def render(messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        return template.marked(messages, chat.tools, marks, prompt)

    try:
        whole = render(chat.messages)
        plain = template.plain(chat.messages, chat.tools)
        if marks.restore(whole) != plain:
            raise Flaw(
                "the chat template compares or takes apart special tokens of its own text, so that they cannot be told "
                "from what messages say: rewrite that part of the template"
            )
        settle = _settled(template, chat, marks, whole)
        text, spans = _without_generation(settle(whole), marks)
        if template.has_generation:
            spans = _of_learned(chat, spans)
        else:
            spans = [
                span
                for number in sorted(chat.learned)
                if (span := _added_by(chat, number, text, marks, lambda *given: settle(render(*given))))
            ]
    except RenderingFailed as error:
        raise Flaw(str(error)) from None
    spans = [(begin, end) for begin, end in spans if end > begin]
    if not text.strip():
        raise Flaw("the chat template renders nothing of the conversation")
    if not spans:
        raise Flaw("the chat template puts the loss on no token of the conversation")
    segments = _cut(text, spans, marks)
    last = segments[-1]
    unseen = sum(any(said.strip() not in plain for said in _said(message)) for message in chat.messages)
    return RenderedChat(plain, segments, last.learned and last.special < 0, unseen)


def _said(message: dict[str, Any]) -> list[str]:
    """What of a message a template should write; of an Alpaca record's question, which has both, its two parts."""
    keys = ("instruction", "input") if "instruction" in message else ("content",)
    return [message[key] for key in keys if isinstance(message.get(key), str)]


def _refuse_what_is_lost(template: ChatTemplate, chat: Conversation) -> None:
    if any("tool_calls" in message for message in chat.messages) and not template.mentions("tool_calls"):
        raise Flaw("the record has tool calls, and the chat template takes none: it would leave them out")
    if chat.tools and not template.mentions("tools"):
        raise Flaw("the record has tools, and the chat template takes none: it would leave them out")


def _free_marks(template: ChatTemplate, chat: Conversation) -> Marks:
    said = json.dumps([chat.messages, chat.tools], ensure_ascii=False)
    if said.isascii():
        return template.marks[0]
    for marks in template.marks:
        if not marks.plane.search(said):
            return marks
    raise Flaw("messages have private characters of both planes 15 and 16 (U+F0000 and above): replace those of one")


def _settled(template: ChatTemplate, chat: Conversation, marks: Marks, whole: str) -> Callable[[str], str]:
    """What makes marks of special tokens that a template puts together from pieces ('<|' + role + '|>').

    They show as names in the text where no mark is; and so do names that messages spell. A template's are those that
    also stand there when all contents are replaced. Where both are, they cannot be told apart.
    """
    written = [found[0] for found in marks.any_name.finditer(whole)]
    if not written:
        return str
    neutral = marks.any_name.findall(template.marked(_neutral(chat.messages), _neutral(chat.tools), marks))
    own = {name for name in set(written) if name in neutral}
    for name in own:
        if neutral.count(name) != written.count(name):
            raise Flaw(
                f"a message spells {name!r}, a special token that the chat template puts together from pieces, so "
                "that the two cannot be told apart: write the token whole in the template, or leave the record out"
            )

    def settle(text: str) -> str:
        for name in own:
            text = text.replace(name, marks.names[name])
        return text

    return settle if own else str


def _neutral(value: Any) -> Any:
    """The same messages with all that they say replaced by a letter."""
    if isinstance(value, dict):
        return {key: copy.deepcopy(item) if key in _KEPT else _neutral(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_neutral(item) for item in value]
    return "x" if isinstance(value, str) and value else value


def _without_generation(marked: str, marks: Marks) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks of generation, and where they stood."""
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    at = begin = depth = 0
    for piece in _split_keeping(marked, (marks.opened, marks.closed)):
        if piece == marks.opened:
            begin, depth = (at if depth == 0 else begin), depth + 1
        elif piece == marks.closed:
            depth -= 1
            if depth == 0:
                spans.append((begin, at))
        else:
            pieces.append(piece)
            at += len(piece)
    return "".join(pieces), spans


def _split_keeping(text: str, marks: tuple[str, str]) -> list[str]:
    opened, closed = marks
    pieces: list[str] = []
    for number, piece in enumerate(text.split(opened)):
        pieces += [opened] * (number > 0)
        for inner, part in enumerate(piece.split(closed)):
            pieces += [closed] * (inner > 0)
            pieces.append(part)
    return pieces


def _of_learned(chat: Conversation, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans of the messages that are learned, where some of the assistant's are not."""
    turns = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if len(chat.learned) == len(turns):
        return spans
    if len(spans) != len(turns):
        raise Flaw(
            f"some of the assistant's {len(turns)} messages have weight 0, and the chat template marks {len(spans)} "
            "parts as generated: it must mark one for each"
        )
    return [span for number, span in zip(turns, spans, strict=True) if number in chat.learned]


def _added_by(
    chat: Conversation, number: int, text: str, marks: Marks, render: Callable[..., str]
) -> tuple[int, int] | None:
    """Where in the whole text the assistant's message stands, by what its absence takes away."""
    message, earlier = chat.messages[number], chat.messages[:number]
    before = render(earlier, True) if earlier else ""
    after = render(chat.messages[: number + 1])
    prompted = bool(earlier) and before != render(earlier)
    if not after.startswith(before) or not text.startswith(after):
        which = "the turn before it" if not after.startswith(before) else "the rest of the conversation"
        raise Flaw(
            f"the chat template renders an assistant's message in another way together with {which} than without "
            f"(message {number}): its tokens cannot be found so, mark them in the template with {{% generation %}} … "
            "{% endgeneration %}"
        )
    added = after[len(before) :]
    begin, end = _content_in(added, render([*earlier, message | {"content": marks.opened}])[len(before) :], marks)
    if prompted or end == 0:
        begin = 0
    else:  # no generation prompt: a header that the template writes is not learned, blanks before the content are
        begin = len(added[:begin].rstrip(" "))
    specials = [found.end() for found in marks.any_mark.finditer(added, end)]
    if specials:
        end = specials[-1 if "tool_calls" in message or end == 0 else 0]
    else:
        end = max(end, len(added.rstrip()))
    return (len(before) + begin, len(before) + end) if end > begin else None


def _content_in(added: str, stood_for: str, marks: Marks) -> tuple[int, int]:
    """Where the content stands in what a turn adds, given the same with a mark in the content's stead; (0, 0) where
    the template does more with it than to write it."""
    header, found, tail = stood_for.partition(marks.opened)
    if found and marks.opened not in tail and added.startswith(header) and added[len(header) :].endswith(tail):
        return len(header), len(added) - len(tail)
    return 0, 0


def _cut(text: str, spans: list[tuple[int, int]], marks: Marks) -> tuple[Segment, ...]:
    """The text at its marks, and at every place where learned and not learned meet."""
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    segments: list[Segment] = []
    for number, (begin, end) in enumerate(zip(edges, edges[1:], strict=False)):
        learned, at = number % 2 == 1, begin
        for found in marks.any_mark.finditer(text, begin, end):
            _add_text(segments, text[at : found.start()], learned)
            segments.append(Segment(marks.restore(found[0]), marks.ids[found[0]], learned, "start"))
            at = found.end()
        _add_text(segments, text[at:end], learned)
    return tuple(segments)


def _add_text(segments: list[Segment], text: str, learned: bool) -> None:
    if not text:
        return
    place: Place = "start" if not segments else "after-special" if segments[-1].special >= 0 else "continued"
    segments.append(Segment(text, -1, learned, place))
