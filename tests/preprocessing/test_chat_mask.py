"""Loss masks: bits against numpy's own definition of the format, and files that are refused by name."""

from __future__ import annotations

import json
import pickle
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import SourceSection
from megatron.data.indexed_dataset import IndexedDataset
from megatron.data.indexed_writer import IndexedDatasetWriter
from megatron.data.loss_mask import LossMask, LossMaskWriter, has_loss_mask
from megatron.data.sources import open_sources


def write(prefix: Path, pieces: list[list[bool]]) -> dict[str, Any]:
    """A dataset of one document a piece, its mask written piece by piece."""
    with IndexedDatasetWriter(prefix, np.uint16, overwrite=True) as writer:
        writer.mask = LossMaskWriter(prefix)
        for piece in pieces:
            writer.add_document([7] * len(piece))
            writer.mask.add(np.array(piece, bool))
    dataset = IndexedDataset(prefix)
    assert dataset.manifest is not None
    return dataset.manifest


@settings(max_examples=40, deadline=None)
@given(pieces=st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=12), data=st.data())
def test_bits_are_those_of_packbits(
    pieces: list[list[bool]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.mktemp("mask") / "p.q"
    manifest = write(prefix, pieces)
    bits = np.array(sum(pieces, []))
    assert Path(f"{prefix}.mask").read_bytes() == np.packbits(bits, bitorder="little").tobytes()
    mask = LossMask.open(prefix, manifest)
    assert (mask.token_count, len(mask), mask.target_count) == (len(bits), len(bits), int(bits.sum()))
    start = data.draw(st.integers(0, len(bits)))
    end = data.draw(st.integers(start, len(bits)))
    for opened in (mask, pickle.loads(pickle.dumps(mask))):
        found = opened.bits(start, end)
        assert found.dtype == np.bool_ and np.array_equal(found, bits[start:end])
        assert opened.count(start, end) == int(bits[start:end].sum())


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "file size = 2"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "file size = 4"),
        (lambda path: path.write_bytes(b""), "file size = 0"),
        (flipped, "sha256"),
    ],
)
def test_a_file_that_is_not_the_manifests_is_refused_by_name(tmp_path: Path, damage: Any, words: str) -> None:
    manifest = write(tmp_path / "p", [[True, False] * 10])
    damage(tmp_path / "p.mask")
    with pytest.raises(DataError) as raised:
        LossMask.open(tmp_path / "p", manifest)
    assert str(tmp_path / "p.mask") in str(raised.value) and words in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [{"bits": 19}, {"bytes": 2}, {"format": 2}, {"sha256": None}, {"target_tokens": "10"}, {"target_tokens": 9}],
)
def test_a_manifest_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    manifest = write(tmp_path / "p", [[True, False] * 10])
    with pytest.raises(DataError):
        LossMask.open(tmp_path / "p", manifest | {"loss_mask": manifest["loss_mask"] | changes})


def test_a_dataset_without_a_mask_says_so(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer:
        writer.add_document([1, 2])
    manifest = IndexedDataset(tmp_path / "p").manifest
    assert manifest is not None and not has_loss_mask(manifest) and not has_loss_mask(None)
    with pytest.raises(DataError, match="the dataset has no loss mask"):
        LossMask.open(tmp_path / "p", manifest)


def test_a_mask_of_other_length_publishes_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="bits for 3 tokens"),
        IndexedDatasetWriter(tmp_path / "p", np.uint16) as writer,
    ):
        writer.mask = LossMaskWriter(tmp_path / "p")
        writer.add_document([1, 2, 3])
        writer.mask.add(np.ones(2, bool))
    assert not list(tmp_path.iterdir())


def config_of(tmp_path: Path, *data: str) -> str:
    path = tmp_path / "c.toml"
    path.write_text(
        f'[run]\nname = "m"\noutput = "{tmp_path}/run"\n[tokenizer]\npath = "bytes"\n'
        f'[model]\npreset = "llama-160m"\nseq_length = 16\n[sources.chats]\ndata = {json.dumps(list(data))}\n'
        '[train]\nglobal_batch_size = 1\n[[stages]]\nname = "a"\nsamples = 1\nmixture = { chats = 1 }\n'
        'lr = { peak = 6e-4, shape = "constant" }\n'
    )
    return str(path)


def test_inspect_data_marks_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.commands.inspect_data import main

    said, answer = b"What?\n", b"It's \xc3\xa9."
    for name, count in (("p", 1), ("q", 2)):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.mask = LossMaskWriter(tmp_path / name)
            for _ in range(count):
                writer.add_document([*said, *answer, 256])
                writer.mask.add(np.array([0] * len(said) + [1] * (len(answer) + 1)))
    config = config_of(tmp_path, str(tmp_path / "p"), str(tmp_path / "q"))
    assert main([config, "--documents", "chats:1:9", "--loss"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["document 1: the loss is on 9 of 15 tokens", "  What?\\n", "\u2588 It's \u00e9.<|endoftext|>"]
    assert len(lines) == 6
    assert main([config, "--documents", "chats:0:1", "--loss", "--jsonl"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["target_tokens"] == 9 and row["runs"] == [[False, "What?\n"], [True, "It's \u00e9.<|endoftext|>"]]
    flipped(tmp_path / "p.mask")
    with pytest.raises(DataError, match="p.mask"):
        main([config, "--documents", "chats:0:1", "--loss"])
    with IndexedDatasetWriter(tmp_path / "t", np.uint16) as writer:
        writer.add_document([*said, *answer, *said, 256])
    with pytest.raises(ConfigError, match="has no loss mask"):
        main([config_of(tmp_path, str(tmp_path / "t")), "--documents", "chats", "--loss"])


def test_an_opened_source_knows_that_it_has_one(tmp_path: Path) -> None:
    for name, masked in (("chat", True), ("text", False)):
        if masked:
            write(tmp_path / name, [[True, False, True]])
        else:
            with IndexedDatasetWriter(tmp_path / name, np.uint16, overwrite=True) as writer:
                writer.add_document([8, 9, 10, 11])
    sections = {name: SourceSection(data=[str(tmp_path / name)]) for name in ("chat", "text")}
    opened = open_sources(sections, seed=1, seq_length=2, holdout_fraction=Decimal(0), cache_dir=None)
    assert {name: source.has_loss_mask for name, source in opened.items()} == {"chat": True, "text": False}
