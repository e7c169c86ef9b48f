"""Rendered conversations to token ids and loss masks, many at a time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.corpora.chat_options import ChatSetup
from megatron.corpora.chat_records import Conversation, Flaw
from megatron.corpora.chat_targets import RenderedChat, Segment, rendered
from megatron.corpora.chat_templates import ChatTemplate
from megatron.corpora.document import BadRecord
from megatron.data.indexed_format import dtype_for_vocab
from megatron.preprocessing.sample_check import SampleCheck
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.continuation import ContinuedText, Place
from megatron.tokenizers.encoder import Encoder

TRUNCATED, UNSEEN = "truncated to max_tokens", "messages that the template leaves out"
_DROPPED, _NOTHING_LEFT = "longer than max_tokens", "no loss within max_tokens"

_Key = tuple[str, Place]


@dataclass
class EncodedChats:
    """Conversations one after another: ids, tokens of each, and whether each token is a target of the loss.

    kept: of those that were given, which are here. text_bytes: by number, of those that were cut. bad: number and
    reason of those that are not here because they are too long, or nothing is left to learn. skipped: what was left
    out, by reason; counts: what was done to those that are here.
    """

    kept: NDArray[np.bool_]
    ids: NDArray[np.integer[Any]] = field(default_factory=lambda: np.zeros(0, np.int32))
    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    targets: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    text_bytes: dict[int, int] = field(default_factory=dict)
    bad: list[tuple[int, BadRecord]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)


class ChatEncoder:
    """Renders with the templates of a setup and encodes with an encoder, text by text between special tokens."""

    def __init__(self, setup: ChatSetup, tokenizer: Tokenizer, encoder: Encoder) -> None:
        self._setup, self._tokenizer, self._encoder = setup, tokenizer, encoder
        self._template = ChatTemplate(setup.template, tokenizer.special_ids)
        self._tool_use = None if setup.tool_use is None else ChatTemplate(setup.tool_use, tokenizer.special_ids)
        self._continued = ContinuedText(tokenizer)
        self._special_names = {token: name for name, token in tokenizer.special_ids.items()}
        self._dtype = dtype_for_vocab(tokenizer.vocab_size)

    def render(self, chat: Conversation) -> RenderedChat | BadRecord:
        """The conversation through the template for it; a BadRecord with the reason where that is not possible."""
        template = self._tool_use if self._tool_use is not None and chat.tools else self._template
        try:
            return rendered(template, chat)
        except Flaw as flaw:
            return chat.bad(str(flaw))

    def encode(self, chats: Sequence[tuple[Conversation, RenderedChat]], check: SampleCheck) -> EncodedChats:
        """Ids and targets. Each conversation ends in the end-of-document id, which is a target where the assistant's
        last turn has no other end; one whose template ends in that very id gets no second one.
        """
        found = EncodedChats(kept=np.ones(len(chats), np.bool_))
        ids: list[NDArray[np.integer[Any]]] = []
        targets: list[NDArray[np.bool_]] = []
        segments = [self._stripped(chat.segments) for _, chat in chats]
        known = self._encoded(segments, check)
        for number, (record, chat) in enumerate(chats):
            row = [self._ids_of(segment, known) for segment in segments[number]]
            whole = np.concatenate([np.zeros(0, self._dtype), *row])
            learned = np.repeat(
                np.array([segment.learned for segment in segments[number]], np.bool_), [len(part) for part in row]
            )
            if not len(whole) or whole[-1] != self._tokenizer.eod_id:
                whole = np.append(whole, whole.dtype.type(self._tokenizer.eod_id))
                learned = np.append(learned, chat.ends_open)
            if self._fits(number, len(whole), learned, record, found):
                if len(whole) > self._most:
                    whole, learned = self._truncated(whole), self._without_end(learned)
                    found.text_bytes[number] = self._bytes_of(whole[:-1].tolist())
                ids.append(whole)
                targets.append(learned)
                found.counts[UNSEEN] += chat.unseen
        if ids:
            found.ids, found.targets = np.concatenate(ids), np.concatenate(targets)
            found.lengths = np.array([len(row) for row in ids], np.int64)
        found.counts = +found.counts
        return found

    @property
    def _most(self) -> int:
        return sys.maxsize if self._setup.max_tokens is None else self._setup.max_tokens

    def _fits(
        self, number: int, tokens: int, learned: NDArray[np.bool_], record: Conversation, found: EncodedChats
    ) -> bool:
        """Whether a conversation stays, at most cut; what becomes of the others is noted."""
        if not learned.any():
            found.kept[number] = False
            found.bad.append((number, record.bad("the chat template puts the loss on no token of the conversation")))
            return False
        if tokens <= self._most:
            return True
        if self._setup.too_long == "truncate" and learned[: self._most - 1].any():
            found.counts[TRUNCATED] += 1
            return True
        found.kept[number] = False
        if self._setup.too_long == "error":
            reason = (
                f"the conversation has {tokens} tokens, more than max_tokens ({self._most}): choose what becomes of "
                "such ones by --too-long truncate or drop"
            )
            found.bad.append((number, record.bad(reason)))
        else:
            found.skipped[_DROPPED if self._setup.too_long == "drop" else _NOTHING_LEFT] += 1
        return False

    def _truncated(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
        cut = ids[: self._most].copy()
        cut[-1] = self._tokenizer.eod_id
        return cut

    def _bytes_of(self, ids: list[int]) -> int:
        names = sum(len(name.encode()) for token in ids if (name := self._special_names.get(token)))
        return names + len(self._tokenizer.decode(ids).encode())

    def _without_end(self, learned: NDArray[np.bool_]) -> NDArray[np.bool_]:
        cut = learned[: self._most].copy()
        cut[-1] = False  # where a conversation was cut off is no place to learn to stop at
        return cut

    def _stripped(self, segments: Sequence[Segment]) -> list[Segment]:
        """Without the white space that special tokens take away beside themselves, as the tokenizer's file says."""
        strips = self._continued.rules.strips
        if not strips:
            return list(segments)
        kept: list[Segment] = []
        for number, segment in enumerate(segments):
            text = segment.text
            if segment.special < 0:
                if number and strips.get(segments[number - 1].special, (False, False))[1]:
                    text = text.lstrip()
                if number + 1 < len(segments) and strips.get(segments[number + 1].special, (False, False))[0]:
                    text = text.rstrip()
            if text:
                kept.append(segment._replace(text=text))
        return kept

    def _encoded(self, chats: Sequence[Sequence[Segment]], check: SampleCheck) -> dict[_Key, NDArray[np.integer[Any]]]:
        """The ids of every different text in its place, encoded all together."""
        keys = dict.fromkeys((s.text, s.place) for chat in chats for s in chat if s.special < 0)
        asked = {key: self._continued.asked(*key) for key in keys}
        texts = list(dict.fromkeys(text for text, _ in asked.values()))
        if not texts:
            return {}
        ids, lengths = self._encoder.encode_documents(texts)
        check.look_at(texts)
        ends = np.cumsum(lengths)
        rows = {text: ids[end - length : end - 1] for text, end, length in zip(texts, ends, lengths, strict=True)}
        known: dict[_Key, NDArray[np.integer[Any]]] = {}
        for key, (text, before) in asked.items():
            row = rows[text]
            known[key] = np.array(self._continued.taken(key[0], row.tolist(), before), ids.dtype) if before else row
        return known

    def _ids_of(self, segment: Segment, known: dict[_Key, NDArray[np.integer[Any]]]) -> NDArray[np.integer[Any]]:
        if segment.special >= 0:
            return np.array([segment.special], self._dtype)
        return known[segment.text, segment.place]
