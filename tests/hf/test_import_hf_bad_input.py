"""Folders that are damaged, that lie, or that would like to run something: each a clear error, and nothing left."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf.family_cases import CASES, made
from hf.streamed import run
from safetensors.torch import load_file, save_file

from megatron.config.errors import CheckpointError, ConfigError, StagemixError
from megatron.hf.import_folder import import_folder

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "model"
    made(CASES["llama"], path, "20KB")
    return path


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def refused(folder: Path, kind: type[StagemixError], words: str) -> None:
    """The import fails in these words, and leaves no trace."""
    output = folder.parent / "refused"
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(kind, match=words):
        import_folder(folder, output)
    assert sorted(path.name for path in folder.parent.iterdir()) == before


def a_file(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[1]


def set_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_truncated_file(folder: Path) -> None:
    path = a_file(folder)
    os.truncate(path, path.stat().st_size - 1)
    refused(folder, CheckpointError, rf"{path.name}: not a whole safetensors file")


def test_missing_file(folder: Path) -> None:
    a_file(folder).unlink()
    refused(folder, CheckpointError, rf"{INDEX}: model-00002-of-\d+\.safetensors is missing, which holds tensor")


@pytest.mark.parametrize("way", ["../outside.safetensors", "/tmp/outside.safetensors", "sub/inside.safetensors"])
def test_path_escape(way: str, folder: Path) -> None:
    shutil.copy(a_file(folder), folder.parent / "outside.safetensors")
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = way
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, CheckpointError, re.escape(f"tensor {name} lies in {way!r}"))


def test_path_escape_by_a_link(folder: Path) -> None:
    path = a_file(folder)
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")
    refused(folder, CheckpointError, rf"{path.name}: is a link to .*elsewhere\.safetensors, outside the folder")


def test_links_inside_the_hubs_cache_are_followed(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "hub" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "hub" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for path in whole.iterdir():
        shutil.copy(path, tmp_path / "hub" / "blobs" / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert import_folder(snapshot, tmp_path / "checkpoint").architecture == "LlamaForCausalLM"


class Canary:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_canary_in_a_pickle_is_never_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "sings"
    torch.save({"x": Canary(canary)}, folder / "pytorch_model.bin")
    import_folder(folder, tmp_path / "beside")
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    refused(folder, CheckpointError, r"only pytorch_model\.bin found, and pickle files can run code when read")
    assert not canary.exists()


def test_canary_in_remote_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "sings"
    for name in ("modeling_mine", "configuration_mine", "tokenization_mine", "__init__", "conftest"):
        (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    mapped = {"AutoModelForCausalLM": "modeling_mine.Mine", "AutoConfig": "configuration_mine.Mine"}
    set_config(folder, auto_map=mapped)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "tokenizer_class": "Mine"})
    )
    done = run("import_hf", "--input", folder, "--output", tmp_path / "checkpoint")
    assert done.returncode == 0, done.stderr
    assert "auto_map names code" in done.stdout
    done = run("export_hf", "--input", tmp_path / "checkpoint", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not canary.exists() and not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    set_config(folder, model_type="mine", architectures=["MineForCausalLM"])
    refused(folder, ConfigError, "model_type = 'mine'.*code that comes with a model is never run")
    assert not canary.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_NaN_weights(value: float, folder: Path) -> None:
    path = a_file(folder)
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    refused(folder, CheckpointError, rf"tensor {re.escape(name)} holds NaN or infinity")


def test_config_and_weights_disagree(folder: Path) -> None:
    set_config(folder, intermediate_size=47)
    refused(folder, CheckpointError, r"mlp\.\w+_proj\.weight is \[48, 32\], and config and model shape say \[47, 32\]")


def test_wrong_architecture(folder: Path) -> None:
    set_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused(folder, ConfigError, "model_type = 't5'.*known: .*LlamaForCausalLM")


def test_a_field_that_the_decoder_cannot_express(folder: Path) -> None:
    set_config(folder, hidden_act="relu")
    refused(folder, ConfigError, "hidden_act = 'relu'")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, CheckpointError, r"config\.json cannot be read")
    (folder / "config.json").unlink()
    refused(folder, CheckpointError, r"config\.json is missing")


def test_a_tokenizer_that_was_named_and_cannot_be_read(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"broken"')
    done = import_folder(folder, folder.parent / "checkpoint")
    assert done.tokenizer is None and any("tokenizer.json" in note for note in done.notes)
    output = folder.parent / "other"
    with pytest.raises(StagemixError, match=r"tokenizer\.json"):
        import_folder(folder, output, tokenizer=str(folder / "tokenizer.json"))
    assert not output.exists()


def test_out_of_disk_midway(folder: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = run("import_hf", "--input", folder, "--output", tmp_path / "checkpoint", before=limit)
    assert done.returncode == 74 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_null_epsilon_is_no_default(folder: Path) -> None:
    set_config(folder, rms_norm_eps=None)
    refused(folder, ConfigError, r"config\.json: rms_norm_eps is null, and must be a number")


def test_ids_beyond_the_vocabulary_are_told(folder: Path, tmp_path: Path) -> None:
    set_config(folder, eos_token_id=5000)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7000]}))
    notes = "\n".join(import_folder(folder, tmp_path / "checkpoint").notes)
    assert "config.json: eos_token_id = 5000, and the model has 101 words" in notes
    assert "generation_config.json: eos_token_id = [1, 7000]" in notes
