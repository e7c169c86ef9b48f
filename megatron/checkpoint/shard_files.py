"""A rank's own files of a checkpoint: its shards, packed into safetensors files of bounded size."""

from __future__ import annotations

from pathlib import Path

from megatron.checkpoint.manifest import Seal
from megatron.checkpoint.storage import Storage
from megatron.checkpoint.tensor_format import cut_metadata
from megatron.checkpoint.tensor_shards import TensorShard, TensorShards

FILE_BYTES = 4 * 10**9


def write_shards(
    storage: Storage, folder: Path, part: str, shards: TensorShards, rank: int, ranks: int
) -> dict[str, Seal]:
    """Writes `<part>/<part>-<rank>-of-<ranks>-<number>.safetensors` in `folder`; the seals by path in it.

    A file holds at most FILE_BYTES (one shard may be larger) and a tensor's name once, so that several shards of a
    tensor go to several files. The mapping is read once, name by name in sorted order, and nothing of it is kept
    beyond the files being filled.
    """
    seals: dict[str, Seal] = {}
    # The k-th shard of each name goes to the k-th of the files that are filled side by side.
    filling: list[dict[str, TensorShard]] = []
    size = 0

    def flush() -> None:
        for held in filling:
            name = f"{part}/{part}-{rank:05d}-of-{ranks:05d}-{len(seals):05d}.safetensors"
            tensors = {key: shard.tensor for key, shard in held.items()}
            seals[name] = storage.write_tensors(folder / name, tensors, cut_metadata(held))
        filling.clear()

    for name in sorted(shards):
        for shard in shards[name]:
            # Nothing of a tensor is no shard of it; a tensor that is empty itself still has to be in some file.
            if not shard.tensor.numel() and 0 not in shard.shape:
                continue
            bytes_here = shard.tensor.numel() * shard.tensor.element_size()
            if filling and size + bytes_here > FILE_BYTES:
                flush()
                size = 0
            held = next((held for held in filling if name not in held), None)
            if held is None:
                filling.append(held := {})
            held[name] = shard
            size += bytes_here
    flush()
    return seals
