"""Which config keys decide what a training stage leaves behind, and which do not: the one list, with reasons.

Two arms share a node where everything that counts is equal up to its end. `identity.py` reads this list; a key of the
config that stands in none of its rows fails a test, so that a new key has to be thought about here.

    counts    its value is part of the node's identity
    resolved  counts by what it comes to: sizes, whole weights, sample numbers, laws of the learning rate
    never     changes no result, or none that is not within the tolerance between layouts (law T1)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

from pydantic import BaseModel

from megatron.config.schema import RunConfig, SourceSection

Ruling = Literal["counts", "resolved", "never"]


@dataclass(frozen=True)
class Row:
    """Keys of one table with one ruling. table: dotted; entries of sources and lists of stages stand as "*"."""

    table: str
    ruling: Ruling
    keys: str
    why: str


ROWS = (
    Row("run", "counts", "seed", "initial weights and every source's order"),
    Row("run", "never", "name output", "names and places"),
    Row("tokenizer", "resolved", "path", "by the tokenizer's fingerprint, not by its place; by path until it is there"),
    Row("tokenizer", "counts", "fim", "sentinels of fill-in-the-middle, where a stage has a rate"),
    Row(
        "model",
        "resolved",
        "preset vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "intermediate_size hidden_act gated_mlp norm norm_eps norm_place norm_unit_offset attention_bias "
        "query_key_value_bias qk_norm mlp_bias parallel_block shared_norm position_embedding max_position_embeddings "
        "rope_theta rope_scaling partial_rotary_factor sliding_window sliding_pattern rope_local_theta "
        "tie_word_embeddings embedding_multiplier attention_multiplier logit_multiplier initializer_range "
        "hidden_dropout document_mask",
        "the decoder that they come to, whether a preset or its fields say it; the limit of rotary positions is none",
    ),
    Row("model", "resolved", "seq_length", "by the sequence lengths of stages and the default of piece_tokens"),
    Row(
        "model.rope_scaling",
        "resolved",
        "rope_type factor low_freq_factor high_freq_factor original_max_position_embeddings attention_factor beta_fast "
        "beta_slow",
        "by the decoder",
    ),
    Row("model", "never", "family", "what an export is to be"),
    Row(
        "sources.*",
        "resolved",
        "data tokens documents",
        "by the content of the files; by the declared size until they are there",
    ),
    Row("sources.*", "counts", "slice", "which documents, beside the content"),
    Row("sources.*", "resolved", "group", "of the sources that have a weight: ties in the order go by group"),
    Row("sources.*", "resolved", "piece_tokens", "where long documents are cut"),
    Row("sources.*", "resolved", "fim", "by the rates of the stage"),
    Row("sources.*.fim", "resolved", "rate spm", "by the rates of the stage"),
    Row(
        "sources.*",
        "resolved",
        "max_epochs dry",
        'by the weights, where dry = "renormalise" takes a source out; else they are checks, and what they allow is '
        "trained the same",
    ),
    Row("sources.*", "never", "allow_overlap", "permits documents in two sources; which, their contents say"),
    Row("data", "never", "cache prefetch workers", "the order is the same for any (law M3)"),
    Row("validation", "counts", "fraction", "documents that are held out of training"),
    Row("validation", "never", "every samples", "when held-out documents are looked at, and how many"),
    Row("train", "resolved", "global_batch_size tokens", "by the stages' samples and batches"),
    Row("train", "counts", "precision gradients z_loss label_smoothing", "what a step computes"),
    Row("train", "never", "micro_batch_size", "layout"),
    Row("train", "never", "max_non_finite", "when a run gives up; a run that does leaves no node"),
    Row("optimizer", "counts", "name weight_decay clip_grad_norm", "the update"),
    Row("optimizer", "counts", "betas eps", "the update, of adamw and muon"),
    Row("optimizer", "counts", "momentum", "the update, of sgd"),
    Row("optimizer", "counts", "muon_momentum", "the update, of muon"),
    Row("optimizer", "never", "implementation master_weights", "whose kernel runs the same update"),
    Row("stages.*", "never", "name", "a name"),
    Row("stages.*", "resolved", "tokens steps samples share epochs", "by its samples"),
    Row("stages.*.epochs", "resolved", "source count", "by its samples"),
    Row(
        "stages.*",
        "resolved",
        "mixture mixture_tokens mixture_epochs adjust within phases like reverse aggregate_of blend ramp_to",
        "by whole weights over one denominator, sample by sample",
    ),
    Row("stages.*.phases.*", "resolved", "share mixture ramp_to", "by the weights"),
    Row("stages.*.blend.*", "resolved", "weight like mixture", "by the weights"),
    Row("stages.*", "never", "strict", "refuses, and changes nothing"),
    Row("stages.*", "counts", "cursor", "where sources are read from"),
    Row("stages.*", "resolved", "lr", "by the law in force, whichever stage says it; as a resume compares it"),
    Row(
        "stages.*.lr",
        "resolved",
        "start start_factor warmup peak shape final horizon",
        "by the law in tokens; past the node's end too, since a stage after it may go on with it",
    ),
    Row("stages.*", "resolved", "take", "what is taken over"),
    Row("stages.*.take", "resolved", "weights optimizer cursors", "by the content of a checkpoint, not by its place"),
    Row("stages.*", "resolved", "seq_length global_batch_size shapes batch_ramp", "by the shapes, sample by sample"),
    Row("stages.*.shapes.*", "resolved", "length seq_length global_batch_size", "by the shapes"),
    Row("stages.*.batch_ramp", "resolved", "start increment over", "by the shapes"),
    Row("stages.*", "resolved", "fim", "by the rates of its sources"),
    Row("stages.*", "resolved", "objective whole_loss", "by the loss masks that are read, and their content"),
    Row("stages.*", "resolved", "weigh_by", "by the weights"),
    Row("stages.*", "counts", "packing too_long", 'whole documents or windows; where packing is not "packed"'),
    Row("parallel", "never", "engine tensor sequence pipeline virtual context context_method schedule", "layout"),
    Row("parallel", "never", "data_shard data_replicate offload deepspeed_config", "layout"),
    Row("parallel", "never", "recompute recompute_policy recompute_layers", "memory for time"),
    Row("kernels", "counts", "fp8", "products in 8 bits are others"),
    Row(
        "kernels",
        "never",
        "norm rope activation cross_entropy product attention compile cuda_graphs weight_gradients",
        "each promises to equal its eager definition",
    ),
    Row(
        "checkpoint",
        "never",
        "every keep keep_steps asynchronous",
        "when a run saves; an average of the last few counts it itself",
    ),
    Row(
        "evaluation",
        "never",
        "suite tasks include_path data skip_missing online allow_code_execution limit questions passages at_stage_ends "
        "every where device dtype batch_size threads niceness seconds wait_seconds backlog required",
        "looks at checkpoints",
    ),
    Row(
        "health",
        "never",
        "watchdog_seconds start_seconds stop_signals stop_seconds end_margin_seconds heartbeat_seconds",
        "how a run is stopped; it goes on from there exactly (law T2)",
    ),
    Row(
        "spikes",
        "counts",
        "policy of window deviations warm_up at_most within back pass_over",
        'steps that are skipped or passed over, where policy is not "none"',
    ),
    Row("log", "never", "every tensorboard wandb_project", "what is shown"),
)
"""[[templates]] are written as [[stages]] are, and count by what stages take of them."""


def ruling_of(key: str) -> Row | None:
    """The row of a key such as "optimizer.betas" or "stages.*.lr.peak"; None where the list has none."""
    table, _, name = key.rpartition(".")
    return next((row for row in ROWS if row.table == table and name in row.keys.split()), None)


def counted(table: str, section: BaseModel) -> dict[str, object]:
    """The keys of a table that count, with their values, as plain JSON values."""
    values = section.model_dump(mode="json")
    names = [name for row in ROWS if row.table == table and row.ruling == "counts" for name in row.keys.split()]
    return {name: values[name] for name in names}


def config_keys() -> Iterator[str]:
    """Every key of the config, tables of tables included, in the words of `ROWS`; [[templates]] are as [[stages]]."""
    SourceSection.model_rebuild(force=True)  # it names [sources.*.fim] before that is defined
    for name, field in RunConfig.model_fields.items():
        if name != "templates":
            yield from _keys_of(field.annotation, name)


def _keys_of(kind: object, place: str) -> Iterator[str]:
    for model, path in _models(kind, place):
        for name, field in model.model_fields.items():
            yield f"{path}.{name}"
            yield from _keys_of(field.annotation, f"{path}.{name}")


def _models(kind: object, place: str) -> Iterator[tuple[type[BaseModel], str]]:
    """The tables of a type: itself, an optional one, those of a list or of a table of free names."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind, place
        return
    below = f"{place}.*" if get_origin(kind) in (list, dict, tuple) else place
    for part in get_args(kind):
        yield from _models(part, below)
