"""The engine with gradients that are added in the products that make them, against the one that adds them apart."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from engines.made_rows import Micro, tiny_shape, two_rows
from torch import Tensor

from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.config.errors import ConfigError
from megatron.config.kernel_checks import check_kernels
from megatron.config.model_shape import ModelShape
from megatron.config.schema import KernelsSection, OptimizerSection, ParallelSection, TrainSection
from megatron.engines.build import build_engine
from megatron.engines.kernel_choice import choose_kernels
from megatron.engines.torch_engine import TorchEngine
from megatron.kernels import weight_gradient
from megatron.kernels.choice import Kernels
from megatron.models import compiled_layers

WORDS, LENGTH = 100, 16
TRAIN = TrainSection(global_batch_size=4)
SHAPES = {
    "tied": tiny_shape(num_hidden_layers=2),
    "head, biases": tiny_shape(num_hidden_layers=2, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "neox": tiny_shape(
        num_hidden_layers=2,
        gated_mlp=False,
        norm="layernorm",
        hidden_act="gelu",
        attention_bias=True,
        mlp_bias=True,
        parallel_block=True,
    ),
}


def engine(
    kind: str,
    shape: ModelShape,
    precision: str = "bf16",
    recompute: dict[str, Any] | None = None,
    compiled: bool = False,
    **optimizer: Any,
) -> TorchEngine:
    kernels = Kernels(weight_gradients=kind)  # type: ignore[arg-type]
    if compiled:
        kernels = replace(kernels, attention="sdpa", norm="compile", compile_layers=True)
    section, parallel = OptimizerSection(**({"eps": 1e-3} | optimizer)), ParallelSection(**(recompute or {}))
    made = build_engine(shape, section, parallel, TRAIN, 3, precision, kernels=kernels)
    assert isinstance(made, TorchEngine)
    return made


def batch(step: int, count: int = 3) -> list[Micro]:
    return [two_rows(count * step + number, WORDS, LENGTH, 0.2) for number in range(count)]


def gradients_of(made: TorchEngine, microbatches: list[Micro]) -> dict[str, Tensor]:
    """Of the mean loss, as they are before clipping and update."""
    made._forward_backward(microbatches, 1 / (len(microbatches) * 2 * LENGTH))
    found = {name: gradient.clone() for name, gradient in made._gradients().items()}
    made._weights.drop_gradients()
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_every_gradient_is_as_near_the_exact_one_as_before_and_layers_nearer(name: str) -> None:
    """Twelve microbatches. Exact: the same network, its bfloat16 weights widened, in float64."""
    shape, microbatches = SHAPES[name], batch(0, 12)
    fused, separate = engine("fused", shape), engine("separate", shape)
    exact = engine("separate", shape, "fp64")
    exact.load_model_state(WholeTensors({k: v.double() for k, v in separate._weights.copies().items()}))
    ours, theirs, wanted = (gradients_of(made, microbatches) for made in (fused, separate, exact))
    assert ours.keys() == theirs.keys() == wanted.keys()
    assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
    for key, want in wanted.items():
        near, before = ((side[key].double() - want).norm() / want.norm() for side in (ours, theirs))
        assert near <= 1.05 * before + 1e-6, (key, near, before)
        if not (key.startswith("layers.") and key.endswith(("weight",)) and want.ndim == 2):
            assert torch.equal(ours[key], theirs[key]), f"{key} goes the way that it always went"


def test_products_alone_are_added_without_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the products are given is what autograd would give, so that the sums are the exact sums of it."""
    made = engine("fused", SHAPES["tied"])
    exact: dict[int, Tensor] = {}
    size: dict[int, Tensor] = {}
    real = weight_gradient._add

    def watched(total: Tensor, fresh: Tensor, grad: Tensor, x: Tensor) -> None:
        key = total.data_ptr()
        assert bool(fresh) == (key not in exact)
        exact[key] = exact.get(key, 0) + grad.double().t() @ x.double()
        size[key] = size.get(key, 0) + grad.double().abs().t() @ x.double().abs()
        real(total, fresh, grad, x)

    monkeypatch.setattr(weight_gradient, "_add", watched)
    made._forward_backward(batch(0), 0.01)
    assert len(exact) == 2 * 4, "query, key and value are one; gate and up are one; output; down"
    for layer in range(2):
        for joined in (("attention.query", "attention.key", "attention.value"), ("attention.output",), ("mlp.down",)):
            parts = [made._gradients()[f"layers.{layer}.{name}.weight"] for name in joined]
            key = parts[0].data_ptr()
            error = (torch.cat(parts).double() - exact[key]).abs()
            assert (error <= (3 * 2 * LENGTH + 3) * 2.0**-24 * size[key]).all()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "recompute",
    [
        {},
        {"recompute": "full"},
        {"recompute": "selective"},
        {"recompute": "selective", "recompute_policy": "operations"},
    ],
    ids=["kept", "full", "attention", "operations"],
)
def test_it_trains_alike_and_recompute_changes_no_bit(name: str, recompute: dict[str, Any]) -> None:
    shape = SHAPES[name]
    fused, kept = engine("fused", shape, recompute=recompute), engine("fused", shape)
    separate = engine("separate", shape)
    for step in range(4):
        ours, same, theirs = (made.train_step(batch(step), 1e-3) for made in (fused, kept, separate))
        assert ours == same
        assert ours.loss == pytest.approx(theirs.loss, rel=2e-3)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-2)
    assert "weight gradients added in their products" in fused.describe()["kernels"]


def test_steps_that_are_not_made_leave_nothing_behind() -> None:
    """One that is not finite, one without targets and an evaluation, then a step as in a run without them."""
    ours, plain = engine("fused", SHAPES["tied"]), engine("fused", SHAPES["tied"])
    weights = {name: shards[0].tensor.clone() for name, shards in ours.model_state().items()}
    bad = {name: tensor.clone() for name, tensor in weights.items()}
    bad["final_norm.weight"][0] = math.nan
    ours.load_model_state(WholeTensors(bad))
    assert not ours.train_step(batch(0), 1e-2).updated
    ours.load_model_state(WholeTensors(weights))
    empty = batch(1)
    for micro in empty:
        micro.targets.fill_(-100)
    assert not ours.train_step(empty, 1e-2).updated
    assert ours.evaluate(batch(2)) == plain.evaluate(batch(2))
    for step in range(3):
        assert ours.train_step(batch(step), 1e-2) == plain.train_step(batch(step), 1e-2)


def test_with_masters_in_halves_it_is_the_same_run() -> None:
    launched = pytest.importorskip("megatron.kernels.launch_triton")
    if not launched.INTERPRETED:
        pytest.skip("Triton was loaded for GPUs")
    shape = tiny_shape(num_hidden_layers=1)
    whole, split = (engine("fused", shape, implementation="triton", master_weights=kept) for kept in ("whole", "split"))
    for step in range(3):
        assert whole.train_step(batch(step), 1e-2) == split.train_step(batch(step), 1e-2)


def test_a_gradient_that_is_lost_is_still_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine("fused", SHAPES["tied"])
    layer = ours._weights.modules[0].layers["1"]  # type: ignore[index, union-attr]
    monkeypatch.setattr(layer.mlp.down, "forward", lambda x: torch.zeros(*x.shape[:-1], 32, dtype=x.dtype))
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.down\.weight"):
        ours.train_step(batch(0), 1e-2)


@pytest.mark.parametrize(
    ("kernels", "parallel", "train", "precision", "processes", "words"),
    [
        ({}, {}, {}, "fp32", 1, "precision fp32"),
        ({}, {}, {"gradients": "bf16"}, "bf16", 1, "train.gradients = bf16"),
        ({}, {}, {}, "bf16", 2, "2 processes"),
        ({}, {"engine": "deepspeed"}, {}, "bf16", 1, "parallel.engine = deepspeed"),
        ({"fp8": True}, {}, {}, "bf16", 1, "kernels.fp8 = true"),
        ({"cuda_graphs": True}, {}, {}, "bf16", 1, "kernels.cuda_graphs = true"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    kernels: dict[str, Any],
    parallel: dict[str, Any],
    train: dict[str, Any],
    precision: str,
    processes: int,
    words: str,
) -> None:
    section = KernelsSection(weight_gradients="fused", **kernels)
    batch_section = TrainSection(global_batch_size=4, **train)
    with pytest.raises(ConfigError, match=rf"weight_gradients = fused does not go with {words}.*to separate"):
        check_kernels(section, ParallelSection(**parallel), processes, SHAPES["tied"], batch_section, precision)


@pytest.mark.parametrize("name", SHAPES)
def test_compiled_layers_add_to_the_same_sums_by_one_program(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiled_layers, "compiler", partial(torch.compile, backend="aot_eager"))
    shape = SHAPES[name]
    compiled, plain = engine("fused", shape, compiled=True), engine("fused", shape)
    for step in range(3):
        ours, theirs = (gradients_of(made, batch(step)) for made in (compiled, plain))
        whole = torch.stack([want.norm() for want in theirs.values()]).norm()
        for key, want in theirs.items():  # those of keys' biases are zero but for rounding
            assert (ours[key] - want).norm() <= 2e-2 * want.norm() + 1e-4 * whole, key
        assert compiled.train_step(batch(step), 1e-3).loss == pytest.approx(
            plain.train_step(batch(step), 1e-3).loss, rel=1e-3
        )
    counters = torch._dynamo.utils.counters
    frames = counters["frames"]
    assert frames["ok"] == frames["total"] == 2 and not counters["graph_break"], "a layer, and the last norm"


def test_it_is_chosen_by_name_and_said() -> None:
    def choose(section: KernelsSection, measure: Any = None) -> Any:
        return choose_kernels(section, SHAPES["tied"], torch.bfloat16, (2, 16), measure=measure)

    for measure in (None, lambda kernels: 1.0):
        choice = choose(KernelsSection(weight_gradients="fused"), measure)
        assert choice.kernels["weight_gradients"] == "fused"
        assert choice.reason.startswith("weight_gradients as asked for")
        assert choose(KernelsSection(), measure).kernels["weight_gradients"] == "separate"
