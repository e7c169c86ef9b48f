"""The run in the user's words: one frozen, typed model for each table of the TOML file.

Every key that a user may write is declared here with its meaning; an unknown key is an error. Other parts of the
program are handed their own section, never the whole config.
"""

from __future__ import annotations

from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megatron.config.evaluation_section import EvaluationSection as EvaluationSection
from megatron.config.evaluation_section import check_evaluation
from megatron.config.health_section import HealthSection as HealthSection
from megatron.config.model_section import ModelSection as ModelSection
from megatron.config.quantities import Unit, WrongUnitError, parse_count, parse_quantity
from megatron.config.section import Section
from megatron.config.spikes_section import SpikesSection as SpikesSection
from megatron.config.spikes_section import check_spikes

Share = Annotated[Decimal, Field(ge=0, le=1)]


def _quantity_words(value: Any) -> Any:
    parse_quantity(value)
    return value


def _length_in(of: Unit) -> BeforeValidator:
    """Of a stage's length in one unit; a length in another has a key of its own."""

    def read(value: Any) -> int:
        try:
            return parse_count(value, of)
        except WrongUnitError as error:
            other = error.quantity
            raise ValueError(f"{error}, or say {other.unit} = {other.amount.normalize():f} instead") from None

    return BeforeValidator(read)


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
Tokens = Annotated[int, BeforeValidator(partial(parse_count, of="tokens")), Field(ge=0)]
Words = Annotated[int | str, BeforeValidator(_quantity_words)]
Weight = Annotated[Decimal, Field(ge=0, allow_inf_nan=False)]
Mixture = dict[str, Weight]


class RunSection(Section):
    """What the run is called and where it writes."""

    name: str = Field(min_length=1, description="name of the run, shown in logs and reports")
    output: str = Field(min_length=1, description="folder that receives checkpoints, metrics and the resolved config")
    seed: int = Field(1234, ge=0, lt=2**63, description="seeds initial weights and every source's order")


class TokenizerSection(Section):
    """Which tokenizer the indexed data were made with."""

    path: str = Field(description="SentencePiece tokenizer.model, Hugging Face tokenizer.json, or a tiktoken file")
    fim: tuple[str, str, str] | None = Field(
        None, description="special tokens for prefix, middle and suffix, where they are not of a known family"
    )


class SourceSection(Section):
    """One corpus: indexed files, or a size that stands for files not yet there."""

    group: str | None = Field(None, description="for example code or text; default: the source's own name")
    data: list[str] = Field(default_factory=list, description="prefixes of .bin/.idx, in order")
    tokens: Tokens | None = Field(None, description='planning without data: "503B"')
    documents: Count | None = Field(None, description="planning without data, for padded stages: how many it has")
    max_epochs: Annotated[Decimal, Field(gt=0)] = Field(Decimal(1), description="repetition cap over the whole run")
    dry: Literal["error", "repeat", "renormalise"] = Field("error", description="what happens at the cap")
    slice: tuple[Share, Share] = Field((Decimal(0), Decimal(1)), description="share of its documents, by position")
    piece_tokens: int | None = Field(None, ge=1, description="longer documents are cut; default 8 x model.seq_length")
    allow_overlap: bool = Field(False, description="permits documents that another source also holds")
    fim: FimSection | None = Field(None, description="fill-in-the-middle; the tokenizer needs its three sentinels")

    @model_validator(mode="after")
    def _check(self) -> SourceSection:
        if not self.data and self.tokens is None:
            raise ValueError("needs data = [prefixes of .bin/.idx], or tokens = a size to plan with")
        if self.slice[0] >= self.slice[1]:
            raise ValueError(f"slice {list(map(str, self.slice))} is empty: its start must be below its end")
        if None not in (self.tokens, self.documents) and (self.documents or 0) > (self.tokens or 0):
            raise ValueError(
                f"{self.documents:,} documents have more than {self.tokens:,} tokens: correct one of the two"
            )
        return self


class DataSection(Section):
    """How samples reach the model."""

    cache: str | None = Field(None, description="folder for epoch indexes; default OUTPUT/../index-cache")
    prefetch: int = Field(4, ge=0, description="global batches prepared ahead of the step, 0 for none")
    workers: int = Field(1, ge=1, description="threads that read batches; the order is the same for any number")


class ValidationSection(Section):
    """Held-out documents of every source, by keyed hash; never trained on by any stage or arm."""

    fraction: Annotated[Decimal, Field(ge=0, lt=1)] = Decimal("0.005")
    every: int = Field(500, ge=1, description="steps")
    samples: int = Field(64, ge=1, description="at most so many samples for each source")


class TrainSection(Section):
    """Batch, precision and how a step that is not finite is treated."""

    global_batch_size: int = Field(ge=1, description="sequences in an optimizer step")
    micro_batch_size: int = Field(1, ge=1, description="sequences in one forward pass")
    precision: Literal["auto", "fp64", "fp32", "bf16"] = Field("auto", description="auto: measured once, at step 0")
    gradients: Literal["fp32", "bf16"] = Field(
        "fp32", description="of bf16: in what they are added up over a step; bf16 where memory asks (one process)"
    )
    z_loss: float = Field(
        0.0, ge=0, description="adds this x log(sum of exp(logits))^2 to what is minimised; reported losses lack it"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that is spread over all words")
    tokens: Tokens | None = Field(None, description="length of the whole run, for stages given as a share")
    max_non_finite: int = Field(10, ge=1, description="steps in a row without an update before the run stops")


class OptimizerSection(Section):
    """AdamW, Muon with AdamW, or plain SGD; biases and norms are never decayed."""

    name: Literal["adamw", "sgd", "muon"] = Field(
        "adamw", description="muon: for the matrices of layers; embedding, head, norms and biases stay with AdamW"
    )
    implementation: Literal["torch", "apex", "triton"] = Field("torch", description="whose fused kernel runs AdamW")
    master_weights: Literal["whole", "split"] = Field(
        "whole",
        description="of bf16: whole float32 beside the bf16 copy that computes, or split, 16 low bits beside it: the "
        "same numbers in 2 bytes a parameter less (one process, implementation triton)",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd only")
    muon_momentum: float = Field(0.95, ge=0, lt=1, description="muon only; with Nesterov's look-ahead")
    clip_grad_norm: float = Field(1.0, ge=0, description="0: no clipping")


class LRSection(Section):
    """A learning rate over tokens, from the training stage that says it until one says another."""

    start: Literal["current"] | Annotated[float, Field(ge=0)] | None = Field(None, description="default 0 with warmup")
    start_factor: float | None = Field(None, gt=0, description="starts at this fraction of the current rate")
    warmup: Words = Field(0, description='tokens, "500 steps" or "2%" of the stage')
    peak: float | None = Field(None, ge=0, description="default: start")
    shape: Literal["constant", "linear", "cosine", "1-sqrt", "exponential"] = "constant"
    final: float | None = Field(None, ge=0, description="default: peak")
    horizon: Words | None = Field(None, description="where final is reached; default: the stage's own length")


class FimSection(Section):
    """Fill-in-the-middle: documents are cut in three and the middle comes last, drawn anew each epoch."""

    rate: Share = Field(description="share of the documents' parts that are rearranged")
    spm: Share = Field(Decimal("0.5"), description="of those, the share with the suffix first; others: prefix first")


class PhaseSection(Section):
    """One step of a stepwise mixture."""

    share: Annotated[Decimal, Field(gt=0, le=1)] | None = Field(None, description="of the stage; default equal parts")
    mixture: Mixture
    ramp_to: Mixture | None = Field(None, description="mixture at the phase's end, linear from mixture")


class BlendSection(Section):
    """One part of a blend: the mixture of another stage or template, or one of its own."""

    weight: Annotated[Decimal, Field(gt=0, allow_inf_nan=False)] = Field(description="share of the blend")
    like: str | None = Field(None, description="name of an earlier stage or of a template")
    mixture: Mixture | None = None


class ShapeSection(Section):
    """A part of a training stage with a sequence length and a batch of its own."""

    length: Words | None = Field(
        None, description='tokens, "500 steps", "9000 samples" or "10%" of the stage; the last part takes what is left'
    )
    seq_length: int | None = Field(None, ge=1, description="default the stage's")
    global_batch_size: int | None = Field(None, ge=1, description="default the stage's")


class BatchRampSection(Section):
    """The batch grows by equal steps to the stage's global_batch_size, as Megatron's --rampup-batch-size."""

    start: int = Field(ge=1, description="sequences in the first step")
    increment: int = Field(ge=1, description="sequences added at each step of the ramp")
    over: Words = Field(description='tokens, "500 steps", "9000 samples" or "10%" of the stage, shared out equally')


class EpochsSection(Section):
    """A stage as long as it takes to see one source so many times."""

    source: str
    count: Annotated[Decimal, Field(gt=0)]


class TakeSection(Section):
    """What a stage takes over at its start: "continue", "fresh", or the path of a checkpoint or a model folder."""

    weights: str = Field("continue", description='"continue", "fresh", a checkpoint, or a Hugging Face folder')
    optimizer: str = Field("continue", description='"continue", "fresh", or a checkpoint')
    cursors: str = Field("continue", description='"continue" or a checkpoint, of this run or of another')


class StageSection(Section):
    """A training stage: how long, of what, at which learning rate. Exactly one length is given."""

    name: str = Field(min_length=1)
    tokens: Annotated[int, _length_in("tokens"), Field(ge=0)] | None = None
    steps: Annotated[int, _length_in("steps"), Field(ge=0)] | None = None
    samples: Annotated[int, _length_in("samples"), Field(ge=0)] | None = None
    share: Annotated[Decimal, Field(gt=0, le=1)] | None = Field(None, description="of train.tokens")
    epochs: EpochsSection | None = None
    mixture: Mixture | None = Field(None, description="weights of groups or sources; normalised, and said so")
    mixture_tokens: dict[str, Tokens] | None = Field(None, description="absolute tokens instead of weights")
    mixture_epochs: dict[str, Weight] | None = Field(None, description="epochs of each source instead of weights")
    adjust: Mixture | None = Field(
        None, description="the mixture before it with these shares set, the others in proportion, instead of mixture"
    )
    within: dict[str, Mixture] = Field(
        default_factory=dict, description="by group: weights of its sources among themselves, instead of by size"
    )
    phases: list[PhaseSection] | None = Field(None, description="a stepwise mixture instead of mixture")
    like: str | None = Field(None, description="the mixture of an earlier stage or of a template, instead of mixture")
    reverse: str | None = Field(None, description="the mixture of such a stage in reversed time, instead of mixture")
    aggregate_of: list[str] | None = Field(
        None, description="one constant mixture with the same totals as these stages or templates, instead of mixture"
    )
    blend: list[BlendSection] | None = Field(None, description="several mixtures in shares, instead of mixture")
    ramp_to: Mixture | None = Field(None, description="mixture at the stage's end, linear from mixture")
    strict: bool = Field(False, description="refuse weights that do not sum to 1")
    cursor: Literal["continue", "restart"] = Field("continue", description="restart: every source from its beginning")
    lr: LRSection | None = Field(None, description="absent: the schedule before it goes on")
    take: TakeSection = TakeSection()
    seq_length: int | None = Field(None, ge=1, description="default model.seq_length")
    global_batch_size: int | None = Field(None, ge=1, description="default train.global_batch_size")
    shapes: list[ShapeSection] | None = Field(None, description="sequence length and batch that change within it")
    batch_ramp: BatchRampSection | None = Field(None, description="a growing batch at the stage's start")
    fim: dict[str, Share] = Field(
        default_factory=dict, description="fill-in-the-middle rates of this stage by source or group, instead of theirs"
    )
    objective: Literal["language-modelling", "instruction"] = Field(
        "language-modelling", description="the loss on every token, or on those that the sources' masks mark"
    )
    whole_loss: list[str] = Field(
        default_factory=list, description="instruction: sources or groups whose loss is on every token all the same"
    )
    packing: Literal["packed", "padded"] = Field(
        "packed", description="documents one behind the other, or one in each sample and the rest of it empty"
    )
    too_long: Literal["error", "drop", "truncate"] = Field(
        "error", description="padded: what happens to documents that are longer than a sample; counted in the ledger"
    )
    weigh_by: Literal["samples", "loss-tokens"] = Field(
        "samples", description="what the mixture's weights are shares of; loss-tokens: as the sources' masks count them"
    )

    @model_validator(mode="after")
    def _check(self) -> StageSection:
        if self.objective != "instruction" and self.whole_loss:
            raise ValueError(
                "whole_loss needs objective = 'instruction': without it the loss is on every token of every source"
            )
        if self.objective != "instruction" and self.weigh_by == "loss-tokens":
            raise ValueError(
                "weigh_by = 'loss-tokens' needs objective = 'instruction': without it every token is a loss token, so "
                "that shares of samples are shares of loss tokens"
            )
        if self.packing != "padded" and self.too_long != "error":
            raise ValueError(
                f"too_long = {self.too_long!r} needs packing = 'padded': packed samples hold documents of any length"
            )
        return self


class ParallelSection(Section):
    """The layout. It changes speed and memory, never the loss curve."""

    engine: Literal["torch", "deepspeed"] = "torch"
    tensor: int = Field(1, ge=1, description="ranks that share each layer's matrices")
    sequence: bool = Field(False, description="norms and residuals cut along the sequence over the tensor ranks")
    pipeline: int = Field(1, ge=1, description="ranks that share the layers out")
    virtual: int = Field(2, ge=1, description="pipeline stages on each rank, for schedule = interleaved")
    context: int = Field(1, ge=1, description="ranks that share each sequence")
    context_method: Literal["auto", "all-to-all", "gather"] = Field(
        "auto", description="attention over context ranks: heads exchanged, or keys and values gathered"
    )
    schedule: Literal["1f1b", "interleaved", "zero-bubble", "zbv"] = "1f1b"
    data_shard: Literal["none", "optimizer", "gradients", "full"] = Field(
        "none", description="what is cut over the data ranks, as ZeRO 0, 1, 2, 3"
    )
    data_replicate: int = Field(1, ge=1, description="groups of data ranks that hold the same shards (hybrid shard)")
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_policy: Literal["attention", "operations"] = Field(
        "attention", description="selective: forget the attention core, or all but the outputs of matrix products"
    )
    recompute_layers: int | None = Field(None, ge=0, description="so many first layers of each stage; default all")
    offload: Literal["none", "optimizer"] = Field("none", description="deepspeed: optimizer state in host memory")
    deepspeed_config: str | None = Field(None, description="DeepSpeed's own JSON, for its own knobs")


Backend = Literal["auto", "eager", "compile", "triton"]


class KernelsSection(Section):
    """Which implementation of each operation runs. auto: the quickest that can run here, measured once at step 0 on a
    GPU, kept with the checkpoint; on CPUs eager, which is measured in docs/performance.md."""

    norm: Backend = "auto"
    rope: Backend = "auto"
    activation: Backend = "auto"
    cross_entropy: Literal["auto", "eager", "triton"] = "auto"
    product: Literal["auto", "torch", "onednn"] = Field(
        "auto", description="whose float32 matrix products run on CPUs; auto: the quicker, measured at step 0"
    )
    attention: Literal["auto", "blockwise", "sdpa", "varlen", "cudnn", "flex", "unfused"] = "auto"
    compile: Literal["auto", "none", "layers"] = Field(
        "auto", description="layers: each layer is compiled in place; auto: on GPUs, where the layout allows it"
    )
    cuda_graphs: bool = Field(
        False, description="microbatches recorded once and replayed, for small models: one process of torch in bf16"
    )
    fp8: bool = Field(False, description="products of layers in fp8 (tensorwise scales); GPUs since Ada and Hopper")
    weight_gradients: Literal["separate", "fused"] = Field(
        "separate",
        description="of layers in bf16: rounded and added in a pass for each microbatch, or fused, added in float32 by "
        "the product that makes them (one process of torch, without CUDA graphs and fp8)",
    )


class CheckpointSection(Section):
    """When the run saves; it always does at the end of a training stage."""

    every: int = Field(1000, ge=1, description="steps")
    keep: int = Field(3, ge=1, description="newest checkpoints kept; those at stage ends are kept besides")
    keep_steps: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list, description="steps after which the run saves besides, and keeps what it saved"
    )
    asynchronous: bool = Field(False, description="training goes on while files are written")


class LogSection(Section):
    """metrics.jsonl is always written; the rest are optional sinks."""

    every: int = Field(10, ge=1, description="steps between lines on the terminal")
    tensorboard: bool = False
    wandb_project: str | None = None


class RunConfig(Section):
    """A whole run."""

    run: RunSection
    tokenizer: TokenizerSection
    model: ModelSection
    sources: Annotated[dict[str, SourceSection], Field(min_length=1)]
    data: DataSection = DataSection()
    validation: ValidationSection = ValidationSection()
    train: TrainSection
    optimizer: OptimizerSection = OptimizerSection()
    stages: Annotated[list[StageSection], Field(min_length=1)]
    templates: list[StageSection] = Field(
        default_factory=list,
        description="stages that are never trained, for like, reverse, aggregate_of and blend",
    )
    parallel: ParallelSection = ParallelSection()
    kernels: KernelsSection = KernelsSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    health: HealthSection = HealthSection()
    spikes: SpikesSection = SpikesSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        names = [stage.name for stage in [*self.templates, *self.stages]]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"stages: the name {twice[0]!r} is used twice; give each stage and template its own name")
        check_evaluation(self.evaluation, self.checkpoint.every, bool(self.validation.fraction))
        check_spikes(self.spikes, self.checkpoint.every, self.checkpoint.keep)
        return self
