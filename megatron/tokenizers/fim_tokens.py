"""Fill-in-the-middle sentinels: the tokens that mark the prefix, the middle and the suffix of a document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.config.errors import DataError
from megatron.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class FimNames:
    """Names of a family's sentinels: each stands before its part."""

    prefix: str
    middle: str
    suffix: str
    pad: str | None = None

    @property
    def required(self) -> tuple[str, str, str]:
        return self.prefix, self.middle, self.suffix


@dataclass(frozen=True)
class FimTokens:
    """Ids of the sentinels of one tokenizer. `pad` fills what FIM leaves empty; few tokenizers have one."""

    prefix: int
    middle: int
    suffix: int
    pad: int | None


STARCODER = FimNames("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>")
CODE_LLAMA = FimNames("\u2581<PRE>", "\u2581<MID>", "\u2581<SUF>")

# By the models that brought them. DeepSeek writes <begin> prefix <hole> suffix <end> middle.
FAMILIES: Mapping[str, FimNames] = {
    "StarCoder": STARCODER,
    "SantaCoder": FimNames("<fim-prefix>", "<fim-middle>", "<fim-suffix>", "<fim-pad>"),
    "Qwen2.5-Coder, CodeGemma, cl100k_base": FimNames(
        "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"
    ),
    "CodeLlama": CODE_LLAMA,
    "DeepSeek": FimNames("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581end\uff5c>", "<\uff5cfim\u2581hole\uff5c>"),
    "Codestral": FimNames("[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
}


def fim_tokens(tokenizer: Tokenizer) -> FimTokens | None:
    """The sentinels of the first family whose three names are special tokens of the tokenizer; None without one.

    Raises DataError where two of them share an id.
    """
    for family, names in FAMILIES.items():
        if all(name in tokenizer.special_ids for name in names.required):
            prefix, middle, suffix = (tokenizer.special_ids[name] for name in names.required)
            if len({prefix, middle, suffix}) < 3:
                raise DataError(f"{tokenizer.name}: two of the sentinels of {family} have one id")
            return FimTokens(prefix, middle, suffix, tokenizer.special_ids.get(names.pad) if names.pad else None)
    return None
