"""What a node is known by: everything that its weights depend on, and nothing else.

A document of plain values for each training stage, hashed together with the hash of what it goes on from. So two arms
share exactly the stages up to which `what_counts.py` finds no difference; names, layouts, places and later stages have
no part in it.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape, resolve_model, unlike_fields
from megatron.config.schema import OptimizerSection, RunConfig
from megatron.data.document_stream import packing_words
from megatron.data.ledger import ALGORITHM
from megatron.data.sources import TokenizerIdentity
from megatron.study.steps import AverageStep, TrainStep
from megatron.study.what_counts import counted

Document = dict[str, Any]

_OPTIMIZERS = {
    "adamw": ("betas", "eps"),
    "sgd": ("momentum",),
    "muon": ("betas", "eps", "muon_momentum"),
}
"""Keys of [optimizer] that only some optimizers read."""
_UNKNOWN_VOCABULARY = 64
_YOUNGER: Document = {"shared_norm": False, "logit_multiplier": 1.0}
"""Fields of a decoder that are younger than the first studies, where they say nothing."""


def train_document(step: TrainStep, seed: int, before: str | None, position: str | None) -> Document:
    """What a training stage depends on. before: the hash of the node whose weights it goes on from; position: of that
    whose data position, where it is another one (`before` is an average)."""
    config, stage = step.config, step.stage
    names = stage.weights.sources
    document: Document = {
        "algorithm": ALGORITHM,
        "before": before,
        "run": {"seed": seed},
        "tokenizer": tokenizer_word(config.tokenizer.path),
        "model": model_document(config, longest_sequence(step)),
        "validation": counted("validation", config.validation),
        "stage": {
            "samples": stage.samples,
            "shapes": stage.shapes.to_json(),
            "mixture": stage.weights.to_json(),
            "cursor": stage.cursor,
            "fim": {name: rates.to_json() for name, rates in stage.fim.items()},
        },
        "take": {key: _taken(value) for key, value in step.section.take.model_dump().items()},
        "lr": step.run.lr.law_at(stage.index).to_json(),
        "sources": {name: _source(step, name) for name in names},
        "train": counted("train", config.train),
        "optimizer": optimizer_document(config.optimizer),
        "kernels": counted("kernels", config.kernels),
        "spikes": counted("spikes", config.spikes) if config.spikes.policy != "none" else {"policy": "none"},
    }
    if position != before:
        document["position"] = position
    if stage.objective.masks:
        document["stage"]["masks"] = dict(stage.objective.masks)
    if stage.documents is not None:
        document["packing"] = packing_words(stage.documents)
    if stage.fim:
        document["tokenizer.fim"] = config.tokenizer.model_dump(mode="json")["fim"]
    if step.learned is not None:
        document["weights_from"] = step.learned.sha256
    return document


def average_document(step: AverageStep, members: list[str], position: str) -> Document:
    """What averaged checkpoints depend on. members: the hashes of the nodes that they are of; position: of that whose
    data position the average has. The order of the members counts no further."""
    document: Document = {
        "average": sorted([member, str(weight)] for member, weight in zip(members, step.weights, strict=False)),
        "position": position,
    }
    if step.last:
        document = {"average": members, "last": step.last, "every": step.every, "weights": list(map(str, step.weights))}
    return document


def hash_of(document: Document) -> str:
    """The name of a node: 16 hexadecimal digits."""
    words = json.dumps(document, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def optimizer_document(section: OptimizerSection) -> Document:
    """The keys of [optimizer] that the named one reads."""
    values = counted("optimizer", section)
    only = {key for keys in _OPTIMIZERS.values() for key in keys}
    return {key: value for key, value in values.items() if key not in only or key in _OPTIMIZERS[section.name]}


def model_document(config: RunConfig, longest: int) -> Document:
    """The decoder that [model] comes to, without what a resume may change of it. Fields younger than the first studies
    are named where they say something, so that nodes trained before them keep their names."""
    shape = shape_of(config, longest)
    document = shape.to_json()
    free = {"family"} | {name for name, plain in _YOUNGER.items() if document[name] == plain}
    free |= {"max_position_embeddings"} if shape.position_embedding == "rope" else set()
    if vocabulary_of(config) is None:
        free |= {"vocab_size", "padded_vocab_size"}
        document["vocabulary"] = f"of {config.tokenizer.path}"
    return {key: value for key, value in document.items() if key not in free}


def unlike_models(first: TrainStep, other: TrainStep) -> list[str]:
    """What keeps the weights of two steps from being averaged, with both values; empty where nothing does."""
    one, two = (shape_of(step.config, longest_sequence(step)) for step in (first, other))
    found = [f"model.{words}" for words in unlike_fields(one, two)]
    said = [
        ("the tokenizer", tokenizer_word(first.config.tokenizer.path), tokenizer_word(other.config.tokenizer.path)),
        ("validation.fraction", first.config.validation.fraction, other.config.validation.fraction),
    ]
    return found + [f"{what} is {now}, not {then}" for what, then, now in said if then != now]


def shape_of(config: RunConfig, longest: int) -> ModelShape:
    """The decoder; of a vocabulary that nobody knows yet, with one that stands for it. Raises ConfigError."""
    return resolve_model(config.model, vocabulary_of(config) or _UNKNOWN_VOCABULARY, longest)


def longest_sequence(step: TrainStep) -> int:
    """Of all stages of the arm that the step was written in: learned positions are made for the longest."""
    return max(stage.shapes.longest_sequence for stage in step.run.schedule.stages)


def vocabulary_of(config: RunConfig) -> int | None:
    """Ids of the tokenizer, or model.vocab_size where it is not there yet; None where neither is known."""
    identity = tokenizer_identity(config.tokenizer.path)
    said = config.model.vocab_size
    if identity is None:
        return said
    if said is not None and said < identity.vocab_size:
        raise ConfigError(
            f"model.vocab_size = {said} is less than the {identity.vocab_size} ids of {config.tokenizer.path}: leave "
            "it out, and it is the tokenizer's"
        )
    return said or identity.vocab_size


@lru_cache(maxsize=64)
def tokenizer_identity(path: str) -> TokenizerIdentity | None:
    """The tokenizer's, where it is there. Raises DataError where it is broken."""
    if path != "bytes" and not Path(path).exists():
        return None
    from megatron.tokenizers.load import load_tokenizer

    return TokenizerIdentity.of(load_tokenizer(path))


def tokenizer_word(path: str) -> str:
    """The tokenizer's fingerprint; its path until it is there."""
    identity = tokenizer_identity(path)
    return identity.fingerprint if identity is not None else f"planned:{path}"


def _source(step: TrainStep, name: str) -> Document:
    """A source that has a weight, by its content. Its name and group decide ties in the order."""
    source = step.run.sources[name]
    document = {**source.identity(), "slice": [str(share) for share in source.section.slice]}
    fact = step.stage.facts[name]
    if fact.dry == "renormalise":
        document["cap"] = str(fact.max_epochs.normalize())
    return document


def _taken(words: str) -> str:
    """ "continue", "fresh", or what lies at a path."""
    if words in ("continue", "fresh"):
        return words
    path = Path(words)
    steps = sorted((path / "checkpoints").glob("step-*/manifest.json"))  # a run: its newest checkpoint
    manifest = steps[-1] if steps else path / "manifest.json"
    if manifest.is_file():
        return f"checkpoint:{_sha256(manifest)}"
    if (path / "config.json").is_file():
        facts = sorted((file.name, file.stat().st_size) for file in path.iterdir() if file.is_file())
        texts = {file.name: _sha256(file) for file in sorted(path.glob("*.json"))}
        return f"model:{hash_of({'files': facts, 'texts': texts})}"
    return f"planned:{words}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
