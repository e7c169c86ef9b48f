"""Law C3: faults that are planted in a folder of every architecture are found, and the layer at fault is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf.tiny_families import CONFIGS, make_tiny, proven, tampered
from torch import Tensor

from megatron.config.errors import ProofError

EXTENTS = ("whole", "layers")
LAST = 2
"""The number of the last of three layers."""
CASES = [(name, "layers") for name in CONFIGS] + [(name, "whole") for name in ("llama", "gpt2", "gpt_neox")]
"""A whole proof that misses looks at the layers too, by the same code."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tiny")
    return {name: make_tiny(name, base / str(number)) for number, name in enumerate(CONFIGS)}


def layer_names(tensors: dict[str, Tensor], number: int) -> list[str]:
    return sorted(name for name in tensors if f".{number}." in name or name.startswith(f"h.{number}."))


@pytest.mark.parametrize(("name", "extent"), CASES)
def test_C3_a_changed_weight_is_found_and_its_layer_named(
    name: str, extent: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[next(n for n in layer_names(tensors, 1) if n.endswith("weight") and tensors[n].dim() == 2)][3, 5] += 2

    folder = tampered(folders[name], tmp_path / "bad", change)
    with pytest.raises(ProofError, match=r"logit difference .* differently of layer 1 by") as caught:
        proven(folder, folders[name], extent)
    assert caught.value.exit_code == 7


@pytest.mark.parametrize(("name", "extent"), CASES)
def test_C3_two_layers_that_are_exchanged_are_named(
    name: str, extent: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    def exchange(tensors: dict[str, Tensor]) -> None:
        for first, second in zip(layer_names(tensors, 0), layer_names(tensors, LAST), strict=True):
            tensors[first], tensors[second] = tensors[second], tensors[first]

    folder = tampered(folders[name], tmp_path / "bad", exchange)
    with pytest.raises(ProofError, match=r"differently of layers 0 by \S+, 2 by"):
        proven(folder, folders[name], extent)


@pytest.mark.parametrize(("name", "extent"), [case for case in CASES if case[0] != "gpt2"])
def test_C3_another_base_of_the_angles_is_seen_in_every_layer(
    name: str, extent: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders[name] / "config.json").read_text())
    rope = config["rope_parameters"]
    for parameters in [rope] if "rope_theta" in rope else rope.values():
        parameters["rope_theta"] *= 1.5
    folder = tampered(folders[name], tmp_path / "bad", rope_parameters=rope)
    with pytest.raises(ProofError, match=r"every layer differs .* config\.json means another function"):
        proven(folder, folders[name], extent)


@pytest.mark.parametrize(("name", "extent"), CASES)
def test_C3_another_epsilon_of_the_norms_is_found(
    name: str, extent: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders[name] / "config.json").read_text())
    key = next(key for key in config if key.endswith(("norm_eps", "norm_epsilon")))
    folder = tampered(folders[name], tmp_path / "bad", **{key: 30 * config[key]})
    with pytest.raises(ProofError, match=r"logit difference"):
        proven(folder, folders[name], extent)


@pytest.mark.parametrize("extent", EXTENTS)
def test_C3_learned_positions_are_part_of_the_embedding(extent: str, folders: dict[str, Path], tmp_path: Path) -> None:
    def shift(tensors: dict[str, Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("wpe.weight"))
        tensors[name] = tensors[name].roll(1, 0)

    folder = tampered(folders["gpt2"], tmp_path / "bad", shift)
    with pytest.raises(ProofError, match=r"differently of the embedding"):
        proven(folder, folders["gpt2"], extent)


@pytest.mark.parametrize("extent", EXTENTS)
def test_C3_the_tensor_is_named_where_all_layers_agree(extent: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tampered(
        folders["llama"],
        tmp_path / "bad",
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"] * 1.01}),
    )
    with pytest.raises(ProofError, match="tensor final_norm.weight read back differs .*logit difference") as caught:
        proven(folder, folders["llama"], extent)
    assert "(as model.norm.weight)" in str(caught.value) and "layer" not in str(caught.value)


@pytest.mark.parametrize("extent", EXTENTS)
def test_C3_a_change_too_small_for_the_logits_is_found_too(
    extent: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-7

    folder = tampered(folders["llama"], tmp_path / "bad", change)
    with pytest.raises(ProofError, match=r"tensor layers\.1\.mlp\.up\.weight read back differs"):
        proven(folder, folders["llama"], extent)


@pytest.mark.parametrize("extent", EXTENTS)
def test_C3_one_flipped_bit_is_named_with_tensor_and_file(
    extent: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The highest bit of an exponent, and a sign of zero, which compares equal as a number."""
    for bit, zero in ((30, False), (31, True)):
        original = folders["llama"]
        if zero:
            original = tampered(original, tmp_path / "zero", lambda tensors: tensors["lm_head.weight"][5, 3:4].zero_())

        def flip(tensors: dict[str, Tensor], bit: int = bit) -> None:
            tensors["lm_head.weight"].view(torch.int32)[5, 3] ^= -(2**31) if bit == 31 else 2**bit

        folder = tampered(original, tmp_path / f"bad-{bit}", flip)
        with pytest.raises(ProofError, match=r"tensor head\.weight .* at \[5, 3\] .*model\.safetensors") as caught:
            proven(folder, original, extent)
        assert "the last norm or the head" not in str(caught.value)


@pytest.mark.parametrize("extent", EXTENTS)
def test_C3_weights_that_are_not_finite_never_pass(extent: str, folders: dict[str, Path], tmp_path: Path) -> None:
    def break_one(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")

    folder = tampered(folders["llama"], tmp_path / "bad", break_one)
    with pytest.raises(ProofError, match=r"nan .*differently of layers 1 by nan, 2"):
        proven(folder, folders["llama"], extent)
