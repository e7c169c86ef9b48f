"""Law C3: an exported folder equals our model, as `transformers` loads it with no code of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf.made_checkpoint import LLAMA, NEOX, make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.checkpoint.tensor_shards import WholeTensors
from megatron.config.errors import CheckpointError, ConfigError, ProofError
from megatron.hf.checkpoint_source import CheckpointSource, open_source
from megatron.hf.export import export_checkpoint, prove_folder
from megatron.hf.export_checks import check_names
from megatron.hf.import_weights import HuggingFaceTensors

SHAPES = {
    "llama": LLAMA,
    "llama-tied-biased": LLAMA | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "neox": NEOX,
    "neox-sequential": NEOX | {"parallel_block": False, "hidden_act": "gelu_tanh", "attention_bias": False},
    "llama-dropout": LLAMA | {"hidden_dropout": 0.2},
    "neox-dropout": NEOX | {"hidden_dropout": 0.2},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_checkpoint(folder)
    return folder / "run"


@pytest.fixture(scope="module")
def source(run: Path) -> CheckpointSource:
    return open_source(run)


@pytest.fixture(scope="module")
def exported(source: CheckpointSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_checkpoint(source, tmp_path_factory.mktemp("exports") / "model").folder


@pytest.mark.parametrize("name", SHAPES)
def test_C3_every_architecture_proves_itself(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, SHAPES[name], "bytes")
    source = open_source(tmp_path / "run")
    proof = export_checkpoint(source, tmp_path / "out").proof
    assert proof is not None and proof.largest_logit_difference <= 1e-4
    assert {item.length for item in proof.comparisons} >= {1, source.shape.max_position_embeddings}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("hidden_dropout") == (source.shape.hidden_dropout if "neox" in name else None)
    read = HuggingFaceTensors(tmp_path / "out", source.shape).all()
    assert read.keys() == source.weights.keys()
    for name, tensor in source.weights.items():
        rows = source.shape.vocab_size if name in ("embedding.weight", "head.weight") else len(tensor)
        assert torch.equal(read[name][:rows], tensor[:rows])


def test_C3_bfloat16_export_equals_the_rounded_model(source: CheckpointSource, tmp_path: Path) -> None:
    proof = export_checkpoint(source, tmp_path / "out", dtype="bfloat16").proof
    assert proof is not None and proof.dtype == "bfloat16"
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16


def test_C3_one_changed_weight_fails_the_proof(source: CheckpointSource, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tampered"
    shutil.copytree(exported, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match="logit difference") as caught:
        prove_folder(folder, source)
    assert caught.value.exit_code == 7


def test_C3_a_change_too_small_for_the_logits_is_found_too(
    source: CheckpointSource, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tampered"
    shutil.copytree(exported, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 1] += 1e-7
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProofError, match=r"embedding\.weight"):
        prove_folder(folder, source)


def test_folder_loads_in_transformers_alone(source: CheckpointSource, exported: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    assert model.config.vocab_size == source.tokenizer.vocab_size == len(tokenizer)
    assert model.get_input_embeddings().weight.shape[0] == source.tokenizer.vocab_size
    assert tokenizer.eos_token_id == source.tokenizer.eod_id == model.config.eos_token_id
    text = "def main():\n    return '</s><|endoftext|>'\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == source.tokenizer.encode(text)
    assert tokenizer.decode(ids[0]) == text
    written = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert written.shape[1] <= ids.shape[1] + 3


def test_config_speaks_to_old_and_new_readers(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert {"head_dim", "max_position_embeddings", "tie_word_embeddings", "bos_token_id"} <= config.keys()
    proof = json.loads((exported / "proof.json").read_text())
    assert proof["passed"] and proof["largest_logit_difference"] <= 1e-4
    assert proof["tokenizer_bytes_compared"] > 1_000_000
    assert any(item["text"].startswith("built-in") for item in proof["comparisons"])


def test_model_card_tells_what_the_ledger_knows(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "balanced" in card and "50.0 %" in card
    assert "order hash" in card and "# license" in card


def test_nothing_is_published_when_the_proof_fails(source: CheckpointSource, tmp_path: Path) -> None:
    with pytest.raises(ProofError):
        export_checkpoint(source, tmp_path / "out", tolerance=-1.0)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_unless_told_otherwise(source: CheckpointSource, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(ConfigError):
            export_checkpoint(source, tmp_path / "mine", overwrite=overwrite)
    export_checkpoint(source, tmp_path / "out", proven=False)
    with pytest.raises(ConfigError, match="--overwrite"):
        export_checkpoint(source, tmp_path / "out", proven=False)
    export_checkpoint(source, tmp_path / "out", proven=False, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize(
    ("field", "over"),
    [
        ("parallel_block", LLAMA | {"parallel_block": True}),
        ("gated_mlp", LLAMA | {"gated_mlp": False}),
        ("partial_rotary_factor", LLAMA | {"partial_rotary_factor": 0.5, "attention_bias": True}),
        ("num_key_value_heads", NEOX | {"num_key_value_heads": 2}),
        ("mlp_bias", NEOX | {"mlp_bias": False}),
    ],
)
def test_what_no_architecture_says_is_refused_by_field(field: str, over: dict[str, object], tmp_path: Path) -> None:
    make_checkpoint(tmp_path, over, "bytes")
    with pytest.raises(ConfigError, match=field):
        export_checkpoint(open_source(tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_disagree_with_the_shape_are_named(source: CheckpointSource) -> None:
    name = "layers.0.mlp.up.weight"
    for bad, said in (
        ({**source.weights, name: torch.zeros(3, 4)}, r"\[3, 4\] in the checkpoint, its config says \[48, 32\]"),
        ({key: value for key, value in source.weights.items() if key != name}, "lacks"),
        ({**source.weights, "layers.9.extra": torch.zeros(1)}, r"layers\.9\.extra"),
    ):
        with pytest.raises(CheckpointError, match=said):
            check_names(WholeTensors(bad), source.shape)


def test_a_run_folder_without_checkpoints_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "run", tmp_path / "absent"):
        with pytest.raises(CheckpointError):
            open_source(path)
