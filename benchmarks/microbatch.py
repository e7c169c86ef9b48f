"""What one forward pass reads, made by a benchmark itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Micro:
    """A microbatch of random tokens, as `engines.base.MicrobatchLike` describes it."""

    tokens: Tensor
    targets: Tensor
    document_ids: Tensor
    source_ids: Tensor
    sample_numbers: Tensor
