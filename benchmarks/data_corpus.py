"""The corpus of the data benchmark, made from the files of the machine that it runs on, and tokenizers trained on it.

Half code (the standard library, installed packages, headers), half prose (documentation, manual pages, change logs),
cut at line ends into documents of log-normal length, in one jsonl file. The same machine, size and seed give the same
bytes. Where a machine holds less than is asked for, the documents are given again, and each such pass is marked: its
number stands at the head of every document and behind a seventh of its words, so that no two passes are alike. The
result's `passes` says so.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from pathlib import Path

CODE_SUFFIXES = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".js", ".pm", ".pl", ".sh", ".go"}
PROSE_SUFFIXES = {".md", ".rst", ".txt", ".html"}
LARGEST_FILE = 4_000_000
MEAN_CHARACTERS = 2_550  # of a document before files end: 300 MB then come in about 137,000 documents
SPREAD = 1.0  # sigma of the log-normal
END_OF_DOCUMENT = "<|endoftext|>"
# Files that hold these are left out, since the two sides differ there by intent: ours reads no special token out of a
# text, and encodes U+2581, which SentencePiece writes for a space and so gives back as one, as its three bytes.
SPECIAL_WORDS = (END_OF_DOCUMENT, "</s>", "<s>", "<unk>", "<pad>", "<0x", "\u2581")
BYTE_LEVEL_SAMPLE, SENTENCEPIECE_SAMPLE = 32_000_000, 8_000_000


@dataclass(frozen=True)
class Corpus:
    """A jsonl file and what is in it; `text_bytes` are UTF-8 bytes of the texts alone."""

    path: str
    bytes: int
    documents: int
    text_bytes: int
    code_bytes: int
    prose_bytes: int
    passes: int
    sha256: str

    def words(self) -> str:
        """One line for the report."""
        again = f", documents given {self.passes} times, each pass marked" if self.passes > 1 else ""
        return (
            f"{self.bytes / 1e6:.0f} MB of jsonl, {self.documents:,} documents, {self.code_bytes / 1e6:.0f} MB code "
            f"and {self.prose_bytes / 1e6:.0f} MB prose{again}, sha256 {self.sha256[:16]}…"
        )


def make_corpus(folder: Path, size: int, seed: int = 1, roots: list[Path] | None = None) -> Corpus:
    """The corpus of `size` bytes of jsonl in the folder, made where it is not there yet.

    Args:
        roots: folders to take files from; None: those of this machine (`machine_roots`).

    Raises SystemExit where the roots hold no code or no prose.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, about = folder / f"corpus-{size}-{seed}.jsonl", folder / f"corpus-{size}-{seed}.json"
    if path.is_file() and about.is_file():
        return Corpus(**json.loads(about.read_text()))
    content, passes = _gather(size, seed, machine_roots() if roots is None else roots)
    digest, written, documents = sha256(), 0, 0
    text_bytes = {"code": 0, "prose": 0}
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        for kind, name, text in content:
            line = json.dumps({"id": name, "text": text}, ensure_ascii=False).encode() + b"\n"
            file.write(line)
            digest.update(line)
            written += len(line)
            documents += 1
            text_bytes[kind] += len(text.encode())
            if written >= size:
                break
    partial.replace(path)
    corpus = Corpus(
        path=str(path),
        bytes=written,
        documents=documents,
        text_bytes=sum(text_bytes.values()),
        code_bytes=text_bytes["code"],
        prose_bytes=text_bytes["prose"],
        passes=passes[0],
        sha256=digest.hexdigest(),
    )
    about.write_text(json.dumps(asdict(corpus), indent=1) + "\n")
    return corpus


def first_part(corpus: Corpus, share: float) -> Corpus:
    """The first `share` of a corpus, whole lines, as a file beside it: the smaller of two sizes."""
    path = Path(corpus.path).with_name(f"{Path(corpus.path).stem}-first-{round(share * 1000)}.jsonl")
    about = path.with_suffix(".json")
    if path.is_file() and about.is_file():
        return Corpus(**json.loads(about.read_text()))
    goal, written, documents, text_bytes, digest = share * corpus.bytes, 0, 0, 0, sha256()
    with open(corpus.path, "rb") as whole, path.open("wb") as part:
        for line in whole:
            part.write(line)
            digest.update(line)
            written, documents = written + len(line), documents + 1
            text_bytes += len(json.loads(line)["text"].encode())
            if written >= goal:
                break
    result = Corpus(str(path), written, documents, text_bytes, 0, 0, corpus.passes, digest.hexdigest())
    about.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return result


def machine_roots() -> list[Path]:
    """Where this machine keeps code and prose: the standard library, packages, headers, documentation, manuals."""
    paths = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib", "include")]
    paths += ["/usr/lib/python3", "/usr/include", "/usr/share"]
    paths += [entry for entry in sys.path if entry.endswith("site-packages")]
    resolved = sorted({Path(path).resolve() for path in paths if Path(path).is_dir()})
    return [path for path in resolved if not any(other in path.parents for other in resolved)]


def texts(path: str | Path, limit: int | None = None) -> Iterator[str]:
    """The documents of a corpus in order, of the first `limit` bytes of text."""
    given = 0
    with open(path, "rb") as file:
        for line in file:
            text: str = json.loads(line)["text"]
            yield text
            given += len(text)
            if limit is not None and given >= limit:
                return


def train_byte_level(corpus: Corpus, folder: Path, vocab_size: int = 32_000) -> Path:
    """A byte-level BPE trained on the corpus, as a folder that both sides read; made where it is not there yet."""
    import tokenizers

    target = folder / f"byte-level-{vocab_size}-{corpus.sha256[:8]}"
    if (target / "tokenizer.json").is_file():
        return target
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(corpus.path, BYTE_LEVEL_SAMPLE), trainer)
    target.mkdir(parents=True, exist_ok=True)
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_DOCUMENT}
    (target / "tokenizer_config.json").write_text(json.dumps(described))
    tokenizer.save(str(target / "tokenizer.partial"))
    (target / "tokenizer.partial").replace(target / "tokenizer.json")
    return target


def train_sentencepiece_bpe(corpus: Corpus, folder: Path, vocab_size: int = 32_000) -> Path:
    """A SentencePiece BPE with byte fallback trained on the corpus; made where it is not there yet."""
    import sentencepiece

    target = folder / f"sentencepiece-{vocab_size}-{corpus.sha256[:8]}.model"
    if target.is_file():
        return target
    pieces = (text[at : at + 4000] for text in texts(corpus.path, SENTENCEPIECE_SAMPLE) for at in (0, 4000))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(piece for piece in pieces if piece),
        model_prefix=str(target.with_suffix("")),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=16_384,
        unk_id=0,
        bos_id=-1,
        eos_id=1,
        pad_id=-1,
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )
    return target


def _gather(size: int, seed: int, roots: list[Path]) -> tuple[Iterator[tuple[str, str, str]], list[int]]:
    """(kind, name, text) without end, always of the kind that has given less; and the pass that it is in."""
    files = _files(roots)
    for kind, paths in files.items():
        if not paths:
            raise SystemExit(f"error: no {kind} below {', '.join(map(str, roots))}: name folders that hold some")
        random.Random(f"{seed} {kind}").shuffle(paths)
    passes = [1]

    def stream(kind: str) -> Iterator[tuple[str, str]]:
        seen: set[bytes] = set()
        lengths = random.Random(f"{seed} lengths {kind}")
        turn = 1
        while True:
            before = len(seen)
            for path in files[kind]:
                content = _text_of(path)
                digest = blake2b(f"{turn} {content}".encode(), digest_size=16).digest()
                if content is None or digest in seen:
                    continue
                seen.add(digest)
                for number, text in enumerate(_cut(content, lengths)):
                    passes[0] = max(passes[0], turn)
                    yield f"{path}:{number}", text if turn == 1 else _marked(text, turn)
            if len(seen) == before:
                raise SystemExit(f"error: no readable {kind} below {', '.join(map(str, roots))}")
            turn += 1

    def both() -> Iterator[tuple[str, str, str]]:
        streams, given = {kind: stream(kind) for kind in files}, dict.fromkeys(files, 0)
        while True:
            kind = min(given, key=lambda name: (given[name], name))
            name, text = next(streams[kind])
            given[kind] += len(text)
            yield kind, name, text

    return both(), passes


def _files(roots: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {"code": [], "prose": []}
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name not in ("__pycache__", ".git"))
            for name in sorted(names):
                path = Path(folder, name)
                if (kind := _kind(path)) and not path.is_symlink() and 64 <= path.stat().st_size <= LARGEST_FILE:
                    found[kind].append(path)
    return found


def _kind(path: Path) -> str | None:
    name = path.with_suffix("") if path.suffix == ".gz" else path
    if name.suffix in CODE_SUFFIXES:
        return "code"
    manual = "man" in path.parts and re.fullmatch(r"\.[1-9][a-z]*", name.suffix)
    plain = "doc" in path.parts and not name.suffix
    return "prose" if name.suffix in PROSE_SUFFIXES or manual or plain else None


def _text_of(path: Path) -> str | None:
    """A file's text; None where it is no text, or holds words that are special to a tokenizer."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        text = content.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return None
    if "\0" in text or any(word in text for word in SPECIAL_WORDS):
        return None
    return text


def _cut(text: str, lengths: random.Random) -> Iterator[str]:
    """Documents of log-normal length, ended at line ends."""
    mu = math.log(MEAN_CHARACTERS) - SPREAD**2 / 2
    lines = text.splitlines(keepends=True)
    current: list[str] = []
    room = lengths.lognormvariate(mu, SPREAD)
    for line in lines:
        current.append(line)
        room -= len(line)
        if room <= 0:
            yield "".join(current)
            current, room = [], lengths.lognormvariate(mu, SPREAD)
    if "".join(current).strip():
        yield "".join(current)


def _marked(text: str, turn: int) -> str:
    """The text of a later pass: its number at the head, and behind every word whose checksum falls on it."""

    def mark(match: re.Match[str]) -> str:
        word = match.group()
        return f"{word}{turn}" if zlib.crc32(word.encode()) % 7 == turn % 7 else word

    return f"pass {turn}\n" + re.sub(r"[A-Za-z]{3,}", mark, text)
