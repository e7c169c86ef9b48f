"""Memory of export and import by the real commands, at 200 million parameters: what streams never holds a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path

import pytest
import torch
from hf.streamed import python
from torch import Tensor

from megatron.checkpoint.imported import write_imported
from megatron.config.model_shape import resolve_model
from megatron.config.schema import ModelSection
from megatron.engines.model_parts import whole_parameters
from megatron.hf.continued_config import continued_config

LLAMA = {"hidden_act": "silu", "num_key_value_heads": 4}
# norms in every layer, query, key and value interleaved in one tensor
NEOX = {"norm": "layernorm", "gated_mlp": False, "hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}
MEASURED = """
import sys
from pathlib import Path
from megatron.commands.{name} import main
assert main(sys.argv[1:]) == 0
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


class Blank:
    """A TensorSource of the same small values everywhere."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.shapes = shapes

    def names(self) -> Iterable[str]:
        return self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> Tensor:
        return torch.full(tuple(shape), 0.25)


def measured(name: str, *words: str | Path) -> int:
    """The most bytes that were resident in the command's process."""
    done = python(MEASURED.replace("{name}", name), *words, limit=280)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) * 1024


@pytest.mark.parametrize(("family", "fields"), [("llama", LLAMA), ("gpt_neox", NEOX)])
def test_two_largest_tensors_and_500_MB_are_enough(family: str, fields: dict[str, object], tmp_path: Path) -> None:
    section = ModelSection(
        seq_length=2048,
        hidden_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        intermediate_size=2816,
        **fields,  # type: ignore[arg-type]
    )
    shape = resolve_model(section, 24_000)
    assert 190e6 < shape.parameter_count() < 260e6
    shapes = {name: tuple(tensor.shape) for name, tensor in whole_parameters(shape).items()}
    place = tmp_path / "checkpoint"
    text = continued_config(shape, "blank", "nothing", place, None)
    write_imported(place, Blank(shapes), json.loads(json.dumps(shape.to_json())), [], text, {})
    whole = 4 * shape.parameter_count()
    bound = 2 * 4 * max(map(prod, shapes.values())) + 500 * 10**6
    assert bound < whole, "else nothing is shown"
    words = ("--input", place, "--output", tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "100MB")
    assert measured("export_hf", *words, "--no-prove", "--workers", "4") < bound
    assert measured("import_hf", "--input", tmp_path / "out", "--output", tmp_path / "again") < bound
