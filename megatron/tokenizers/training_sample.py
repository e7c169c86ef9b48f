"""The text that a tokenizer is trained on: a weighted, repeatable sample of several sources."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from megatron.config.errors import ConfigError
from megatron.tokenizers.base import utf8_of

CHUNK_CHARACTERS = 4096


@dataclass(frozen=True)
class SampleSource:
    """A corpus to sample: its weight (any scale; shares are of the sample's bytes), and a way to read it, again too."""

    weight: float
    read: Callable[[], Iterator[str]]


@dataclass
class SourceSample:
    """What a source gave: chunks of text, their UTF-8 bytes, the documents they came from, and whether it ran dry."""

    chunks: list[str] = field(default_factory=list)
    bytes: int = 0
    documents: int = 0
    dry: bool = False


def first_sample(
    sources: Mapping[str, SampleSource], sample_bytes: int, tell: Callable[[int], None] = lambda _: None
) -> dict[str, SourceSample]:
    """The beginnings of the sources: always a chunk of the source that is furthest below its share.

    Reads no further than it needs. A source that runs dry leaves its share to the others, by their weights. `tell` is
    told the bytes of each chunk taken.
    """
    weights = _shares(sources)
    found = {name: SourceSample() for name in sources}
    streams = {name: _numbered_chunks(source.read()) for name, source in sources.items()}
    order = {name: number for number, name in enumerate(sources)}
    taken = 0
    while streams and taken < sample_bytes:
        name = min(streams, key=lambda one: (found[one].bytes / weights[one], order[one]))
        following = next(streams[name], None)
        if following is None:
            found[name].dry = True
            del streams[name]
            continue
        document, chunk, size = following
        found[name].chunks.append(chunk)
        found[name].bytes += size
        found[name].documents = document
        taken += size
        tell(size)
    return found


def random_sample(
    sources: Mapping[str, SampleSource], sample_bytes: int, seed: int, tell: Callable[[int], None] = lambda _: None
) -> dict[str, SourceSample]:
    """Chunks drawn evenly from the whole of each source, in the order of the source.

    Every chunk gets a random number keyed by the seed, the source's name and its place; the smallest stay, as many as
    fill the source's share. A source that is too small for its share leaves the rest to the others by their weights,
    which are then read once more. Holds the sample and no more. `tell` is told the bytes of each chunk read.
    """
    weights = _shares(sources)
    found: dict[str, SourceSample] = {}
    open_bytes, undecided = float(sample_bytes), dict(weights)
    while undecided:
        total = sum(undecided.values())
        shares = {name: open_bytes * weight / total for name, weight in undecided.items()}
        drawn = {name: _draw(name, sources[name], shares[name], seed, tell) for name in undecided}
        dry = [name for name, sample in drawn.items() if sample.dry]
        for name in dry or list(drawn):
            found[name] = drawn[name]
            open_bytes -= drawn[name].bytes
            del undecided[name]
    return {name: found[name] for name in sources}


def _draw(name: str, source: SampleSource, share: float, seed: int, tell: Callable[[int], None]) -> SourceSample:
    keys = random.Random(f"{seed}/{name}")
    # a heap whose first is the largest key, the next to go: (-key, place, size, document, chunk)
    kept: list[tuple[float, int, int, int, str]] = []
    held = total = 0
    for place, (document, chunk, size) in enumerate(_numbered_chunks(source.read())):
        total += size
        tell(size)
        heapq.heappush(kept, (-keys.random(), place, size, document, chunk))
        held += size
        while held - kept[0][2] >= share:
            held -= heapq.heappop(kept)[2]
    kept.sort(key=lambda entry: entry[1])
    documents = len({entry[3] for entry in kept})
    return SourceSample([entry[4] for entry in kept], held, documents, dry=total < share)


def mingled(samples: Mapping[str, SourceSample]) -> Iterator[str]:
    """All chunks, the sources taking turns by how far each has come."""
    streams = [
        [((number + 0.5) / len(sample.chunks), place, chunk) for number, chunk in enumerate(sample.chunks)]
        for place, sample in enumerate(samples.values())
    ]
    for _, _, chunk in heapq.merge(*streams):
        yield chunk


def _shares(sources: Mapping[str, SampleSource]) -> dict[str, float]:
    if not sources:
        raise ConfigError("no source to train the tokenizer on")
    for name, source in sources.items():
        if not 0 < source.weight < float("inf"):
            raise ConfigError(f"source {name!r}: weight {source.weight}: a number above 0 is expected")
    total = sum(source.weight for source in sources.values())
    return {name: source.weight / total for name, source in sources.items()}


def _numbered_chunks(texts: Iterable[str]) -> Iterator[tuple[int, str, int]]:
    for number, text in enumerate(texts, start=1):
        utf8_of(text)
        for chunk in chunks_of(text):
            yield number, chunk, len(chunk.encode())


def chunks_of(text: str) -> Iterator[str]:
    """The text in parts of at most CHUNK_CHARACTERS, cut at line ends where it can be."""
    gathered: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        for part in (line[i : i + CHUNK_CHARACTERS] for i in range(0, len(line), CHUNK_CHARACTERS)):
            if gathered and size + len(part) > CHUNK_CHARACTERS:
                yield "".join(gathered)
                gathered, size = [], 0
            gathered.append(part)
            size += len(part)
    if gathered:
        yield "".join(gathered)
