"""Texts as sequences of normalised words, and 64-bit hashes of every n of them in a row.

Near-duplicate detection and decontamination compare n-grams of words and must not keep the strings. The hashes depend
on nothing but their input: no process, machine or Python version. They are not for keeping attackers out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

SEGMENT_CHARACTERS = 1 << 20
# scripts written without spaces, of which every character counts as a word: kana, Han, Thai, Lao, Myanmar, Khmer
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_SPACED_WORD = re.compile(r"[^\W_]+")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_IDENTIFIER = re.compile(r"\w+")
_SEPARATOR = re.compile(r"\W")
# ASCII text is most text, and this is several times as fast: one table look-up a byte, then a split at blanks
_ASCII_WORDS = bytes(
    ord(chr(byte).lower()) if chr(byte).isascii() and chr(byte).isalnum() else 32 for byte in range(256)
)
_ASCII_IDENTIFIERS = bytes(byte if byte < 128 and (chr(byte).isalnum() or byte == 95) else 32 for byte in range(256))
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BASE = 0xD6E8FEB86659FD93  # odd, so that no factor loses bits


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and digits; everything else separates. Unicode text is composed (NFC) first."""
    if text.isascii():
        return text.encode().translate(_ASCII_WORDS).decode("ascii").split()
    text = unicodedata.normalize("NFC", text.lower())
    return (_WORD if _UNSPACED_CHARACTER.search(text) else _SPACED_WORD).findall(text)


def identifiers_of(text: str) -> list[str]:
    """Runs of letters, digits and underscores with their case: identifiers, keywords and numbers of source code."""
    if text.isascii():
        return text.encode().translate(_ASCII_IDENTIFIERS).decode("ascii").split()
    return _IDENTIFIER.findall(text)


def segments(text: str) -> Iterator[str]:
    """A text in pieces of about 2^20 characters, cut where no word is cut, so that a huge one is never a huge list."""
    begin = 0
    while len(text) - begin > SEGMENT_CHARACTERS:
        cut = _SEPARATOR.search(text, begin + SEGMENT_CHARACTERS)
        if cut is None:
            break
        yield text[begin : cut.end()]
        begin = cut.end()
    yield text[begin:] if begin else text


def mix(values: Hashes) -> Hashes:
    """A bijection of 64-bit integers that spreads every bit over all (the finaliser of SplitMix64: Steele et al.
    2014).
    """
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def window_hashes(values: Hashes, n: int) -> Hashes:
    """A hash of every n values in a row, uint64 [len(values) - n + 1] (none for fewer values): polynomial, then mixed.

    The order of the values counts, and so does n. Windows are doubled and joined, log2(n) times, not added up one value
    at a time.
    """
    windows = len(values) - n + 1
    if windows <= 0:
        return np.zeros(0, np.uint64)
    power, length, factor = values, 1, _BASE  # windows of `length` values; factor = _BASE ** length
    total, joined = np.zeros(len(values), np.uint64), 0  # windows of `joined` values
    while True:
        if n & length:
            count = len(values) - joined - length + 1
            total = total[:count] * np.uint64(factor) + power[joined : joined + count]
            joined += length
        if joined == n:
            return mix(total + np.uint64(n))
        power = power[: len(power) - length] * np.uint64(factor) + power[length:]
        length, factor = 2 * length, factor * factor % 2**64


def hashes_at(values: Hashes, begins: NDArray[np.int64], n: int) -> Hashes:
    """`window_hashes(values, n)[begins]`, for few of them."""
    total = np.zeros(len(begins), np.uint64)
    for offset in range(n):
        total = total * np.uint64(_BASE) + values[begins + offset]
    return mix(total + np.uint64(n))
