"""The one door to `transformers`: loading an exported folder from disk, with no network and no code from the folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config.errors import ProofError, UnavailableError


def require_transformers() -> Any:
    """The module `transformers`, quiet. Raises UnavailableError where it is not installed."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise UnavailableError(
            f"transformers is not installed ({error}): pip install 'stagemix[hf]', or export with --no-prove"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def transformers_version() -> str:
    """The installed version, for the record."""
    return str(require_transformers().__version__)


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The folder as `transformers` loads it, in eval mode on the CPU. Raises ProofError where it refuses the folder.

    A tensor that the folder lacks, or holds and the architecture does not know, is an error too: `transformers`
    would fill it at random and go on.
    """
    transformers = require_transformers()
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder.resolve()),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ProofError(f"{folder}: transformers {transformers.__version__} cannot load the folder: {error}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind) or ())):
            raise ProofError(f"{folder}: transformers reports {kind.replace('_', ' ')}: {', '.join(names[:8])}")
    model.eval()
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def model_logits(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits [batch, length, vocabulary] of `tokens` [batch, length]."""
    return model(input_ids=tokens, use_cache=False).logits  # type: ignore[no-any-return]


def load_fast_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer as AutoTokenizer gives it, offline. Raises ProofError where it refuses the folder."""
    transformers = require_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder.resolve()), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ProofError(f"{folder}: AutoTokenizer cannot load the tokenizer: {error}") from None
