"""Law C2 and B1 for foreign folders: safetensors only, inside the folder only, complete, of the right sizes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf.made_checkpoint import LLAMA, NEOX
from safetensors.torch import load_file, save_file

from megatron.config.errors import CheckpointError
from megatron.config.model_shape import ModelShape, resolve_model
from megatron.config.schema import ModelSection
from megatron.hf.architecture import config_json
from megatron.hf.import_weights import load_hf_weights
from megatron.models.decoder import Decoder


def shape_of(fields: dict[str, Any]) -> ModelShape:
    return resolve_model(ModelSection(seq_length=32, **fields), 100)


@pytest.fixture
def shape() -> ModelShape:
    return shape_of(LLAMA)


@pytest.fixture
def folder(shape: ModelShape, tmp_path: Path) -> Path:
    return made_by_transformers(shape, tmp_path / "model")


def made_by_transformers(shape: ModelShape, folder: Path) -> Path:
    """A random model that transformers made and saved, norms and biases random too."""
    description = config_json(shape, bos_token_id=1, eos_token_id=1, dtype="float32")
    config = transformers.AutoConfig.for_model(**description)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "fields",
    [LLAMA, LLAMA | {"tie_word_embeddings": True, "attention_bias": True}, NEOX],
    ids=["llama", "tied", "neox"],
)
def test_C3_a_model_made_by_transformers_gives_the_same_logits_in_ours(fields: dict[str, Any], tmp_path: Path) -> None:
    shape = shape_of(fields)
    folder = made_by_transformers(shape, tmp_path / "model")
    ours = Decoder(shape)
    ours.load_state_dict(load_hf_weights(folder, shape))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(shape.vocab_size, (2, 32))
    with torch.no_grad():
        difference = ours.logits(tokens, torch.zeros_like(tokens)) - theirs(tokens).logits
    assert float(difference.abs().max()) <= 1e-4


def test_C2_pickles_are_never_read(shape: ModelShape, folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(CheckpointError, match="pickle"):
        load_hf_weights(folder, shape)
    assert not canary.exists()


@pytest.mark.parametrize("path", ["../model.safetensors", "/model.safetensors", "a/b.safetensors", "x.bin", 7])
def test_B1_an_index_never_leads_out_of_the_folder(path: object, shape: ModelShape, folder: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(1)}, folder.parent / "model.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), path)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="in the folder itself"):
        load_hf_weights(folder, shape)


def test_B1_damaged_and_missing_files(shape: ModelShape, folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=str(file)):
        load_hf_weights(folder, shape)
    file.unlink()
    with pytest.raises(CheckpointError, match="not a Hugging Face model folder"):
        load_hf_weights(folder, shape)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is missing"):
        load_hf_weights(folder, shape)
    (folder / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="weight_map"):
        load_hf_weights(folder, shape)


def test_B1_tensors_that_disagree_are_named(shape: ModelShape, folder: Path) -> None:
    file = folder / "model.safetensors"
    good = load_file(file)
    name = "model.layers.0.self_attn.k_proj.weight"
    for bad, said in (
        ({**good, name: torch.zeros(2, 3)}, r"k_proj\.weight is \[2, 3\].*\[16, 32\]"),
        ({**good, name: torch.full_like(good[name], torch.inf)}, "infinity"),
        ({key: value for key, value in good.items() if key != name}, "missing"),
        ({**good, "model.layers.0.self_attn.q_norm.weight": torch.zeros(8)}, r"q_norm"),
    ):
        save_file(bad, file)
        with pytest.raises(CheckpointError, match=said):
            load_hf_weights(folder, shape)
