"""8-bit layers in an engine: weights are cast once a step, in the same memory, and the run is as if cast each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from engines.made_rows import Micro, tiny_shape, two_rows
from torch import Tensor

from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from megatron.engines.build import build_engine
from megatron.engines.torch_engine import TorchEngine
from megatron.kernels import choice, fp8
from megatron.kernels.choice import Kernels
from megatron.kernels.fp8 import Fp8Tensor
from megatron.models import compiled_layers
from megatron.models.layers import Linear

WORDS, LENGTH = 100, 24
SHAPE = tiny_shape(num_hidden_layers=3)
MAPS = 7 * 3
"""Linear maps of the layers."""


def engine(
    recompute: str = "none", compiled: bool = False, implementation: str = "torch", gradients: str = "fp32"
) -> TorchEngine:
    kernels = Kernels(attention="sdpa", fp8=True, compile_layers=compiled)
    section = OptimizerSection(implementation=implementation)  # type: ignore[arg-type]
    train = TrainSection(global_batch_size=4, gradients=gradients)  # type: ignore[arg-type]
    parallel = ParallelSection(recompute=recompute)  # type: ignore[arg-type]
    made = build_engine(SHAPE, section, parallel, train, 3, "bf16", kernels=kernels)
    assert isinstance(made, TorchEngine)
    return made


def cast_each_time(made: TorchEngine) -> TorchEngine:
    """The same engine without casts that are kept."""
    for linear in linears(made):
        linear.fp8_weight = None
    made._weights._fp8._linears = []
    return made


def linears(made: TorchEngine) -> list[Linear]:
    return [module for module in made._weights.modules[0].modules() if isinstance(module, Linear) and module.fp8]


def batch(step: int) -> list[Micro]:
    return [two_rows(3 * step + number, WORDS, LENGTH, 0.2) for number in range(3)]


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[torch.Size, torch.dtype], int]]:
    """How often what was cast to what."""
    counted: dict[tuple[torch.Size, torch.dtype], int] = {}
    real = fp8.fp8_cast

    def counting(x: Tensor, dtype: torch.dtype, into: Fp8Tensor | None = None) -> Fp8Tensor:
        counted[x.shape, dtype] = counted.get((x.shape, dtype), 0) + 1
        return real(x, dtype, into)

    monkeypatch.setattr(fp8, "fp8_cast", counting)
    choice.fp8_casts.cache_clear()
    yield counted
    choice.fp8_casts.cache_clear()


def weights_cast(casts: dict[tuple[torch.Size, torch.dtype], int], made: TorchEngine) -> int:
    shapes = {linear.weight.shape for linear in linears(made)}
    assert not any(rows == 2 * LENGTH for rows, _ in shapes), "or activations would be counted"
    return sum(times for (shape, dtype), times in casts.items() if shape in shapes and dtype == fp8.E4M3)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_a_weight_is_cast_once_a_step(casts: dict[tuple[torch.Size, torch.dtype], int], recompute: str) -> None:
    made = engine(recompute)
    assert len(linears(made)) == MAPS
    assert weights_cast(casts, made) == MAPS, "when weights are loaded"
    for step in range(3):
        casts.clear()
        made.train_step(batch(step), 1e-3)
        assert weights_cast(casts, made) == MAPS
    casts.clear()
    made.evaluate(batch(9))
    assert weights_cast(casts, made) == 0
    made.load_model_state(WholeTensors({name: s[0].tensor.clone() for name, s in made.model_state().items()}))
    assert weights_cast(casts, made) == MAPS
    casts.clear()
    cast_each_time(made).train_step(batch(4), 1e-3)
    assert weights_cast(casts, made) == 3 * MAPS * (2 if recompute == "full" else 1)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_the_run_is_that_of_casting_each_time(recompute: str, gradients: str) -> None:
    kept, each = engine(recompute, gradients=gradients), cast_each_time(engine(recompute, gradients=gradients))
    for step in range(5):
        assert kept.train_step(batch(step), 1e-2) == each.train_step(batch(step), 1e-2)
        assert kept.evaluate(batch(40)) == each.evaluate(batch(40))
    ours, theirs = (dict(made.model_state()) for made in (kept, each))
    assert all(torch.equal(ours[name][0].tensor, theirs[name][0].tensor) for name in ours)


def test_an_optimizer_that_writes_copies_itself_leaves_casts_to_be_made_anew() -> None:
    launched = pytest.importorskip("megatron.kernels.launch_triton")
    if not launched.INTERPRETED:
        pytest.skip("Triton was loaded for GPUs")
    kept, each = engine(implementation="triton"), cast_each_time(engine(implementation="triton"))
    for step in range(2):
        assert kept.train_step(batch(step), 1e-2) == each.train_step(batch(step), 1e-2)


def test_casts_stay_where_they_are_and_steps_that_are_dropped_change_none() -> None:
    made = engine()

    def held() -> list[Fp8Tensor]:
        return [linear.fp8_weight.held() for linear in linears(made) if linear.fp8_weight is not None]

    places = [[part.data_ptr() for part in cast] for cast in held()]
    before = [cast.values.view(torch.uint8).clone() for cast in held()]
    bad = batch(0)
    for micro in bad:
        micro.targets.fill_(-100)
    made.train_step(bad, 1e-2)
    assert all(torch.equal(a, cast.values.view(torch.uint8)) for a, cast in zip(before, held(), strict=True))
    made.train_step(batch(0), 1e-1)
    assert any(not torch.equal(a, cast.values.view(torch.uint8)) for a, cast in zip(before, held(), strict=True))
    assert places == [[part.data_ptr() for part in cast] for cast in held()]


def test_compiled_layers_read_the_casts_and_are_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(compiled_layers, "compiler", partial(torch.compile, backend="aot_eager"))
    compiled, each = engine(compiled=True), cast_each_time(engine(compiled=True))
    counters = torch._dynamo.utils.counters
    kept = []
    for step in range(3):
        kept.append(compiled.train_step(batch(step), 1e-2))
        assert counters["frames"]["total"] == 1 and not counters["graph_break"], "one program for all layers and steps"
    assert kept == [each.train_step(batch(step), 1e-2) for step in range(3)]


def test_a_model_without_an_engine_casts_by_itself() -> None:
    made: Callable[[], Linear] = lambda: Linear(32, 16, False, Kernels(fp8=True))  # noqa: E731
    linear, other = made(), made()
    with torch.no_grad():
        for one in (linear, other):
            one.weight.copy_(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
    other.keep_cast()
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match="call refresh"):
        other(x)
    other.cast_weight()
    assert torch.equal(linear(x), other(x))
