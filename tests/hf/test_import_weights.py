"""Law C2 and B1 for foreign folders: safetensors only, inside the folder only, complete, of the right sizes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf.family_cases import CASES, made, stored
from hf.made_checkpoint import LLAMA, NEOX
from hf.made_folder import made_by_transformers, shape_of
from safetensors.torch import load_file, save_file

from megatron.config.errors import CheckpointError
from megatron.config.model_shape import ModelShape
from megatron.hf.architecture import shape_from_folder
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.models.decoder import Decoder


@pytest.fixture
def shape() -> ModelShape:
    return shape_of(LLAMA)


@pytest.fixture
def folder(shape: ModelShape, tmp_path: Path) -> Path:
    return made_by_transformers(shape, tmp_path / "model")


@pytest.mark.parametrize(
    "fields",
    [LLAMA, LLAMA | {"tie_word_embeddings": True, "attention_bias": True}, NEOX],
    ids=["llama", "tied", "neox"],
)
def test_C3_a_model_made_by_transformers_gives_the_same_logits_in_ours(fields: dict[str, Any], tmp_path: Path) -> None:
    shape = shape_of(fields)
    folder = made_by_transformers(shape, tmp_path / "model")
    ours = Decoder(shape)
    ours.load_state_dict(HuggingFaceTensors(folder, shape).all())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(shape.vocab_size, (2, 32))
    with torch.no_grad():
        difference = ours.logits(tokens, torch.zeros_like(tokens)) - theirs(tokens).logits
    assert float(difference.abs().max()) <= 1e-4


def _again(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The folder read once more, with these tensors in its file."""
    save_file(tensors, folder / "model.safetensors")
    return HuggingFaceTensors(folder, shape_from_folder(folder)).all()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_older_spellings_and_buffers_without_weights_are_known(name: str, tmp_path: Path) -> None:
    made(CASES[name], tmp_path)
    good, wanted = stored(tmp_path), HuggingFaceTensors(tmp_path, shape_from_folder(tmp_path)).all()
    older = {
        "gpt2": {key.removeprefix("transformer."): tensor for key, tensor in good.items()},
        "gpt_neox": {key.replace("embed_out", "lm_head"): tensor for key, tensor in good.items()},
        "llama": good,
    }[name]
    assert name == "llama" or older.keys() != good.keys()
    buffers = {
        "gpt2": {"h.0.attn.bias": torch.ones(1, 1, 4, 4).bool(), "h.1.attn.masked_bias": torch.zeros(())},
        "gpt_neox": {
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 4, 4).bool(),
            "gpt_neox.layers.1.attention.masked_bias": torch.zeros(()),
            "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.zeros(2),
        },
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)},
    }[name]
    again = _again(tmp_path, older | buffers)
    assert again.keys() == wanted.keys() and all(torch.equal(again[key], tensor) for key, tensor in wanted.items())
    with pytest.raises(CheckpointError, match=r"does not know: .*other"):
        _again(tmp_path, older | {"h.0.attn.other": torch.zeros(2)})


def test_B1_a_head_that_is_stored_though_tied_must_be_the_embedding(tmp_path: Path) -> None:
    embedding = made(CASES["qwen2 tied"], tmp_path).get_input_embeddings().weight.detach()
    good = stored(tmp_path)
    assert "lm_head.weight" not in good
    again = _again(tmp_path, good | {"lm_head.weight": embedding.clone()})
    assert torch.equal(again["embedding.weight"][: len(embedding)], embedding)
    other = embedding.clone()
    other[7, 3] += 1e-3
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight differs from model\.embed_tokens\.weight"):
        _again(tmp_path, good | {"lm_head.weight": other})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \[3, 32\]"):
        _again(tmp_path, good | {"lm_head.weight": other[:3].clone()})


def test_B1_a_joined_tensor_of_another_size_is_named(tmp_path: Path) -> None:
    made(CASES["phi3"], tmp_path)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    with pytest.raises(CheckpointError, match=r"qkv_proj\.weight is \[9, 32\].*\[64, 32\]"):
        _again(tmp_path, stored(tmp_path) | {name: torch.zeros(9, 32)})


def test_C2_pickles_are_never_read(shape: ModelShape, folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="pickle"):
        HuggingFaceTensors(folder, shape)
    assert not canary.exists()


@pytest.mark.parametrize("path", ["../model.safetensors", "/model.safetensors", "a/b.safetensors", "x.bin", 7])
def test_B1_an_index_never_leads_out_of_the_folder(path: object, shape: ModelShape, folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(1)}, folder.parent / "model.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), path)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="in the folder itself"):
        HuggingFaceTensors(folder, shape)


def test_B1_damaged_and_missing_files(shape: ModelShape, folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=str(file)):
        HuggingFaceTensors(folder, shape)
    file.unlink()
    with pytest.raises(CheckpointError, match="not a Hugging Face model folder"):
        HuggingFaceTensors(folder, shape)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is missing"):
        HuggingFaceTensors(folder, shape)
    (folder / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="weight_map"):
        HuggingFaceTensors(folder, shape)


def test_B1_tensors_that_disagree_are_named(shape: ModelShape, folder: Path) -> None:
    file = folder / "model.safetensors"
    good = load_file(file)
    name = "model.layers.0.self_attn.k_proj.weight"
    for bad, said in (
        ({**good, name: torch.zeros(2, 3)}, r"k_proj\.weight is \[2, 3\].*\[16, 32\]"),
        ({**good, name: good[name].int()}, r"k_proj\.weight is of I32"),
        ({**good, name: good[name].to(torch.float8_e4m3fn)}, r"k_proj\.weight is of F8_E4M3"),
        ({key: value for key, value in good.items() if key != name}, "missing"),
        ({**good, "model.layers.0.self_attn.q_norm.weight": torch.zeros(8)}, r"q_norm"),
    ):
        save_file(bad, file)
        with pytest.raises(CheckpointError, match=said):
            HuggingFaceTensors(folder, shape)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_B1_a_value_that_is_no_number_is_found_by_whoever_reads_it(
    value: float, dtype: torch.dtype, shape: ModelShape, folder: Path
) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    tensors["model.layers.0.self_attn.k_proj.weight"][9, 3] = value
    save_file(tensors, file)
    source, name = HuggingFaceTensors(folder, shape), "layers.0.attention.key.weight"
    assert source.dtype(name) == source.read(name, (0, 0), (9, 32)).dtype == dtype
    with pytest.raises(CheckpointError, match=r"k_proj\.weight holds NaN or infinity"):
        source.read(name, (8, 0), (8, 32))


def test_B1_an_index_that_names_a_tensor_which_its_file_lacks(shape: ModelShape, folder: Path) -> None:
    index = {"weight_map": dict.fromkeys([*load_file(folder / "model.safetensors"), "gone"], "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="tensor gone cannot be read"):
        HuggingFaceTensors(folder, shape)
