"""Our side of the data benchmark: one measurement in a process of its own, through the package's public names.

python benchmarks/data_ours.py WHAT '{"argument": …}'        # prints `RESULT {…}`
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_peer import memory_mb, reset_peak

SEED = 1234


def config_of(a: dict[str, Any], stages: list[dict[str, Any]]) -> Any:
    """A run config over the prefixes of `a`, sources named s0, s1, …; nothing is held out."""
    from megatron.config.load import config_from_tables

    seq_length = a.get("seq_length", 2048)
    stages[0].setdefault("lr", {"peak": 0.001})
    return config_from_tables(
        {
            "run": {"name": "benchmark", "output": a["folder"], "seed": SEED},
            "tokenizer": {"path": "bytes"},
            "model": {"preset": "llama-160m", "seq_length": seq_length},
            "sources": {
                f"s{n}": {"data": [prefix], "dry": "repeat", "allow_overlap": True}
                for n, prefix in enumerate(a["prefixes"])
            },
            "data": {"cache": a["cache"]},
            "validation": {"fraction": "0"},
            "train": {"global_batch_size": a.get("batch", 512), "micro_batch_size": 1},
            "stages": stages,
        }
    )


def stage(weights: list[float], samples: int, name: str = "one") -> dict[str, Any]:
    """A stage with a constant mixture of s0, s1, …"""
    return {"name": name, "samples": samples, "mixture": {f"s{n}": str(weight) for n, weight in enumerate(weights)}}


def index(a: dict[str, Any]) -> dict[str, Any]:
    """Opens one source and builds and publishes the index of each epoch; the file's opening is counted."""
    from megatron.data.epoch_index import SourceOrder
    from megatron.data.indexed_dataset import IndexedDataset

    def build(prefix: str, epochs: int, cache: Path) -> tuple[float, int]:
        began = time.perf_counter()
        file = IndexedDataset(prefix)
        order = SourceOrder([file], seed=SEED, piece_tokens=8 * a["seq_length"], cache_dir=cache)
        tokens = order.epoch_tokens
        opened = time.perf_counter() - began
        for epoch in range(epochs):
            order.prepare(epoch)
        return opened, tokens

    build(a["warm"], 1, Path(a["cache"] + "-warm"))
    resident = reset_peak()
    began = time.perf_counter()
    opened, tokens = build(a["prefix"], a["epochs"], Path(a["cache"]))
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in Path(a["cache"]).iterdir())
    return {
        "seconds": seconds,
        "open_seconds": opened,
        "bytes": size,
        "samples": a["epochs"] * tokens // a["seq_length"],
        "memory_mb": memory_mb("VmHWM") - resident,
    }


def second_arm(a: dict[str, Any]) -> dict[str, Any]:
    """Resolves one run and gives its first batch, then another with other weights and horizon over the same cache."""
    from megatron.planner.resolve import resolve_run

    def arm(words: dict[str, Any]) -> float:
        began = time.perf_counter()
        resolve_run(config_of(a, [stage(words["weights"], words["samples"])])).stream().next_batch()
        return time.perf_counter() - began

    def state() -> dict[str, tuple[int, int, int]]:
        found = {path.name: path.stat() for path in Path(a["cache"]).iterdir()}
        return {name: (entry.st_ino, entry.st_size, entry.st_mtime_ns) for name, entry in found.items()}

    first = arm(a["first"])
    before = state()
    seconds = arm(a["second"])
    if not before or state() != before:
        raise SystemExit(f"error: the second arm changed the index cache: {before} became {state()}")
    return {"first_seconds": first, "seconds": seconds, "files_added": 0, "bytes_added": 0}


def blend(a: dict[str, Any]) -> dict[str, Any]:
    """First sample and running on in a constant stage, in global batches, with memory."""
    from megatron.data.mixture import open_mixture
    from megatron.data.weight_function import WeightFunction

    units = _units(a)
    constant = WeightFunction.constant(units)
    groups = {name: name for name in units}
    open_mixture(constant, groups, horizon=a["far"]).take(1)  # loads the extension
    resident = reset_peak()
    began = time.perf_counter()
    stream = open_mixture(constant, groups, horizon=a["far"])
    stream.take(1)
    first = time.perf_counter() - began
    batches = a["samples"] // a["batch"]
    began = time.perf_counter()
    for _ in range(batches):
        stream.take(a["batch"])
    seconds = time.perf_counter() - began
    return {
        "first_seconds": first,
        "seconds": seconds,
        "ns_a_sample": seconds / (batches * a["batch"]) * 1e9,
        "memory_mb": memory_mb("VmHWM") - resident,
    }


def seek(a: dict[str, Any]) -> dict[str, Any]:
    """Opens a stage at far places, each time anew, in a constant stage or a ramp; the slowest, and the error of counts.

    The weights of the ramp go from those of `units` to the same in reverse over `far` samples.
    """
    from megatron.data.mixture import open_mixture
    from megatron.data.weight_function import Segment, WeightFunction

    units = _units(a)
    turned = dict(zip(units, reversed(a["units"]), strict=True))
    function = WeightFunction.constant(units)
    if a["ramp"]:
        function = WeightFunction.make([Segment(0, units, a["far"], turned)])
    groups = {name: name for name in units}
    open_mixture(function, groups, horizon=a["far"]).take(1)
    resident, seconds, errors = reset_peak(), [], []
    for place in a["places"]:
        began = time.perf_counter()
        stream = open_mixture(function, groups, horizon=a["far"])
        stream.seek(place)
        stream.take(1)
        seconds.append(time.perf_counter() - began)
        counts = zip(function.sources, stream.counts, strict=True)
        errors.append(max(float(abs(count - function.target(name, place + 1))) for name, count in counts))
    if max(errors) >= 1:
        raise SystemExit(f"error: a count is {max(errors)} from its target after seeking (law M1)")
    near = min(a["far"] // 2, 123_457)
    walked, jumped = (open_mixture(function, groups, horizon=a["far"]) for _ in range(2))
    walked.take(near)
    jumped.seek(near)
    if list(walked.counts) != list(jumped.counts) or walked.take(5000).tolist() != jumped.take(5000).tolist():
        raise SystemExit(f"error: seeking to sample {near} is not where taking {near} samples leads")
    return {"seconds": max(seconds), "error": max(errors), "memory_mb": memory_mb("VmHWM") - resident}


def _units(a: dict[str, Any]) -> dict[str, int]:
    return {f"s{number:03d}": unit for number, unit in enumerate(a["units"])}


def _long_run(a: dict[str, Any]) -> list[dict[str, Any]]:
    return [stage([0.8, 0.2], 12 * a["at"] // 10 // a["batch"] * a["batch"])]


def make_ledger(a: dict[str, Any]) -> dict[str, Any]:
    """The ledger of a run that has consumed `at` samples, as its checkpoint would hold it. Not timed."""
    from megatron.planner.resolve import resolve_run

    stream = resolve_run(config_of(a, _long_run(a))).stream()
    stream.seek(a["at"])
    Path(a["ledger"]).write_text(json.dumps(stream.ledger.to_json()))
    stream.next_batch()  # builds and publishes the epochs in use, which a run that resumes has in its cache
    return {}


def resume(a: dict[str, Any]) -> dict[str, Any]:
    """Opens the sources, reads the ledger and gives the next global batch."""
    from megatron.data.ledger import Ledger
    from megatron.planner.resolve import resolve_run

    resolve_run(config_of(a | {"prefixes": [a["warm"]], "cache": a["cache"] + "-warm"}, [stage([1], 512)]))
    before, resident = memory_mb("RssAnon"), reset_peak()
    began = time.perf_counter()
    ledger = Ledger.from_json(json.loads(Path(a["ledger"]).read_text()))
    run = resolve_run(config_of(a, _long_run(a)), ledger=ledger)
    opened = time.perf_counter() - began
    tables = memory_mb("RssAnon")
    began = time.perf_counter()
    stream = run.stream()
    batch = stream.next_batch()
    seconds = time.perf_counter() - began
    if batch[0].number != a["at"]:
        raise SystemExit(f"error: resumed at sample {batch[0].number}, not {a['at']}")
    return {
        "open_seconds": opened,
        "seconds": opened + seconds,
        "memory_mb": memory_mb("VmHWM") - resident,
        "tables_mb": tables - before,
        "own_mb": memory_mb("RssAnon") - tables,
    }


def read(a: dict[str, Any]) -> dict[str, Any]:
    """Seconds a sample: the read alone, and with mixture, cursors, look-up and ledger of whole global batches."""
    from megatron.data.assembly import assemble
    from megatron.planner.resolve import resolve_run

    run = resolve_run(config_of(a, [stage([0.5, 0.5], a["count"] * (a["rounds"] + 2) // a["batch"] * a["batch"])]))
    stream, sources, seq_length = run.stream(), run.sources, a.get("seq_length", 2048)
    alone, whole = [], []
    for number in range(a["rounds"] + 1):
        read_seconds, count = 0.0, 0
        began = time.perf_counter()
        while count < a["count"]:
            samples = stream.next_batch()
            before = time.perf_counter()
            for sample in samples:
                assemble(sample, sources[sample.source], seq_length)
            read_seconds += time.perf_counter() - before
            count += len(samples)
        if number:
            whole.append((time.perf_counter() - began) / count)
            alone.append(read_seconds / count)
    middle = a["rounds"] // 2
    return {"seconds": {"read": sorted(alone)[middle], "mixture, cursor, look-up, read": sorted(whole)[middle]}}


def compare_ids(a: dict[str, Any]) -> dict[str, Any]:
    """Every document of an indexed dataset against the reference library's ids of its text.

    The reference is called here, not through the package: sentencepiece for a .model, tokenizers for a folder.
    """
    from data_corpus import texts

    from megatron.data.indexed_dataset import IndexedDataset

    encode, end = _reference(Path(a["tokenizer"]))
    file = IndexedDataset(a["prefix"])
    documents = 0
    for group in batched(texts(a["corpus"]), 512):
        for ids in encode(list(group)):
            if file.tokens(documents).tolist() != [*ids, end]:
                raise SystemExit(f"error: document {documents} of {a['corpus']}: its ids are not the reference's")
            documents += 1
    if documents != len(file):
        raise SystemExit(f"error: {a['prefix']} has {len(file)} documents, {a['corpus']} {documents}")
    return {"documents": documents, "tokens": file.token_count}


def batched(items: Iterable[str], count: int) -> Iterator[tuple[str, ...]]:
    """Groups of `count` items, the last one smaller."""
    iterator = iter(items)
    while group := tuple(islice(iterator, count)):
        yield group


def _reference(path: Path) -> tuple[Callable[[list[str]], list[list[int]]], int]:
    if path.suffix == ".model":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return (lambda texts: processor.encode(texts, num_threads=2)), processor.eos_id()
    import tokenizers
    from data_corpus import END_OF_DOCUMENT

    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    return (lambda texts: [item.ids for item in tokenizer.encode_batch(texts)]), end if end is not None else -1


def prepare(a: dict[str, Any]) -> dict[str, Any]:
    """Corpora and tokenizers in the work folder. Not timed."""
    import data_corpus

    folder = Path(a["folder"])
    roots = [Path(root) for root in a["roots"]] if a["roots"] else None
    whole = data_corpus.make_corpus(folder, a["size"], roots=roots)
    return {
        "whole": asdict(whole),
        "part": asdict(data_corpus.first_part(whole, a["share"])),
        "byte_level": str(data_corpus.train_byte_level(whole, folder, a["vocabulary"])),
        "sentencepiece": str(data_corpus.train_sentencepiece_bpe(whole, folder, a["vocabulary"])),
        "words": whole.words(),
    }


def synthesise(a: dict[str, Any]) -> dict[str, Any]:
    """Synthetic datasets in the work folder: `lengths` without tokens, `tokens` with random ids. Not timed."""
    import numpy as np
    from data_synthetic import web_lengths, web_like, write_indexed

    for prefix, documents, seed in a.get("lengths", []):
        web_like(Path(prefix), documents, seed)
    for prefix, documents, seed in a.get("tokens", []):
        if not Path(f"{prefix}.idx").is_file():
            lengths = web_lengths(documents, seed)
            ids = np.random.default_rng(seed).integers(0, 32_000, int(lengths.sum(dtype=np.int64)))
            write_indexed(Path(prefix), lengths, ids, "uint16")
    count = {prefix: int(web_lengths(documents, seed).sum(dtype=np.int64)) for prefix, documents, seed in a["lengths"]}
    for path, samples, dtype in a.get("arrays", []):
        if not Path(path).is_file():
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(samples,))  # sparse: no bytes are written
    return {"tokens": count}


WAYS = (index, second_arm, blend, seek, make_ledger, resume, read, compare_ids, prepare, synthesise)


def main() -> None:
    """Runs one measurement."""
    what, arguments = sys.argv[1:]
    (way,) = (way for way in WAYS if way.__name__ == what)
    print("RESULT", json.dumps(way(json.loads(arguments))), flush=True)


if __name__ == "__main__":
    main()
