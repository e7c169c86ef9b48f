"""A staged run of twenty steps through the real loader and engine, in one process or as one of several ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layouts.cases import VARIANT, Key, LayoutCase, Variant
from made_runs import run_config
from tiny_run import write_corpus

from megatron.config.layout import resolve_layout
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import RunConfig
from megatron.data.ledger import Ledger
from megatron.data.loader import Batch, BatchLoader
from megatron.engines.base import Engine
from megatron.engines.build import build_engine, default_kernels
from megatron.parallel.mesh import Mesh, close_mesh, launched, one_process_mesh, open_mesh
from megatron.planner.resolve import ResolvedRun, resolve_run

STEPS, HALF = 20, 10
ROWS = 8
VOCAB = 257
LAYERS = 5
SEED = 7
MODEL: dict[str, Any] = {
    "seq_length": 16,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.1,
}
STAGES: list[dict[str, Any]] = [
    {
        "name": "balanced",
        "steps": 7,
        "mixture": {"code": 0.5, "text": 0.5},
        "lr": {"warmup": "2 steps", "peak": 1e-2, "shape": "cosine", "final": 1e-3, "horizon": "30 steps"},
    },
    {"name": "text", "steps": 6, "mixture": {"code": 0.1, "text": 0.9}},
    {
        "name": "cooldown",
        "steps": 7,
        "seq_length": 24,
        "mixture": {"python": 0.2, "prose": 0.8},
        "lr": {"start": "current", "shape": "linear", "final": 1e-4},
    },
]


@dataclass(frozen=True)
class StepFacts:
    """What a step leaves in the log, the same on every rank."""

    step: int
    loss: float
    grad_norm: float
    by_source: tuple[tuple[int, float, int], ...]
    digest: str
    updated: bool


Curve = tuple[StepFacts, ...]


def write_corpora(folder: Path) -> Path:
    """Two sources of few documents, and their indexes, so that ranks find these made."""
    write_corpus(folder / "python", 1)
    write_corpus(folder / "prose", 2)
    list(_loader(resolve_run(config_of(folder)), one_process_mesh()))
    return folder


def config_of(corpora: Path) -> RunConfig:
    """The run, but for its layout and optimizer."""
    sources = {
        "python": {"group": "code", "data": [str(corpora / "python")], "max_epochs": 8},
        "prose": {"group": "text", "data": [str(corpora / "prose")], "max_epochs": 8},
    }
    return run_config(
        corpora,
        sources,
        [dict(stage) for stage in STAGES],
        model=MODEL,
        data={"cache": str(corpora / "cache")},
        train={"global_batch_size": ROWS, "micro_batch_size": 1},
        validation={"fraction": "0.1", "every": 1000},
    )


def shape_of(config: RunConfig, variant: Variant, layers: int) -> ModelShape:
    """The variant's model, long enough for every training stage."""
    longest = max(stage.seq_length or config.model.seq_length for stage in config.stages)
    model = config.model.model_copy(update={"num_hidden_layers": layers, **variant.model})
    return resolve_model(model, VOCAB, longest)


def engine_of(rank: Rank, key: Key, layers: int = LAYERS) -> Engine:
    """A new engine of this layout."""
    precision, variant = key[0], VARIANT[key[1]]
    shape = shape_of(rank.config, variant, layers)
    kernels = dataclasses.replace(default_kernels(rank.mesh.device), **rank.case.kernels)
    return build_engine(
        shape, variant.section, rank.case.section, rank.config.train, SEED, precision, rank.mesh, None, kernels
    )


def _loader(resolved: ResolvedRun, mesh: Mesh) -> Iterator[Batch]:
    rank, size = mesh.data.rank, mesh.data.size
    micro_batch = ROWS // size // max(2, mesh.layout.pipeline)  # gradients of two or more microbatches add up
    with BatchLoader(resolved.stream(), resolved.sources, micro_batch, 0, data_rank=rank, data_size=size) as loader:
        yield from loader


@dataclass
class Rank:
    """One process of a layout, with its batches: those of the whole run, or of what a ledger leaves of it."""

    case: LayoutCase
    config: RunConfig
    mesh: Mesh
    resolved: ResolvedRun
    batches: list[Batch]

    def train(self, engine: Engine, key: Key, batches: Sequence[Batch]) -> Curve:
        """Trains on some of its batches."""
        return tuple(self._step(engine, VARIANT[key[1]], batch) for batch in batches)

    def _step(self, engine: Engine, variant: Variant, batch: Batch) -> StepFacts:
        # every batch of a training stage has as many tokens, so that the position needs no second ledger
        consumed = sum(other.tokens for other in self.batches if other.step <= batch.step) + self._tokens_before
        result = engine.train_step(batch.microbatches, variant.lr * self.resolved.lr.rate(consumed))
        return StepFacts(
            batch.step,
            result.loss,
            result.grad_norm,
            tuple((source, total, count) for source, (total, count) in sorted(result.loss_by_source.items())),
            self._digest(batch),
            result.updated,
        )

    @property
    def _tokens_before(self) -> int:
        tokens = {stage.name: stage.seq_length for stage in self.resolved.schedule.stages}
        lengths = [tokens[stage["name"]] for stage in STAGES for _ in range(stage["steps"])]
        return sum(ROWS * length for length in lengths[: self.batches[0].step - 1])

    def _digest(self, batch: Batch) -> str:
        """Of the global batch: each data rank's rows count once."""
        place = self.mesh.place
        counts = place.pipeline == place.context == place.tensor == 0
        (total,) = self.mesh.sum_on_host([int(batch.digest, 16) if counts else 0])
        return f"{total & (2**64 - 1):016x}"


def open_rank(
    case: LayoutCase,
    corpora: Path,
    position: dict[str, Any] | None = None,
    configure: Callable[[Path], RunConfig] = config_of,
) -> Rank:
    """This process's place in the layout, and its batches from the position on."""
    config = configure(corpora)
    mesh = open_mesh(resolve_layout(case.section, case.ranks), launched(), 40) if case.ranks > 1 else None
    mesh = mesh or one_process_mesh()
    resolved = resolve_run(config, ledger=Ledger.from_json(position) if position else None)
    return Rank(case, config, mesh, resolved, list(_loader(resolved, mesh)))


Curves = dict[Key, Curve]


def whole_curves(
    case: LayoutCase,
    corpora: Path,
    keys: Sequence[Key],
    layers: int,
    plant: Callable[[], None] | None = None,
    configure: Callable[[Path], RunConfig] = config_of,
) -> Curves:
    """The body of a rank: twenty steps for each key. plant: is called first, and plants a fault. configure: gives the
    run of the corpora, in training stages called as those of STAGES."""
    if plant:
        plant()
    rank = open_rank(case, corpora, configure=configure)
    curves = {key: rank.train(engine_of(rank, key, layers), key, rank.batches) for key in keys}
    close_mesh()
    return curves


@dataclass(frozen=True)
class Errors:
    """The greatest relative differences between two curves."""

    loss: float
    grad_norm: float
    by_source: float

    @property
    def worst(self) -> float:
        return max(dataclasses.astuple(self))


def compare(ours: Curve, reference: Curve) -> Errors:
    """Over all steps; sources, counts and digests must be equal outright."""
    assert [fact.step for fact in ours] == [fact.step for fact in reference]
    by_source = []
    for mine, theirs in zip(ours, reference, strict=True):
        assert mine.digest == theirs.digest, f"step {mine.step}: another batch"
        assert mine.updated and theirs.updated
        assert [(s, n) for s, _, n in mine.by_source] == [(s, n) for s, _, n in theirs.by_source]
        by_source += [
            (mine_sum, their_sum)
            for (_, mine_sum, _), (_, their_sum, _) in zip(mine.by_source, theirs.by_source, strict=True)
        ]
    return Errors(
        _worst([(m.loss, t.loss) for m, t in zip(ours, reference, strict=True)]),
        _worst([(m.grad_norm, t.grad_norm) for m, t in zip(ours, reference, strict=True)]),
        _worst(by_source),
    )


def _worst(pairs: Sequence[tuple[float, float]]) -> float:
    return max(abs(mine - theirs) / max(abs(theirs), 1e-300) if mine != theirs else 0.0 for mine, theirs in pairs)
