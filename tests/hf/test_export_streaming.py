"""Export tensor by tensor: the same bytes whatever the cut, the files, the workers; killed, full, busy or damaged."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from hf.family_cases import CASES, made, stored
from hf.streamed import python, recut, run
from huggingface_hub.serialization import split_torch_state_dict_into_shards
from transformers import AutoModelForCausalLM

from megatron.checkpoint.aside import aside_of, made_aside
from megatron.checkpoint.imported import write_imported
from megatron.checkpoint.manager import CheckpointManager, open_checkpoint
from megatron.checkpoint.tensor_shards import WholeTensors, whole_shards
from megatron.commands.export_hf import main
from megatron.config.errors import CheckpointError, ConfigError, StorageError
from megatron.hf.architecture import architecture_for
from megatron.hf.checkpoint_source import open_source
from megatron.hf.export import Exported, Writing, export_checkpoint
from megatron.hf.import_folder import import_folder
from megatron.hf.name_table import entries
from megatron.hf.shard_plan import parse_size

FAMILIES = ("llama", "qwen3 tied, biased", "phi3", "gpt_neox", "gpt2")
SMALL = Writing(max_shard_size=10_000, workers=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By family, the folder that transformers made and a checkpoint of it, cut over four ranks."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name in FAMILIES:
        made(CASES[name], folder / name / "theirs")
        imported = import_folder(folder / name / "theirs", folder / name / "whole", dtype="float32").checkpoint
        found[name] = folder / name / "theirs", recut(imported, folder / name / "cut")
    return found


def streamed(checkpoint: Path, output: Path, dtype: str = "float32", writing: Writing = SMALL) -> Exported:
    return export_checkpoint(open_source(checkpoint, later=True), output, dtype=dtype, proven=False, writing=writing)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_tensor_is_what_transformers_had(
    name: str, dtype: str, models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    theirs, checkpoint = models[name]
    done = streamed(checkpoint, tmp_path / "out", dtype)
    wanted = {key: tensor.to(getattr(torch, dtype)) for key, tensor in stored(theirs).items()}
    found = stored(tmp_path / "out")
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert done.files == len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("size", [1, 4_000, 13_000, 30_000, 10**9])
def test_files_are_cut_and_named_as_the_hub_does(
    size: int, models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    _, checkpoint = models["llama"]
    done = streamed(checkpoint, tmp_path / "out", writing=Writing(max_shard_size=size))
    found = stored(tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"
    order = table_order(checkpoint)
    wanted = split_torch_state_dict_into_shards(
        {name: found[name] for name in order}, filename_pattern="model{suffix}.safetensors", max_shard_size=size
    )
    names = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert names == set(wanted.filename_to_tensors)
    assert index.exists() == wanted.is_sharded
    if wanted.is_sharded:
        written = json.loads(index.read_text())
        assert written["weight_map"] == wanted.tensor_to_filename
        assert written["metadata"]["total_size"] == wanted.metadata["total_size"] == done.bytes
        assert written["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in found.values())


def table_order(checkpoint: Path) -> list[str]:
    """Names of theirs as they are written: embedding, layer after layer, norm, head."""
    shape = open_source(checkpoint).shape
    names = [entry.theirs for entry in entries(architecture_for(shape).table, shape)]
    layer = {name: int(name.split(".")[2]) for name in names if ".layers." in name}
    last = max(map(names.index, layer))
    return sorted(names, key=lambda name: layer.get(name, -1 if names.index(name) < last else 10**6))


def test_transformers_loads_many_files(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    theirs, checkpoint = models["gpt_neox"]
    streamed(checkpoint, tmp_path / "out")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
            for folder in (theirs, tmp_path / "out")
        )
    assert torch.equal(first, second)


KILLED = """
import os, signal, sys
from pathlib import Path
import megatron.hf.shard_writer as writer
from megatron.hf.checkpoint_source import open_source
from megatron.hf.export import Writing, export_checkpoint
left, write = int(sys.argv[3]), writer._write_all
def dying(*words):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*words)
writer._write_all = dying
source = open_source(Path(sys.argv[1]), later=True)
export_checkpoint(source, Path(sys.argv[2]), proven=False, writing=Writing(10_000, 1))
"""


@pytest.fixture(scope="module")
def half(models: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an export that was killed after 40 writes left aside."""
    output = tmp_path_factory.mktemp("killed") / "out"
    assert python(KILLED, models["gpt_neox"][1], output, "40").returncode == -9
    assert not output.exists()
    return aside_of(output)


def test_a_killed_export_goes_on(half: Path, models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    theirs, checkpoint = models["gpt_neox"]
    aside = Path(shutil.copytree(half, aside_of(tmp_path / "out")))
    before = {path.name: path.stat().st_ino for path in aside.glob("*.safetensors")}
    first = min(aside.glob("model-00001-*"))
    with open(first, "r+b") as file:  # a page that never reached the disk
        file.seek(-3, 2)
        file.write(b"\xff\xff\xff")
    said: list[str] = []
    done = streamed(checkpoint, tmp_path / "out", writing=Writing(10_000, 2, say=said.append))
    assert 0 < done.kept < done.bytes and "going on from" in said[0]
    after = {path.name: path.stat().st_ino for path in (tmp_path / "out").glob("*.safetensors")}
    assert before.items() <= after.items(), "files are gone on with, not made again"
    found, wanted = stored(tmp_path / "out"), stored(theirs)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("other", ["dtype", "files", "checkpoint"])
def test_another_export_begins_anew(
    other: str, half: Path, models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    theirs, checkpoint = models["gpt_neox"]
    shutil.copytree(half, aside_of(tmp_path / "out"))
    if other == "checkpoint":
        checkpoint = changed(checkpoint, tmp_path / "changed")
    dtype, size = "bfloat16" if other == "dtype" else "float32", 5_000 if other == "files" else 10_000
    said: list[str] = []
    done = streamed(checkpoint, tmp_path / "out", dtype, Writing(size, 1, say=said.append))
    assert done.kept == 0 and "something else is removed" in said[0]
    if other != "checkpoint":
        wanted = {key: tensor.to(getattr(torch, dtype)) for key, tensor in stored(theirs).items()}
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in stored(tmp_path / "out").items())


def changed(checkpoint: Path, folder: Path, value: float = 1.5, stored_as: torch.dtype = torch.float32) -> Path:
    """The same checkpoint with one value changed, deep inside."""
    found = open_checkpoint(checkpoint)
    tensors = {name: tensor.to(stored_as) for name, tensor in found.model().all().items()}
    tensors["layers.1.attention.value.weight"][3, 2] = value
    files: dict[str, bytes | Path] = {"config.toml": checkpoint / "config.toml"}
    return CheckpointManager(folder).save(0, whole_shards(tensors), {}, {}, found.state, files)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_NaN_is_found_while_streaming_and_nothing_is_published(
    value: float, models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    checkpoint = changed(models["llama"][1], tmp_path / "changed", value)
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.value\.weight holds NaN or infinity"):
        streamed(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_a_value_too_large_for_the_dtype_is_named(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint = changed(models["llama"][1], tmp_path / "changed", 70_000.0)
    with pytest.raises(CheckpointError, match=r"value\.weight holds 70000, which float16 cannot say"):
        streamed(checkpoint, tmp_path / "out", "float16")
    streamed(checkpoint, tmp_path / "out", "bfloat16")


def test_keep_means_the_dtype_that_is_stored(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint = changed(models["llama"][1], tmp_path / "changed", stored_as=torch.bfloat16)
    assert streamed(checkpoint, tmp_path / "out", "keep").dtype == "bfloat16"
    assert {tensor.dtype for tensor in stored(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    found = open_checkpoint(checkpoint)
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in found.model().all().items()}
    text = (checkpoint / "config.toml").read_text()
    write_imported(tmp_path / "mixed", WholeTensors(mixed), found.state["model"], [], text, {})
    with pytest.raises(ConfigError, match="keep: the checkpoint holds bfloat16, float32"):
        streamed(tmp_path / "mixed", tmp_path / "other", "keep")


def test_two_exporters_never_write_one_folder(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    with made_aside(tmp_path / "out"), pytest.raises(ConfigError, match="another process is writing it"):
        streamed(models["llama"][1], tmp_path / "out")
    streamed(models["llama"][1], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_seen_before_anything_is_written(
    models: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000_000))
    with pytest.raises(StorageError, match=r"needs 0\.00 GB and 0\.02 GB are free"):
        streamed(models["llama"][1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_out_of_disk_midway_says_what_is_kept_and_the_next_start_goes_on(
    models: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    theirs, checkpoint = models["llama"]
    words = ("export_hf", "--input", checkpoint, "--output", tmp_path / "out", "--no-prove", "--workers", "1")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    done = run(*words, before=limit)
    assert done.returncode == 74 and not (tmp_path / "out").exists()
    said = rf"{re.escape(str(aside_of(tmp_path / 'out')))}/model\.safetensors: cannot write tensor \S+: File too large"
    assert re.search(said, done.stderr) and "raise the limit" in done.stderr and "goes on from there" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(*words)
    assert done.returncode == 0 and "going on from" in done.stderr and "from an earlier start" in done.stdout
    assert all(torch.equal(tensor, stored(theirs)[key]) for key, tensor in stored(tmp_path / "out").items())


def test_a_damaged_checkpoint_is_found_while_streaming(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    shutil.copytree(models["llama"][1], tmp_path / "damaged")
    file = max((tmp_path / "damaged" / "model").iterdir(), key=lambda path: path.stat().st_size)
    with open(file, "r+b") as opened:
        opened.seek(-2, 2)
        opened.write(b"\x01")
    with pytest.raises(CheckpointError, match=rf"{file.name}: expected sha256"):
        streamed(tmp_path / "damaged", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_replacement_killed_between_two_renames_is_put_back(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "config.json").write_text("{}")
    with made_aside(tmp_path / "out"):
        assert (tmp_path / "out" / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sizes_in_words() -> None:
    cases = {"5GB": 5 * 10**9, "500MB": 500 * 10**6, "2GiB": 2 * 2**30, "1.5gb": 15 * 10**8, "77": 77, "10 KB": 10_000}
    assert {words: parse_size(words) for words in cases} == cases
    for words in ("", "GB", "-1GB", "5XB", "0", "1e9"):
        with pytest.raises(ConfigError, match="--max-shard-size"):
            parse_size(words)


def test_the_card_says_what_the_user_says(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    found = {"acc": {"value": 0.4321, "stderr": 0.0123}}
    record = {"harness": "lm_eval 0.4.13", "models": [{"name": "mine", "results": {"arc_easy": {"metrics": found}}}]}
    (tmp_path / "results.json").write_text(json.dumps(record))
    (tmp_path / "note.md").write_text("Data: **permissive** code.")
    words = ["--input", str(models["llama"][1]), "--output", str(tmp_path / "out"), "--no-prove"]
    words += ["--evaluation", str(tmp_path / "results.json"), "--license", "mit", "--card-note", "One."]
    assert main([*words, "--card-note", f"@{tmp_path / 'note.md'}"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "One." in card and "Data: **permissive** code." in card
    assert "| mine | arc_easy | acc | 0.4321 | 0.0123 |" in card and "lm_eval 0.4.13" in card
    (tmp_path / "results.json").write_text('{"models": 3}')
    with pytest.raises(ConfigError, match="--evaluation"):
        main(words)
