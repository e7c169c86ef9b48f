"""The list of what counts: every key of the config stands in it once, and the hash does what it says of each."""

from __future__ import annotations

import types
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from study.made_studies import BASE, planned, stage, tables

from megatron.config.schema import RunConfig
from megatron.study.identity import hash_of, train_document
from megatron.study.steps import TrainStep
from megatron.study.what_counts import ROWS, config_keys, ruling_of

FLAT = ("train", "optimizer", "validation", "kernels", "spikes", "data", "parallel", "checkpoint", "log", "health")
FLAT_KEYS = [
    (key, row.ruling)
    for key in config_keys()
    if key.count(".") == 1 and key.split(".")[0] in (*FLAT, "evaluation") and (row := ruling_of(key)) is not None
]


def test_every_key_of_the_config_is_listed_once() -> None:
    listed = [f"{row.table}.{name}" for row in ROWS for name in row.keys.split()]
    assert [key for key in config_keys() if ruling_of(key) is None] == []
    assert sorted(set(listed) - set(config_keys())) == [], "keys that the config has no more"
    assert len(listed) == len(set(listed))
    assert all(row.why for row in ROWS)


def test_the_keys_are_those_of_the_schema() -> None:
    """Beside a plain walk over the published JSON Schema: no table is passed over."""
    schema = RunConfig.model_json_schema()
    tables_of = {name: set(table["properties"]) for name, table in schema["$defs"].items() if "properties" in table}
    keys = set(config_keys())
    assert {key.rpartition(".")[2] for key in keys} == set.union(*tables_of.values())
    for section, known in tables_of.items():
        assert any(known <= {key.rpartition(".")[2] for key in keys if key.startswith(f"{table}.")} for table in
                   {key.rpartition(".")[0] for key in keys}), section  # fmt: skip


def a_step(folder: Path) -> TrainStep:
    step = planned(folder, tables({"a": {"stages": ["s"]}}, {"s": stage()})).arms["a"].steps[-1]
    assert isinstance(step, TrainStep)
    return step


def document(step: TrainStep, **over: Any) -> str:
    changed = {}
    for table, keys in over.items():
        changed[table] = getattr(step.config, table).model_copy(update=keys)
    return hash_of(train_document(replace(step, config=step.config.model_copy(update=changed)), 7, None, None))


def another(model: type[BaseModel], name: str, value: Any) -> Any:
    """Some other value of a field's type."""
    kind = model.model_fields[name].annotation
    while get_origin(kind) in (Union, types.UnionType):
        kind = next(arm for arm in get_args(kind) if arm is not type(None))
    if get_origin(kind) is Literal:
        return next(word for word in get_args(kind) if word != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | Decimal | float):
        return value + type(value)(1)
    if isinstance(value, tuple):
        return tuple(item * 2 if isinstance(item, float) else item for item in value)[::-1]
    if isinstance(value, list):
        return [*value, "more"]
    return "other" if kind is not int else 3


WITH = {"optimizer.momentum": {"name": "sgd"}, "optimizer.muon_momentum": {"name": "muon"}}


@pytest.mark.parametrize(("key", "ruling"), [row for row in FLAT_KEYS if row[1] != "resolved"])
def test_a_key_changes_the_node_exactly_if_it_counts(tmp_path: Path, key: str, ruling: str) -> None:
    step = a_step(tmp_path)
    table, name = key.split(".")
    section = getattr(step.config, table)
    beside: dict[str, Any] = WITH.get(key, {"policy": "skip"} if table == "spikes" and name != "policy" else {})
    other = another(type(section), name, getattr(section, name))
    assert other != getattr(section, name)
    before, after = document(step, **{table: beside}), document(step, **{table: beside | {name: other}})
    assert (before != after) == (ruling == "counts")


def test_keys_that_the_named_optimizer_does_not_read_change_nothing(tmp_path: Path) -> None:
    step = a_step(tmp_path)
    assert document(step) == document(step, optimizer={"momentum": 0.9, "muon_momentum": 0.5})
    sgd = {"name": "sgd", "momentum": 0.9}
    assert document(step, optimizer=sgd) == document(step, optimizer=sgd | {"betas": (0.5, 0.5), "eps": 0.1})
    assert document(step) == document(step, spikes={"deviations": 3.0}), "no policy reads it"


MODELS = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 300,
    "num_key_value_heads": 1, "hidden_act": "gelu", "gated_mlp": False, "norm": "layernorm", "norm_eps": Decimal("0.1"),
    "norm_place": "after", "attention_bias": True, "query_key_value_bias": True, "qk_norm": "head", "mlp_bias": True,
    "parallel_block": True, "position_embedding": "learned", "rope_theta": 5000,
    "partial_rotary_factor": Decimal("0.5"),
    "sliding_window": 8, "tie_word_embeddings": True, "embedding_multiplier": 2, "attention_multiplier": 1,
    "initializer_range": Decimal("0.5"), "hidden_dropout": Decimal("0.1"), "document_mask": False,
}  # fmt: skip


@pytest.mark.parametrize("key", MODELS)
def test_a_key_of_the_model_that_changes_the_decoder_changes_the_node(tmp_path: Path, key: str) -> None:
    arms = {"a": {"stages": ["s"]}, "b": {"stages": ["s"], "set": {f"model.{key}": MODELS[key]}}}
    assert len(planned(tmp_path, tables(arms, {"s": stage()})).graph.nodes) == 2


STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "steps": ({}, {"steps": 5}),
    "mixture": ({}, {"mixture": {"web": 9, "python": 1}}),
    "cursor": ({}, {"cursor": "restart"}),
    "batch": ({}, {"global_batch_size": 8, "steps": 2}),
    "seq_length": ({}, {"seq_length": 32, "steps": 2}),
    "shapes": ({"steps": 8}, {"steps": 8, "batch_ramp": {"start": 2, "increment": 2, "over": "25%"}}),
    "lr.peak": ({}, {"lr": {"peak": Decimal("0.002")}}),
    "lr.warmup": ({}, {"lr": {"peak": Decimal("0.001"), "warmup": "2 steps"}}),
    "take": ({}, {"take": {"weights": "runs/none"}}),
    "fim": ({}, {"fim": {"web": Decimal("0.5")}}),
}


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_says_changes_its_node(tmp_path: Path, name: str) -> None:
    one, other = STAGES[name]
    stages = {"one": stage(**one), "other": stage(**other)}
    arms = {"a": {"stages": ["one"]}, "b": {"stages": ["other"]}}
    assert len(planned(tmp_path, tables(arms, stages)).graph.nodes) == 2


SOURCES: dict[str, tuple[str, Any, bool]] = {
    "content": ("sources.web.tokens", 90_000, True),
    "of another source": ("sources.rust.tokens", 90_000, False),
    "group": ("sources.web.group", "prose", True),
    "group of another": ("sources.rust.group", "prose", False),
    "pieces": ("sources.web.piece_tokens", 32, True),
    "slice": ("sources.web.slice", [0, Decimal("0.5")], True),
    "a cap that is only a check": ("sources.web.max_epochs", 5, False),
    "what happens there": ("sources.web.dry", "repeat", False),
    "overlap": ("sources.web.allow_overlap", True, False),
    "run length": ("train.tokens", 1_000_000, False),
    "micro-batch": ("train.micro_batch_size", 2, False),
    "sequence length of the model": ("model.seq_length", 32, True),
    "what an export is": ("model.family", "llama", False),
    "held out": ("validation.fraction", Decimal("0.25"), True),
    "tokenizer": ("tokenizer.path", "elsewhere/tokenizer.model", True),
}


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_set_beside_the_stages(tmp_path: Path, name: str) -> None:
    key, value, counts = SOURCES[name]
    base = {**BASE, "model": BASE["model"] | {"vocab_size": 257}}
    arms = {"a": {"stages": ["s"]}, "b": {"stages": ["s"], "set": {key: value}}}
    graph = planned(tmp_path, tables(arms, {"s": stage()}, base=base)).graph
    assert len(graph.nodes) == 1 + counts


def test_a_cap_that_takes_a_source_out_counts(tmp_path: Path) -> None:
    base = {**BASE, "sources": {**BASE["sources"], "rust": {"tokens": 160, "dry": "renormalise"}}}
    stages = {"s": stage(mixture={"web": 1, "rust": 1}, steps=20)}
    arms = {"a": {"stages": ["s"]}, "b": {"stages": ["s"], "set": {"sources.rust.max_epochs": 2}}}
    assert len(planned(tmp_path, tables(arms, stages, base=base)).graph.nodes) == 2


def test_a_checkpoint_counts_by_content_not_by_place(tmp_path: Path) -> None:
    for name, words in (("one", "same"), ("two", "same"), ("three", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(words)
    stages = {name: stage(take={"weights": str(tmp_path / name)}) for name in ("one", "two", "three")}
    graph = planned(tmp_path, tables({name: {"stages": [name]} for name in stages}, stages)).graph
    ends = {arm.name: arm.path[-1] for arm in graph.arms}
    assert ends["one"] == ends["two"] != ends["three"]
