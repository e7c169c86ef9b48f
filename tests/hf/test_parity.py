"""Law C3 of every architecture, whole and layer by layer: what transformers made is proven; caches, dtypes, reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf.tiny_families import CONFIGS, WINDOWS, make_tiny, proven, tampered

from megatron.config.errors import ConfigError, ProofError
from megatron.hf import parity
from megatron.hf.architecture import shape_from_folder
from megatron.hf.cached_generation_proof import compare_generation
from megatron.hf.import_weights import HuggingFaceTensors
from megatron.hf.proof_memory import available_bytes, choose_extent, whole_bytes
from megatron.hf.proof_prompts import Prompt, padded_left, padded_right, prompts_from, shortened
from megatron.hf.proof_record import Comparison, GenerationComparison, LayerComparison, Parting, Proof
from megatron.hf.proof_report import proof_lines, proof_page, write_proof
from megatron.hf.transformers_door import load_model
from megatron.models.decoding import CachedDecoder

EXTENTS = ("whole", "layers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("tiny")
    return {name: make_tiny(name, base / str(number)) for number, name in enumerate(CONFIGS)}


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_C3_every_architecture_is_proven(name: str, extent: str, folders: dict[str, Path]) -> None:
    proof = proven(folders[name], folders[name], extent)
    assert proof.passed and proof.largest_logit_difference < 2e-5
    assert {item.length for item in proof.comparisons} == {1, 2, 17, 32, 64}
    assert all(item.greedy_agreement == 1 and item.nll_difference < 1e-5 for item in proof.comparisons)
    assert proof.generation is not None and proof.generation.passes(1e-4)
    assert proof.generation.agreeing + len(proof.generation.partings) == proof.generation.new_tokens * 4
    assert len(set(proof.generation.prompts)) > 2, "prompts of different lengths in one batch"
    if extent == "layers":
        assert [item.layer for item in proof.layers] == ["embedding", "0", "1", "2"]
    else:
        assert proof.layers == [] and len(proof.padded) > 3
    assert proof.tensors_compared == len(
        list(HuggingFaceTensors(folders[name], shape_from_folder(folders[name])).names())
    )


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("name", WINDOWS)
def test_C3_sliding_windows_are_proven(name: str, extent: str, tmp_path: Path) -> None:
    folder = make_tiny(name, tmp_path / "model", **WINDOWS[name])
    shape = shape_from_folder(folder)
    assert shape.sliding_window == WINDOWS[name]["sliding_window"]
    proof = proven(folder, folder, extent)
    assert proof.passed and proof.generation is not None and max(proof.generation.prompts) > 7
    tampered(folder, tmp_path / "longer", sliding_window=shape.sliding_window + 1)
    with pytest.raises(ProofError, match="logit difference"):
        proven(tmp_path / "longer", folder, extent)


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_C3_narrow_folders_are_compared_with_the_rounded_weights(
    dtype: torch.dtype, extent: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """In float32: the folder's numbers are what is compared, not what 16 bits make of a forward pass."""
    original = folders["qwen3"]
    folder = tampered(
        original,
        tmp_path / "narrow",
        lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}),
        dtype=str(dtype).removeprefix("torch."),
    )
    proof = proven(folder, original, extent, dtype)
    assert proof.passed and proof.dtype == str(dtype).removeprefix("torch.")
    with pytest.raises(ProofError, match="logit difference"):
        proven(folder, original, extent, torch.float32)


def test_a_cache_that_is_wrong_fails_the_proof(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole forward pass is right and generation is not: positions of new tokens one too far."""
    call = CachedDecoder._call

    def shifted(self: CachedDecoder, *args: Any) -> Any:
        made, positions = call(self, *args)
        return made, positions + (made.length == 1) * 3

    monkeypatch.setattr(CachedDecoder, "_call", shifted)
    for extent in EXTENTS:
        with pytest.raises(ProofError, match=r"in cached generation it is"):
            proven(folders["llama"], folders["llama"], extent)


def test_greedy_tokens_may_part_only_where_logits_are_as_near() -> None:
    parting = Parting("text", 3, 5, 6, 1.5e-4)
    near = GenerationComparison([4], 8, 7, 9e-5, [parting])
    assert near.passes(1e-4) and not near.passes(5e-5)
    assert not GenerationComparison([4], 8, 7, 9e-5, [Parting("text", 3, 5, 6, 3e-4)]).passes(1e-4)
    assert not GenerationComparison([4], 8, 8, float("nan"), []).passes(1e-4)


def test_behind_a_parting_ours_goes_on_with_their_token(folders: dict[str, Path]) -> None:
    """So that one tie does not end the comparison: a model whose choices all differ still has every logit compared."""
    folder = folders["llama"]
    shape = shape_from_folder(folder)
    theirs = load_model(folder)
    model = load_ours(folder)
    model.load_state_dict(
        {name: tensor * (-1 if name == "head.weight" else 1) for name, tensor in model.state_dict().items()}
    )
    found = compare_generation(theirs, lambda rows, size: CachedDecoder(model, rows, size), [Prompt("a", [1, 2, 3])], 5)
    assert found.agreeing == 0 and len(found.partings) == 5 and not found.passes(1e-4)
    model = load_ours(folder)
    tokens = [1, 2, 3, *(parting.theirs for parting in found.partings[:4])]
    with torch.no_grad():
        logits = model.logits(torch.tensor([tokens]), torch.zeros(1, len(tokens), dtype=torch.int64))
    assert logits.argmax(-1)[0, 2:].tolist() == [parting.theirs for parting in found.partings]
    assert shape.vocab_size == logits.shape[-1]


def load_ours(folder: Path) -> Any:
    from megatron.hf.rebuilt_decoder import RoundedWeights, whole_decoder

    shape = shape_from_folder(folder)
    return whole_decoder(shape, RoundedWeights(HuggingFaceTensors(folder, shape), torch.float32))


def test_models_of_one_position_have_no_generation_to_compare(tmp_path: Path) -> None:
    folder = make_tiny("gpt2", tmp_path / "one", n_positions=1)
    for extent in EXTENTS:
        proof = proven(folder, folder, extent)
        assert proof.passed and proof.generation is None
        assert "too few positions" in proof_page(proof)


def test_the_extent_goes_by_memory_and_says_so() -> None:
    shape = shape_from_folder_fields()
    needed = whole_bytes(shape, 64)
    assert needed == 4 * (2 * shape.parameter_count() + 2 * 64 * shape.vocab_size)
    extent, words = choose_extent("auto", shape, 64, available=2 * needed)
    assert extent == "whole" and "GB available" in words
    assert choose_extent("auto", shape, 64, available=2 * needed - 1)[0] == "layers"
    assert choose_extent("whole", shape, 64, available=0)[0] == "whole"
    assert choose_extent("layers", shape, 64, available=10**15)[0] == "layers"
    with pytest.raises(ConfigError, match="auto, whole, layers"):
        choose_extent("half", shape, 64)
    assert 0 < available_bytes() < 10**14


def shape_from_folder_fields() -> Any:
    from hf.made_folder import shape_of

    return shape_of({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48})


def test_prompts_have_all_lengths_and_rare_words() -> None:
    shape = shape_from_folder_fields()
    prompts = prompts_from({"a": [1, 2, 3], "b": [4], "empty": []}, shape)
    assert [len(prompt.tokens) for prompt in prompts] == [1, 2, 16, 17, 32, 32, 32]
    assert {prompt.text for prompt in prompts} == {"a", "b", "random ids"}
    assert prompts[0].tokens == [1] and prompts[4].tokens == ([1, 2, 3] * 11)[:32]
    alone = prompts_from({}, shape)
    assert [len(prompt.tokens) for prompt in alone] == [1, 2, 16, 17, 32]
    assert {prompt.text for prompt in alone} == {"random ids"} and alone[-1].tokens == prompts[-1].tokens
    assert [len(p.tokens) for p in prompts_from({"a": [1]}, shape, longest=8)] == [1, 2, 4, 8, 8]
    assert [len(p.tokens) for p in shortened(prompts, 3)] == [1, 2, 3, 3, 3]


def test_padding_is_where_each_side_wants_it() -> None:
    prompts = [Prompt("a", [5, 6, 7]), Prompt("b", [8])]
    assert padded_right(prompts)[0].tolist() == [[5, 6, 7], [8, 0, 0]] and padded_right(prompts)[1] == [3, 1]
    tokens, mask = padded_left(prompts)
    assert tokens.tolist() == [[5, 6, 7], [0, 0, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_report_says_what_was_found(tmp_path: Path, folders: dict[str, Path]) -> None:
    proof = proven(folders["olmo2"], folders["olmo2"], "layers")
    write_proof(tmp_path, proof, {"tokenizer_bytes_compared": 12})
    record = json.loads((tmp_path / "proof.json").read_text())
    assert record["passed"] is True and record["format"] == 2 and record["tokenizer_bytes_compared"] == 12
    assert len(record["layers"]) == 4 and record["extent"] == "layers" and record["generation"]["new_tokens"] == 3
    page, lines = (tmp_path / "proof.md").read_text(), "\n".join(proof_lines(proof))
    assert "**proven**" in page and "| embedding |" in page and "layer by layer" in page
    assert lines.endswith("proven") and "12 of 12 agree" in lines and "hidden states of 3 layers" in lines
    assert "in one batch padded on the right; none by itself" in lines and "What was compared: " in page
    assert "compared: the logits of" in "\n".join(proof_lines(proven(folders["olmo2"], folders["olmo2"], "whole")))
    bad = Proof(
        1e-4,
        "float32",
        [Comparison("a|b", 4, 0.5, 0.1, 3.0, 0.75)],
        reason="x",
        generation=GenerationComparison([4], 8, 7, 0.2, [Parting("a|b", 3, 5, 6, 0.1)]),
    )
    assert "NOT proven" in "\n".join(proof_lines(bad)) and "**not proven**" in proof_page(bad)
    assert "new token 4: ours 5, transformers' 6" in proof_page(bad) and "a\\|b" in proof_page(bad)
    assert not LayerComparison("1", 0.0, float("nan"), 1.0).passes(1e-4)
    assert LayerComparison("1", 0.0, 9e-3, 100.0).passes(1e-4) and not LayerComparison("1", 0.0, 2e-4, 0.5).passes(1e-4)


def test_without_accelerate_the_whole_proof_still_tells(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer-by-layer proof needs it; a whole one that misses says what it can."""
    from megatron.config.errors import UnavailableError

    find = parity.load_model.__globals__["importlib"].util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "accelerate" else find(name, *more)
    )
    with pytest.raises(UnavailableError, match="pip install accelerate"):
        proven(folders["llama"], folders["llama"], "layers")
    folder = tampered(folders["llama"], tmp_path / "bad", lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(ProofError, match="logit difference"):
        proven(folder, folders["llama"], "whole")
