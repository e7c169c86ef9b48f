"""Random numbers keyed by what they are for, so that neither order nor layout changes them."""

from __future__ import annotations

import hashlib

import torch


def keyed_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts, each told apart by type and length: blake2b, first 8 bytes, little endian."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{'i' if isinstance(part, int) else 's'}{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def keyed_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by its key. Whole tensors are drawn on CPU, so that every device and layout agrees."""
    return torch.Generator("cpu").manual_seed(keyed_seed(*parts))
