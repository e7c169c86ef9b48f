"""The composition root: the one place that knows every part of a run and puts them together."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron.checkpoint.board import Board
from megatron.checkpoint.manager import CheckpointManager, CheckpointRef
from megatron.config.errors import DataError
from megatron.config.layout import Layout, resolve_layout
from megatron.config.layout_checks import check_layout, notes_of_layout
from megatron.config.load import config_to_tables, config_to_toml
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.quantities import format_count
from megatron.config.schema import RunConfig
from megatron.data.fim import sentinels_of
from megatron.data.ledger import Ledger
from megatron.data.ledger_events import Event
from megatron.data.loader import BatchLoader
from megatron.data.native import backend_name
from megatron.data.schedule import Schedule
from megatron.data.sources import TokenizerIdentity
from megatron.engines.base import Engine
from megatron.engines.build import build_engine
from megatron.kernels.choice import Kernels
from megatron.metrics.console import Console
from megatron.metrics.sinks import JsonlSink, Sink
from megatron.parallel.mesh import Mesh
from megatron.planner.layout_plan import batches_of
from megatron.planner.resolve import ResolvedRun, resolve_run
from megatron.tokenizers.base import Tokenizer
from megatron.tokenizers.load import load_tokenizer
from megatron.trainer.chosen import Chosen, choose
from megatron.trainer.evaluating import Evaluations, check_can_evaluate
from megatron.trainer.held_out import held_out_of, unread_masks
from megatron.trainer.hooks import Checkpoint, CompareOrder, Log, StopWhereNothingIsLearnt, Validate
from megatron.trainer.job import Job, OneProcess
from megatron.trainer.loop import Run, train
from megatron.trainer.resume import Start, check_shape, find_checkpoint, settle
from megatron.trainer.rolling_back import RollingBack, finder, open_again, take_up
from megatron.trainer.run_folder import RunFolder
from megatron.trainer.saving import Saver, constants_of, files_of
from megatron.trainer.spike_bounds import leaps
from megatron.trainer.spikes import GoBack, SpikeWatch
from megatron.trainer.state import TrainerState
from megatron.trainer.stopping import Stopping
from megatron.trainer.takeover import StageStart, check_goes_on, check_takes


@dataclass
class Built:
    """A run that is ready for its first step. `close` ends what it opened. again: goes back, and gives the run."""

    run: Run
    loader: BatchLoader
    sinks: list[Sink]
    schedule: Schedule
    manager: CheckpointManager
    evaluations: Evaluations
    again: Callable[[GoBack], Built] = field(repr=False)

    def train(self) -> str:
        """Trains as `loop.train`, over again from an earlier step as often as the policy about spikes says."""
        while True:
            try:
                return train(self.run)
            except GoBack as back:
                self.evaluations.close()
                self.loader.close()
                vars(self).update(vars(self.again(back)))

    @property
    def complete(self) -> bool:
        """Whether every sample of the schedule is consumed."""
        return self.run.state.consumed_samples >= self.schedule.samples

    def finish(self) -> None:
        """Waits for a save that runs beside training, raising what went wrong in it; where the run is complete, for
        evaluations, too."""
        self.manager.finish()
        if self.complete:
            self.evaluations.finish()

    def close(self) -> None:
        """Ends the loader's thread and evaluations that still run, and closes the sinks."""
        self.evaluations.close()
        self.loader.close()
        for sink in self.sinks:
            sink.close()


@dataclass(frozen=True)
class ResolvedTimeline:
    """What the loop asks, answered by the resolved schedule and learning rate."""

    resolved: ResolvedRun
    ends: frozenset[int]

    def learning_rate(self, consumed_tokens: int) -> float:
        """The rate of the step that ends when so many tokens are consumed."""
        return self.resolved.lr.rate(consumed_tokens)

    def ends_training_stage(self, consumed_samples: int) -> bool:
        """Whether a training stage ends there."""
        return consumed_samples in self.ends


def build(
    config: RunConfig,
    start: Start,
    allow_lr_change: bool,
    folder: RunFolder,
    state: TrainerState,
    console: Console,
    stopping: Stopping,
    job: Job | None = None,
) -> Built | None:
    """The run of a config, at the position that its folder says; `state` is filled in. None: it is complete.

    All ranks of the job build together. Every check that can be made before training is made here, before the ranks
    join and before anything in the folder is moved. Raises every StagemixError but NonFiniteError.
    """
    job = job or OneProcess()
    layout = resolve_layout(config.parallel, job.who.world_size)
    tokenizer = load_tokenizer(config.tokenizer.path)
    check_can_evaluate(config.evaluation)
    board = job.checkpoint_board()
    manager = CheckpointManager(folder.checkpoints, config.checkpoint.keep, board=board, say=console.say)
    job.at("looks for a checkpoint")
    found = find_checkpoint(start, folder, manager, console.say, job.writes)
    resolved = job.in_turn("opens the data", lambda: _resolve(config, tokenizer, found, allow_lr_change, job, layout))
    job.agree("data", data_facts(resolved, tokenizer), DataError)
    if found:
        vars(state).update(vars(TrainerState.from_json(found.state)))
    events = take_up(config.spikes, folder, state, job, console.say)
    if state.consumed_samples >= resolved.schedule.samples:
        _evaluate_complete_run(config, resolved, folder, state, console, manager, stopping, job)
        return None
    shape = _checked_shape(config, tokenizer, resolved, found, board)
    chosen = choose(config, shape, found, job)
    _check_layout(config, layout, shape, resolved, chosen.precision.name)
    mesh = job.open_mesh(layout)
    job.at("makes the model")
    engine = _engine(config, shape, chosen, found, mesh)
    run_id = job.share("run id", lambda: found.state["run_id"] if found else uuid.uuid4().hex[:12])
    sinks = _optional_sinks(config, folder, state, run_id) if job.writes else []
    settle(found, folder, manager, console.say, job.writes)
    resolved_words = config_to_toml(config)
    if job.writes:
        folder.write("config.toml", resolved_words)
        sinks = [JsonlSink(folder.metrics), console, *sinks]
    constants = constants_of(run_id, shape.to_json(), chosen.precision, chosen.kernels, tokenizer, resolved)
    files = files_of(resolved_words, tokenizer)
    saver = Saver(manager, state, engine, sinks, constants, resolved, files, config.checkpoint.asynchronous)
    lines = description(config, resolved, engine, chosen, found, state)
    lines += [f"  note: {note}" for note in notes_of_layout(config.parallel, layout, shape, job.who.local_world_size)]
    _say_what_runs(lines, resolved_words, folder, console.say)
    console.begin(resolved.schedule.tokens, state.consumed_tokens)
    begin = StageStart(config.stages, shape, engine, state, config.run.seed, console.say, board)

    def again(back: GoBack) -> Built:
        events = RollingBack(folder, manager, engine, state, sinks, job, console.say)(back)
        then = open_again(job, back, lambda: _resolve(config, tokenizer, back.found, allow_lr_change, job, layout))
        earlier = replace(saver, resolved=then)
        return _assemble(config, then, earlier, begin, stopping, job, mesh, folder, console.say, events, again)

    return _assemble(config, resolved, saver, begin, stopping, job, mesh, folder, console.say, events, again)


def _checked_shape(
    config: RunConfig, tokenizer: Tokenizer, resolved: ResolvedRun, found: CheckpointRef | None, board: Board
) -> ModelShape:
    """The model's, which is that of the checkpoint, and fits what stages will take over."""
    longest = max(stage.seq_length for stage in resolved.schedule.stages)
    shape = resolve_model(config.model, tokenizer.vocab_size, longest)
    check_takes(config.stages[len(resolved.ledger.stages) :], shape, board)
    if found:
        check_shape(found, shape)
        check_goes_on(found, config.stages, resolved.schedule)
    return shape


def _say_what_runs(lines: Sequence[str], resolved_words: str, folder: RunFolder, say: Callable[[str], None]) -> None:
    for line in lines:
        say(line)
    say(f"resolved config, kept in {folder.path / 'config.toml'} and with every checkpoint:")
    for line in resolved_words.splitlines():
        say(f"  {line}".rstrip())


def _assemble(
    config: RunConfig,
    resolved: ResolvedRun,
    saver: Saver,
    begin_training_stage: Callable[[str], None],
    stopping: Stopping,
    job: Job,
    mesh: Mesh,
    folder: RunFolder,
    say: Callable[[str], None],
    events: Sequence[Event],
    again: Callable[[GoBack], Built],
) -> Built:
    """The loop's pieces around what the saver already holds: state, engine, sinks. events: of the ledger, new ones."""
    train, validation, names = config.train, config.validation, sorted(resolved.sources)
    state, engine, sinks, clock = saver.state, saver.engine, saver.sinks, job.clock()
    held_out = held_out_of(resolved, config.model.seq_length, train.micro_batch_size, validation.samples)
    loader = _loader(config, resolved, state, mesh)
    watch = _watch(config, resolved, saver, events, say)
    ends = frozenset(stage.end_sample for stage in resolved.schedule.stages)
    longest = max((len(part.microbatches) for part in held_out.values()), default=0)
    stopping.plan(saver, mesh, clock, train, validation.every, longest)
    evaluations = Evaluations(
        config.evaluation, folder, job, state, sinks, saver.manager, clock, ends, say, stopping.reason
    )
    evaluations.begin()
    kept = frozenset(config.checkpoint.keep_steps)
    checkpoint = Checkpoint(config.checkpoint.every, saver, clock, saver.poll, stopping.saves_now, kept)
    run = Run(
        state=state,
        engine=engine,
        batches=loader,
        timeline=ResolvedTimeline(resolved, ends),
        begin_training_stage=begin_training_stage,
        asked=stopping.asked,
        over_ranks=job.over_ranks(mesh),
        hooks=[
            lambda step: job.at("after a step", step.state.step),
            Log(sinks, names, clock, engine.describe()),
            stopping.after_step,
            CompareOrder(resolved.ledger.order),
            watch,
            Validate(validation.every, engine, held_out, names, sinks, clock),
            StopWhereNothingIsLearnt(train.max_non_finite, saver.manager.newest_name),
            checkpoint,
            evaluations,
        ],
        clock=clock,
        looks_at=lambda step: step % config.checkpoint.every == 0 or step % validation.every == 0 or step in kept,
        save_at_stop=lambda: stopping.at_stop(checkpoint.at_stop),
        launch=watch.launch,
    )
    return Built(run, loader, list(sinks), resolved.schedule, saver.manager, evaluations, again)


def _loader(config: RunConfig, resolved: ResolvedRun, state: TrainerState, mesh: Mesh) -> BatchLoader:
    return BatchLoader(
        resolved.stream(),
        resolved.sources,
        config.train.micro_batch_size,
        config.data.prefetch,
        workers=config.data.workers,
        pin_memory=True,  # of effect only where there is a CUDA device to copy to
        data_rank=mesh.data.rank,
        data_size=mesh.data.size,
        passes_over=state.spikes.passes_over,
    )


def _watch(
    config: RunConfig, resolved: ResolvedRun, saver: Saver, events: Sequence[Event], say: Callable[[str], None]
) -> SpikeWatch:
    known, names = [*resolved.ledger.events, *events], sorted(resolved.sources)
    starts, limit = leaps(resolved.schedule), config.train.max_non_finite
    return SpikeWatch(config.spikes, saver.state, starts, known, names, limit, finder(saver.manager, say), say)


def _evaluate_complete_run(
    config: RunConfig,
    resolved: ResolvedRun,
    folder: RunFolder,
    state: TrainerState,
    console: Console,
    manager: CheckpointManager,
    stopping: Stopping,
    job: Job,
) -> None:
    """All ranks: what is still to be evaluated of a run that has nothing to train any more."""
    sinks: list[Sink] = [JsonlSink(folder.metrics), console] if job.writes else []
    ends = frozenset(stage.end_sample for stage in resolved.schedule.stages)
    evaluations = Evaluations(
        config.evaluation, folder, job, state, sinks, manager, job.clock(), ends, console.say, stopping.reason
    )
    stopping.begins()
    try:
        evaluations.begin()
        evaluations.finish()
        if job.writes:  # a kill in the run's last save left it undone
            manager.sweep()
            manager.retire()
    finally:
        evaluations.close()
        for sink in sinks:
            sink.close()


def _resolve(
    config: RunConfig,
    tokenizer: Tokenizer,
    found: CheckpointRef | None,
    allow_lr_change: bool,
    job: Job,
    layout: Layout,
) -> ResolvedRun:
    identity = TokenizerIdentity.of(tokenizer)
    ledger = Ledger.from_json(found.state["data"]) if found else None
    sentinels = sentinels_of(tokenizer, config.tokenizer.fim)
    resolved = resolve_run(
        config,
        ledger=ledger,
        tokenizer=identity,
        fim_sentinels=sentinels,
        allow_lr_change=allow_lr_change,
        layout=layout,
    )
    if job.who.world_size > 1:
        _prepare_epochs(resolved)
    return resolved


def _prepare_epochs(resolved: ResolvedRun) -> None:
    """Opens or builds the epoch indexes that the first batch needs, so that ranks in turn build each once."""
    consumed = resolved.ledger.consumed_samples
    if consumed >= resolved.schedule.samples:
        return
    for name in resolved.schedule.locate(consumed)[0].weights.sources:
        order, record = resolved.sources[name].order, resolved.ledger.sources.get(name)
        if order is not None and order.epoch_tokens:
            order.prepare((record.cursor.get("cursor", 0) if record else 0) // order.epoch_tokens)


def _check_layout(config: RunConfig, layout: Layout, shape: ModelShape, resolved: ResolvedRun, precision: str) -> None:
    batches = batches_of(resolved.schedule, config.model.seq_length if config.validation.fraction else None)
    check_layout(config.parallel, layout, shape, config.train, config.optimizer, batches, precision)


def _engine(config: RunConfig, shape: ModelShape, chosen: Chosen, found: CheckpointRef | None, mesh: Mesh) -> Engine:
    # A new run's random state is a function of its seed alone, never of what the process did before.
    torch.manual_seed(config.run.seed)
    sections = (config.optimizer, config.parallel, config.train)
    weights = found.model() if found else None
    kernels = Kernels(**chosen.kernels.kernels)
    engine = build_engine(shape, *sections, config.run.seed, chosen.precision.name, mesh, weights, kernels)
    if found:
        engine.load_optimizer_state(found.optimizer())
        engine.load_rng_state(found.rng())
    return engine


def description(
    config: RunConfig,
    resolved: ResolvedRun,
    engine: Engine,
    chosen: Chosen,
    found: CheckpointRef | None,
    state: TrainerState,
) -> list[str]:
    """What runs, in the words that are printed once at the start (law T3)."""
    schedule = resolved.schedule
    stages = ", ".join(f"{s.name} {format_count(s.tokens)}" for s in schedule.stages)
    where = f"goes on from {found.path} (step {state.step} of {schedule.steps})" if found else "begins at step 0"
    lines = [
        f"run {config.run.name} {where}",
        f"  {format_count(engine.parameter_count())} parameters, {schedule.steps} steps, "
        f"{format_count(schedule.tokens)} tokens in {len(schedule.stages)} training stages: {stages}",
        f"  precision {chosen.precision.reason}",
        f"  kernels {chosen.kernels.reason}",
        f"  data index: {backend_name()}",
    ]
    lines += [f"  {key}: {value}" for key, value in engine.describe().items() if key != "precision"]
    lines += [f"  note: stage {s.name!r}: {note}" for s in schedule.stages for note in s.notes]
    lines += [f"  note: {note}" for note in unread_masks(resolved)]
    return lines + [f"  note: {event['event']} in stage {event['stage']!r}" for event in resolved.events]


def data_facts(resolved: ResolvedRun, tokenizer: Tokenizer) -> dict[str, str]:
    """What must be the same data on every rank: the fingerprints of the tokenizer and of each source, loss masks."""
    sources = {f"the fingerprint of source {name!r}": s.fingerprint for name, s in sorted(resolved.sources.items())}
    masks = {name: mask for stage in resolved.schedule.stages for name, mask in stage.objective.masks.items()}
    sources |= {f"the loss mask of source {name!r}": mask for name, mask in sorted(masks.items())}
    return {"the fingerprint of the tokenizer": tokenizer.fingerprint, **sources}


def _optional_sinks(config: RunConfig, folder: RunFolder, state: TrainerState, run_id: str) -> list[Sink]:
    sinks: list[Sink] = []
    if config.log.tensorboard:
        from megatron.metrics.tensorboard_sink import TensorBoardSink

        sinks.append(TensorBoardSink(folder.path / "tensorboard", state.step + 1))
    if config.log.wandb_project:
        from megatron.metrics.wandb_sink import WandbSink

        tables: dict[str, Any] = config_to_tables(config)
        sinks.append(WandbSink(config.log.wandb_project, config.run.name, run_id, tables))
    return sinks
