"""The one door to `transformers`: loading an exported folder from disk, with no network and no code from the folder.

Whole, or with its layers left on the disk: then each reads its tensors from the folder's files when it runs and gives
them back, by transformers' own means (`device_map`, for which it needs the package accelerate).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
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
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # says at each load what load_model was asked for
    return transformers


def transformers_version() -> str:
    """The installed version, for the record."""
    return str(require_transformers().__version__)


def load_model(folder: Path, dtype: torch.dtype = torch.float32, *, layers_on_disk: bool = False) -> torch.nn.Module:
    """The folder as `transformers` loads it, in eval mode on the CPU. Raises ProofError where it refuses the folder.

    A tensor that the folder lacks, or holds and the architecture does not know, is an error too: `transformers`
    would fill it at random and go on. layers_on_disk: only embedding, norms and head are in memory; UnavailableError
    where accelerate is not installed.
    """
    transformers = require_transformers()
    try:
        options = {"device_map": _layers_on_disk(transformers, folder)} if layers_on_disk else {}
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder.resolve()),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ProofError(f"{folder}: transformers {transformers.__version__} cannot load the folder: {error}") from None
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report.get(kind) or ())):
            raise ProofError(f"{folder}: transformers reports {kind.replace('_', ' ')}: {', '.join(names[:8])}")
    model.eval()
    return model  # type: ignore[no-any-return]


def _layers_on_disk(transformers: Any, folder: Path) -> dict[str, str]:
    """Where each part of the model is kept, by its name."""
    if importlib.util.find_spec("accelerate") is None:
        raise UnavailableError(
            "a proof layer by layer needs the package accelerate: pip install accelerate, or prove the whole model "
            "(--proof whole) where memory is enough for it twice"
        )
    config = transformers.AutoConfig.from_pretrained(
        str(folder.resolve()), local_files_only=True, trust_remote_code=False
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    layers, base = decoder_layers(model), model.base_model_prefix
    inside = {f"{base}.{name}": child for name, child in model.base_model.named_children()}
    outside = {name: child for name, child in model.named_children() if name != base}
    return {name: "disk" if child is layers else "cpu" for name, child in (inside | outside).items()}


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The model's layers, in order: the list in its base model that has as many as the config says."""
    count = model.config.num_hidden_layers
    lists = [child for child in model.base_model.children() if isinstance(child, torch.nn.ModuleList)]
    found = [child for child in lists if len(child) == count]
    if len(found) != 1:
        raise ProofError(f"{type(model).__name__}: its {count} layers are not found: prove the whole model instead")
    return found[0]


@torch.no_grad()
def model_logits(
    model: torch.nn.Module, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """Logits [batch, length, vocabulary] of `tokens` [batch, length]; mask and positions of the same size."""
    return model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits  # type: ignore[no-any-return]


@torch.no_grad()
def final_hidden(model: Any, tokens: Tensor, mask: Tensor) -> Tensor:
    """Hidden states behind the last norm [batch, length, hidden]: what the head reads."""
    return model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def head_logits(model: Any, hidden: Tensor) -> Tensor:
    """What the model makes of `final_hidden` [..., hidden]: logits [..., vocabulary], for models whose tail is a head
    and, where the config says so, a factor (Cohere) and a soft cap (Gemma 2)."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    if (scale := getattr(model.config, "logit_scale", None)) is not None:
        logits = logits * scale
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def generate_greedily(model: Any, tokens: Tensor, mask: Tensor, new_tokens: int) -> tuple[Tensor, Tensor]:
    """`generate` with its cache, of prompts padded on the left [batch, length]: (new tokens [batch, new_tokens], the
    logits that each was chosen by [batch, new_tokens, vocabulary]). No token ends it before."""
    model.generation_config = require_transformers().GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=new_tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    given = model.generate(input_ids=tokens, attention_mask=mask)
    return given.sequences[:, tokens.shape[1] :], torch.stack(given.logits, 1)


def load_fast_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer as AutoTokenizer gives it, offline. Raises ProofError where it refuses the folder."""
    transformers = require_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder.resolve()), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ProofError(f"{folder}: AutoTokenizer cannot load the tokenizer: {error}") from None
