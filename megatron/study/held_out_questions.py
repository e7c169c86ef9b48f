"""Which sources of a study the suite "heldout" can ask about: told by indexed data, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping

from megatron.data.sources import OpenSource
from megatron.evaluation.held_out_text import first_texts
from megatron.evaluation.multiple_choice import too_few
from megatron.study.identity import tokenizer_identity
from megatron.tokenizers.load import load_tokenizer


def unaskable_sources(sources: Mapping[str, OpenSource], tokenizer: str) -> dict[str, str]:
    """The sources that no question can be made of, each with why: without data, too few held-out documents, or too
    short ones. What they hold out is as they were opened.

    tokenizer: path of the one that they were encoded with; where it is not there yet, data alone count. Of a source
    that can be asked about only some documents are read. Raises DataError for files that cannot be read.
    """
    found = {name: "it is planned by its size, without data" for name, one in sources.items() if one.is_planned}
    if tokenizer_identity(tokenizer) is None:
        return found
    decoder = load_tokenizer(tokenizer)
    for name, source in sources.items():
        if name not in found and (why := too_few(first_texts(source, decoder))):
            found[name] = why
    return dict(sorted(found.items()))


def without_held_out(sources: Mapping[str, OpenSource]) -> list[str]:
    """The sources with data of which no document is held out."""
    return [name for name, one in sources.items() if not one.is_planned and not len(one.opened().held_out_documents())]
