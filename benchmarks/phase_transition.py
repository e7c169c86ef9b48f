"""How much of a second stage was trained on in the first: Megatron-LM's --phase-transition-iterations and ours.

Two corpora, two stages: 1000 samples at 0.8 text and 0.2 code, then 1000 at 0.5 and 0.5. Megatron-LM runs its own
command-line parsing, dataset building and data loader, in a process for each phase, as it restarts at a boundary
(data_peer.py names files and lines). Ours is asked through tools/inspect_data.py, its public witness. Both read the
same .bin/.idx, in which every token's id is its place in the corpus, so that what a sample holds says where it is from.

    python benchmarks/phase_transition.py --peer PATH_TO_MEGATRON_LM [--peer-python PYTHON] [--json FILE]
    python benchmarks/phase_transition.py              # ours alone

Prints, for each corpus and in all, the share of the second stage's tokens that the first stage had trained on, and of
its samples that hold at least one such token, and the share of each corpus that neither stage saw. Exit code 1 where
ours replays a token.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent))

from data_measure import commit_of, measure
from data_synthetic import numbered

HERE = Path(__file__).resolve().parent

SOURCES = ("text", "code")
STAGES = ({"text": "0.8", "code": "0.2"}, {"text": "0.5", "code": "0.5"})
STAGE_SAMPLES, BATCH, SEQ_LENGTH, SEED = 1000, 10, 64, 1234
CORPUS_SAMPLES = 5000  # of each corpus: an epoch of neither is over
MEAN_DOCUMENT = 200
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 32,
}

Positions = npt.NDArray[np.int64]
Stage = list[tuple[str, Positions]]  # of each sample: its source, the places of its input tokens in that corpus


@dataclass(frozen=True)
class Share:
    """What a source's second stage repeats: samples that hold a repeated token, tokens; and what neither stage saw."""

    samples: int
    samples_repeated: int
    tokens: int
    tokens_repeated: int
    corpus: int
    unseen: int

    def __add__(self, other: Share) -> Share:
        return Share(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))

    def words(self) -> str:
        """The figures of a line of the table."""
        return (
            f"{self.samples:>7,}{self.samples_repeated / self.samples:>10.1%}"
            f"{self.tokens_repeated / self.tokens:>10.1%}{self.unseen / self.corpus:>10.1%}"
        )


def shares(stages: list[Stage], corpus_tokens: dict[str, int]) -> dict[str, Share]:
    """The share of each source, and of all, of two stages."""
    first, second = stages
    result: dict[str, Share] = {}
    for name, size in corpus_tokens.items():
        seen = np.zeros(size, dtype=bool)
        for source, places in first:
            if source == name:
                seen[places] = True
        again = [seen[places] for source, places in second if source == name]
        repeated = sum(int(flags.sum()) for flags in again)
        for source, places in second:
            if source == name:
                seen[places] = True
        result[name] = Share(
            samples=len(again),
            samples_repeated=sum(bool(flags.any()) for flags in again),
            tokens=sum(len(flags) for flags in again),
            tokens_repeated=repeated,
            corpus=size,
            unseen=int((~seen).sum()),
        )
    one, other = (result[name] for name in SOURCES)
    return result | {"all": one + other}


def peer_stages(tree: Path, python: str, folder: Path) -> list[Stage]:
    """What each phase of Megatron-LM trains on."""
    stages: list[Stage] = []
    for number, weights in enumerate(STAGES):
        output = folder / f"phase-{number}.json"
        blend = [word for name in SOURCES for word in (weights[name], str(folder / name))]
        flags = {
            "num-layers": "1", "hidden-size": "16", "num-attention-heads": "1",
            "seq-length": SEQ_LENGTH, "max-position-embeddings": SEQ_LENGTH,
            "micro-batch-size": BATCH, "global-batch-size": BATCH,
            "train-samples": len(STAGES) * STAGE_SAMPLES,
            "phase-transition-iterations": STAGE_SAMPLES // BATCH,
            "eval-iters": "0", "eval-interval": "1000", "lr": "0.001", "split": "1,0,0", "seed": SEED,
            "tokenizer-type": "NullTokenizer", "vocab-size": 2 * CORPUS_SAMPLES * SEQ_LENGTH,
            "data-cache-path": folder / "peer-cache", "num-workers": "0",
        }  # fmt: skip
        arguments = {
            "flags": [word for name, value in flags.items() for word in (f"--{name}", str(value))]
            + ["--data-path", *blend],
            "iteration": number * STAGE_SAMPLES // BATCH,  # of the checkpoint that the phase starts from
            "rendezvous": str(folder / f"rendezvous-{number}"),
            "samples": STAGE_SAMPLES,
            "output": str(output),
        }
        measure([python, HERE / "data_peer.py", tree, "phases", json.dumps(arguments)], 300, tree)
        samples = json.loads(output.read_text())
        stages.append([(SOURCES[source], np.array(ids, dtype=np.int64)) for source, ids in samples])
    return stages


def our_config(folder: Path) -> Path:
    """The same schedule as a config of ours."""
    lines = [
        f'run = {{ name = "phases", output = "{folder}/run", seed = {SEED} }}',
        'tokenizer = { path = "bytes" }',
        f"train = {{ global_batch_size = {BATCH}, micro_batch_size = 1 }}",
        'validation = { fraction = "0" }',
        "[model]",
        *(f"{name} = {value}" for name, value in MODEL.items()),
        f"seq_length = {SEQ_LENGTH}",
    ]
    for name in SOURCES:
        lines += [f"[sources.{name}]", f'data = ["{folder}/{name}"]']
    for number, weights in enumerate(STAGES):
        lines += ["[[stages]]", f'name = "stage-{number + 1}"', f"samples = {STAGE_SAMPLES}"]
        lines.append("mixture = { " + ", ".join(f"{name} = {weight}" for name, weight in weights.items()) + " }")
        lines += ["lr = { peak = 0.001 }"] if number == 0 else []
    config = folder / "phases.toml"
    config.write_text("\n".join(lines) + "\n")
    return config


def our_stages(folder: Path) -> list[Stage]:
    """What each of our stages trains on, as tools/inspect_data.py says."""
    output = folder / "ours.jsonl"
    command = (
        f"exec '{sys.executable}' '{HERE.parent / 'tools' / 'inspect_data.py'}' '{our_config(folder)}' "
        f"--samples 0:{len(STAGES) * STAGE_SAMPLES} --jsonl > '{output}'"
    )
    measure(["/bin/sh", "-c", command], 300)
    starts = {name: document_starts(folder / name) for name in SOURCES}
    stages: list[Stage] = [[] for _ in STAGES]
    for line in output.read_text().splitlines():
        row = json.loads(line)
        first = starts[row["source"]]
        places = [np.arange(first[document] + start, first[document] + end) for document, start, end in row["pieces"]]
        stages[int(row["stage"].removeprefix("stage-")) - 1].append((row["source"], np.concatenate(places)))
    return stages


def document_starts(prefix: Path) -> Positions:
    """Where each document of an .idx of `numbered` begins, in tokens, read from the file itself."""
    content = Path(f"{prefix}.idx").read_bytes()
    sequences = int.from_bytes(content[18:26], "little")
    lengths = np.frombuffer(content, "<i4", sequences, 34)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def table(name: str, found: dict[str, Share]) -> str:
    """The table of one side."""
    head = f"{name}\n{'second stage':<14}{'samples':>7}{'repeated':>10}{'tokens':>10}{'unseen':>10}"
    return "\n".join([head, *(f"  {source:<12}{share.words()}" for source, share in found.items())])


def main() -> int:
    """Makes the corpora, runs both sides, prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, metavar="PATH", help="Megatron-LM's source tree, its helpers built")
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PYTHON", help="interpreter for it (default: this one)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stagemix-phases-") as name:
        folder = Path(name)
        for seed, source in enumerate(SOURCES):
            numbered(folder / source, CORPUS_SAMPLES * SEQ_LENGTH, MEAN_DOCUMENT, seed)
        tokens = {source: int(document_starts(folder / source)[-1]) for source in SOURCES}
        print(f"{STAGE_SAMPLES} samples of {SEQ_LENGTH} tokens at {STAGES[0]}, then {STAGE_SAMPLES} at {STAGES[1]}")
        print("repeated: samples with a token of the first stage; tokens: trained on in the first stage already;")
        print("unseen: of the corpus, by both stages\n")
        report: dict[str, dict[str, Share]] = {}
        if arguments.peer is not None:
            tree = arguments.peer.resolve()
            report["Megatron-LM"] = shares(peer_stages(tree, arguments.peer_python, folder), tokens)
            print(table(f"Megatron-LM {commit_of(tree)[:12]}, --phase-transition-iterations", report["Megatron-LM"]))
            print()
        report["ours"] = shares(our_stages(folder), tokens)
    print(table("Stagemix, two [[stages]]", report["ours"]))
    if arguments.json:
        figures = {side: {source: asdict(share) for source, share in found.items()} for side, found in report.items()}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if report["ours"]["all"].tokens_repeated else 0


if __name__ == "__main__":
    raise SystemExit(main())
