"""What the planner says a forward pass keeps, against what real forward passes leave allocated, to the byte.

Ranks that are not there are pretended: torch's fake process group moves nothing, and allocates what a real one would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from models.tensor_cases import SHAPES, tiny_shape
from planner.live_allocations import Recompute, forward_keeps
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron.config.errors import ConfigError
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.presets import PRESETS
from megatron.config.schema import ModelSection
from megatron.kernels import cross_entropy
from megatron.kernels.attention_blockwise import BLOCK, KEPT_BYTES
from megatron.kernels.attention_unfused import KEPT_BYTES as UNFUSED_BYTES
from megatron.kernels.choice import Kernels
from megatron.models.attention import context_method
from megatron.models.fp8_weights import Fp8Weights
from megatron.parallel.axis import Axis
from megatron.parallel.model_place import ModelPlace
from megatron.planner import activation_bytes, attention_bytes
from megatron.planner.activation_bytes import layer_terms, stage_terms, stream_bytes
from megatron.planner.forward_pass import ForwardPass

NONE: Recompute = ("none", "attention", None)
RECOMPUTES: tuple[Recompute, ...] = (
    NONE,
    ("full", "attention", 1),
    ("selective", "attention", None),
    ("selective", "operations", 1),
)
PLACES: dict[str, dict[str, Any]] = {
    "one process": {},
    "tensor 2": {"tensor": 2},
    "tensor 2 with sequence": {"tensor": 2, "sequence": True},
    "tensor 4 with sequence": {"tensor": 4, "sequence": True},
    "split backward": {"split_backward": True},
    "tensor 2 with sequence, split": {"tensor": 2, "sequence": True, "split_backward": True},
    "heads exchanged": {"context": 2},
    "keys gathered": {"context": 2, "context_method": "gather"},
    "context and tensor with sequence": {"tensor": 2, "sequence": True, "context": 2},
}
LENGTH = 24


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Any]]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    torch.set_num_threads(1)
    yield {2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    dist.destroy_process_group()


def place_of(groups: dict[int, Any], tensor: int = 1, context: int = 1, **rest: Any) -> ModelPlace:
    axes = {name: Axis(0, size, groups[size]) for name, size in (("tensor", tensor), ("context", context)) if size > 1}
    return ModelPlace(**axes, **rest)


def planned(
    shape: ModelShape, place: ModelPlace, kernels: Kernels, rows: int, length: int, dtype: torch.dtype, how: Recompute
) -> tuple[int, ForwardPass]:
    run = ForwardPass(
        rows=rows,
        length=length,
        tensor=place.tensor.size,
        sequence=place.sequence,
        context=place.context.size,
        gathers=not place.context.alone and context_method(shape, place)[0] == "gather",
        split=place.split_backward,
        recompute=how[1] if how[0] == "selective" else how[0],  # type: ignore[arg-type]
        narrow=dtype.itemsize,
        wide=max(4, dtype.itemsize),
        joined=_joins(place, kernels),
        attention=kernels.attention,
        lean=False,
        lean_loss=False,
        fp8=kernels.fp8,
        device="cpu",
    )
    layers = range(shape.num_hidden_layers) if place.layers is None else place.layers
    terms = stage_terms(shape, run, layers, place.first, place.last, how[2])
    # A stage that is not the last returns its output, and the input of one that is not the first is given.
    stream = stream_bytes(shape, run)
    return sum(terms.values()) + stream * (not place.last) - stream * (not place.first), run


def _joins(place: ModelPlace, kernels: Kernels) -> bool:
    return place.tensor.alone and place.context.alone and not place.split_backward and not kernels.fp8


def compare(
    shape: ModelShape,
    place: ModelPlace,
    attention: str = "blockwise",
    rows: int = 3,
    length: int = LENGTH,
    dtype: torch.dtype = torch.float32,
    how: Recompute = NONE,
) -> None:
    kernels = Kernels(attention=attention)  # type: ignore[arg-type]
    want, _ = planned(shape, place, kernels, rows, length, dtype, how)
    got = forward_keeps(shape, place, kernels, rows, length, dtype, _joins(place, kernels), how)
    assert want == got, f"{attention}, {rows} rows, {how}: planned {want}, kept {got}: {want - got:+}"


ATTENTIONS = ("blockwise", "sdpa", "unfused")


def _possible(place: ModelPlace, how: Recompute) -> bool:
    return not (place.split_backward and how[1] == "operations")


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_layer_on_every_axis(groups: dict[int, Any], shape: str, where: str) -> None:
    # In turns an attention, 1 or 3 rows and a way to recompute; the soak test takes all of them.
    place = place_of(groups, **PLACES[where])
    turn = list(SHAPES).index(shape) + list(PLACES).index(where)
    for number in (turn, turn + 2):
        how = RECOMPUTES[number % 4]
        how = how if _possible(place, how) else NONE
        compare(SHAPES[shape], place, ATTENTIONS[number % 3], rows=3 if number % 5 else 1, how=how)


@pytest.mark.soak
@pytest.mark.parametrize("where", PLACES)
def test_every_kind_of_layer_on_every_axis_in_every_way(groups: dict[int, Any], where: str) -> None:
    place = place_of(groups, **PLACES[where])
    for shape, attention, rows, how in product(SHAPES, ATTENTIONS, (1, 3), RECOMPUTES):
        if _possible(place, how):
            compare(SHAPES[shape], place, attention, rows, how=how)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ["qwen3", "gpt2", "both norms, offset, multipliers"])
def test_other_widths(groups: dict[int, Any], shape: str, dtype: torch.dtype) -> None:
    compare(SHAPES[shape], ModelPlace(), dtype=dtype, rows=2)
    compare(SHAPES[shape], place_of(groups, tensor=2, sequence=True), "sdpa", dtype=dtype, rows=2)


@pytest.mark.parametrize("how", RECOMPUTES)
@pytest.mark.parametrize("layers", [range(1), range(1, 2)], ids=["first", "last"])
def test_stages_of_a_pipeline(groups: dict[int, Any], layers: range, how: Recompute) -> None:
    ends = {"first": layers.start == 0, "last": layers.stop == 2}
    for shape in ("two key heads, tied", "gpt2", "neox"):
        compare(SHAPES[shape], place_of(groups, layers=layers, **ends), "sdpa", how=how)
        compare(SHAPES[shape], place_of(groups, tensor=2, sequence=True, layers=layers, **ends), how=how)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_shapes(groups: dict[int, Any], data: st.DataObject) -> None:
    """Any model that the config can express, anywhere, by any attention that CPUs have."""
    draw = data.draw
    keys = draw(st.sampled_from([1, 2, 4]))
    fields = {
        "hidden_size": 8 * draw(st.integers(1, 6)),
        "num_attention_heads": keys * 4 // draw(st.sampled_from([1, 2, 4])) if keys == 4 else 4,
        "num_key_value_heads": keys,
        "head_dim": 2 * draw(st.integers(2, 6)),
        "intermediate_size": 4 * draw(st.integers(2, 12)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "gated_mlp": draw(st.booleans()),
        "parallel_block": draw(st.booleans()),
        "norm": draw(st.sampled_from(["rmsnorm", "layernorm"])),
        "norm_place": draw(st.sampled_from(["before", "after", "both"])),
        "qk_norm": draw(st.sampled_from(["none", "head", "width"])),
        "position_embedding": draw(st.sampled_from(["rope", "learned"])),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_dropout": draw(st.sampled_from([0.0, 0.1])),
        "attention_multiplier": draw(st.sampled_from([None, 0.3])),
        "sliding_window": draw(st.sampled_from([None, 7])),
    }
    if fields["num_attention_heads"] % keys or fields["num_attention_heads"] < keys:
        fields["num_attention_heads"] = 4
    try:
        shape = resolve_model(
            ModelSection(seq_length=LENGTH, vocab_size=100, **{k: v for k, v in fields.items() if v is not None}), 100
        )
    except ConfigError:
        return
    place = place_of(groups, **PLACES[draw(st.sampled_from(sorted(PLACES)))])
    how = draw(st.sampled_from(RECOMPUTES))
    if shape.num_attention_heads % place.tensor.size or not _possible(place, how):
        return
    compare(shape, place, draw(st.sampled_from(ATTENTIONS)), draw(st.integers(1, 3)), how=how)


def test_blocks_longer_than_one(groups: dict[int, Any]) -> None:
    for fields in ({}, {"sliding_window": 150}, {"sliding_window": 200, "sliding_pattern": 2}):
        section = ModelSection(preset="llama-tiny", seq_length=400, hidden_size=32, num_hidden_layers=2, **fields)
        shape = resolve_model(section, 100)
        compare(shape, ModelPlace(), rows=2, length=400)
        compare(shape, place_of(groups, context=2, context_method="gather"), rows=1, length=400)


def test_eight_bit_products() -> None:
    shape, kernels = tiny_shape(), Kernels(fp8=True, attention="sdpa")
    want, run = planned(shape, ModelPlace(), kernels, 2, LENGTH, torch.bfloat16, NONE)
    held = forward_keeps(shape, ModelPlace(), kernels, 2, LENGTH, torch.bfloat16, False, NONE)
    # Here weights are cast anew in each pass; an engine keeps their casts for a step (`state_bytes.py`).
    casts = _weight_casts(shape)
    assert want + casts == held
    assert "casts" in layer_terms(shape, run)


def _weight_casts(shape: ModelShape) -> int:
    from megatron.models.decoder import Decoder
    from megatron.models.layers import Linear

    model = Decoder(shape, Kernels(fp8=True))
    assert Fp8Weights(model)
    linears = [m for m in model.layers.modules() if isinstance(m, Linear)]
    return sum(m.weight.shape[1] * (-(-m.weight.shape[0] // 16) * 16) + 4 for m in linears)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_documents_within_rows_keep_no_more_than_is_said(attention: str) -> None:
    shape = tiny_shape()
    documents = (torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.2).cumsum(1).int()
    kernels = Kernels(attention=attention)  # type: ignore[arg-type]
    _, run = planned(shape, ModelPlace(), kernels, 3, LENGTH, torch.float32, NONE)
    terms = stage_terms(shape, replace(run, divided=True), range(2), True, True)
    kept = forward_keeps(shape, ModelPlace(), kernels, 3, LENGTH, torch.float32, True, NONE, documents)
    assert kept == sum(terms.values()) if attention != "blockwise" else kept <= sum(terms.values())


@pytest.mark.parametrize(("hidden", "heads", "length"), [(6144, 64, 2048), (12288, 96, 2048), (25600, 160, 2048)])
@pytest.mark.parametrize("tensor", [1, 8])
def test_megatron_closed_form_term_by_term(hidden: int, heads: int, length: int, tensor: int) -> None:
    """Korthikanti et al., arXiv 2205.05198, equations 1, 2 and 4 and table 2, with s b h as the unit: ours is theirs
    without the masks of dropout, which are made again, and without what unfused scores keep; statistics come on top."""
    fields = PRESETS["gpt2"].fields | {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": 1,
        "intermediate_size": 4 * hidden,
        "vocab_size": 51200,
        "max_position_embeddings": length,
        "hidden_dropout": 0.1,
        "head_dim": hidden // heads,
    }
    allowed = {k: v for k, v in fields.items() if k in ModelSection.model_fields}
    shape = resolve_model(ModelSection(**allowed, seq_length=length), 51200)
    unit = length * hidden
    for sequence in (False, True) if tensor > 1 else (False,):
        run = ForwardPass(rows=1, length=length, tensor=tensor, sequence=sequence, attention="flash")
        terms = layer_terms(shape, run)
        small = ("norm before attention", "norm before MLP", "log-sum-exp", "dropout of attention", "dropout of MLP")
        ours = sum(size for name, size in terms.items() if name not in small)
        whole = 1 if sequence or tensor == 1 else tensor
        theirs = unit * 34 / tensor if whole == 1 else unit * (10 + 24 / tensor)
        masks = unit * 2 * whole / tensor
        print(f"h {hidden}, t {tensor}, sequence {sequence}: {ours / unit:.3f} s b h, theirs {theirs / unit:.3f}")
        assert ours == pytest.approx(theirs - masks)
        assert sum(terms[name] for name in small) < 0.01 * ours + 4 * length * heads
    full = ForwardPass(rows=1, length=length, recompute="full")
    assert sum(layer_terms(shape, full).values()) == 2 * unit  # table 2, last row


@pytest.mark.parametrize(
    ("hidden", "heads", "saved"), [(12288, 96, 0.70), (20480, 128, 0.65)], ids=["GPT-3 175B", "MT-NLG 530B"]
)
def test_published_saving_of_selective_recompute(hidden: int, heads: int, saved: float) -> None:
    """Their section 5: 70 % of a GPT-3's activations and 65 % of an MT-NLG's are scores, 5 a s / h of 34 + 5 a s / h.
    Attention that keeps no scores, as ours on a GPU, saves the same without recomputing anything."""
    scores = 5 * heads * 2048 / hidden
    print(f"h {hidden}: predicted {scores / (34 + scores):.3f}, published {saved}")
    assert scores / (34 + scores) == pytest.approx(saved, abs=0.006)


def test_constants_are_those_of_the_kernels() -> None:
    assert attention_bytes.BLOCK == BLOCK
    assert (attention_bytes.KEPT_BY_BLOCKWISE, attention_bytes.KEPT_BY_UNFUSED) == (KEPT_BYTES, UNFUSED_BYTES)
    assert (activation_bytes.CHUNK_ROWS, activation_bytes.CHUNK_BYTES) == (
        cross_entropy.CHUNK_ROWS,
        cross_entropy._CHUNK_BYTES,
    )
