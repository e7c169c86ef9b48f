"""Texts on which tokenizer libraries come apart: an encoder must give the reference's ids on all before it is used."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from megatron.tokenizers.base import Tokenizer

_MOST_SPECIAL_NAMES = 64
_CODE_POINT_STEP = 97  # prime, so that the sample of code points keeps no step with the blocks of Unicode

_WRITTEN = (
    "",
    " ",
    "  ",
    "   a",
    "a   ",
    " a  b   c    d",
    "\t",
    "\t\t\tx",
    "\n",
    "\n\n",
    "\n\n\n\n",
    " \n \n\t\n ",
    "a\r\nb\r\n\r\n",
    "\r",
    "a\rb\r\rc",
    "x \t \n y",
    "    if x:\n        return y\n\n\n    else:\n\tpass\n",
    "\xa0a\xa0\xa0b",
    "\u3000\u2003x",
    "\u2028\u2029\x85\x0b\x0c",
    "a\x00b",
    "\x00",
    "\x00\x01\x02\x1b[0m\x7f\x80\x9f",
    "\ufeffstart",
    "\u200b\u200d\u2060",
    "0",
    "007",
    "1234567890",
    "3.14159e-10 0xFFee 1,000,000",
    "a1b22c333d4444",
    "\u0661\u0662\u0663 \xb2\xbd \u2167 \u0967",
    "don't won't we'll I'm you've they'd it's",
    "DON'T WE'LL I'M",
    "'tis ''s '",
    "don\u2019t",
    "'\u017fx 'S'T'RE",
    "hello world",
    "Hello, World!",
    "__init__.py",
    "camelCaseWord SNAKE_CASE HTTPServer",
    "a.b.c->d::e<=f>=g!=h&&i||j",
    "<<<<<<< HEAD\n=======\n>>>>>>> x",
    "// ---- ****** ====== ######",
    "!!!??? ...\u2026",
    "$x = <?php ?> <!-- --> </a>\\n",
    "e\u0301 \xe9 \u212b \xc5 A\u030a",
    "\ufb01\ufb02 \u2460 \uff21\uff22 \u3392",
    "\u0344 \u0958 \u09dc \u1e9b\u0323 q\u0307\u0323",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "\ud55c\uad6d\uc5b4",
    "\xb7\u0483-\u0487\u0591-\u05c7",
    "a\u0300\u0316\u0327b",
    "Z\u0351\u036b\u0343\u036a",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u041c\u0418\u0420",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "abc \u202e\u05d0\u05d1\u202c def",
    "\u01c5\u01c8 \u0130\u0131 \xdf\u1e9e \u03c3\u03c2",
    "\u13a0\uab70 \U00010400",
    "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f1e9\U0001f1ea \u2764\ufe0f 1\ufe0f\u20e3",
    "\U0001d15e \U00020000\U0003134a",
    "\ufffd\ufffe\uffff\U0010ffff\ue000",
    "\u2581",
    "a \u2581 b\u2581",
    "\u2581\u2581x",
    "<0x41> <0xFF>",
    "<s> </s> <unk> <pad> <|endoftext|> <|im_start|> [MASK] [INST]",
)


def hard_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """About 200 KB: white space, digits, contractions, normal forms, scripts, emoji, control and unassigned characters,
    long words and lines, and the tokenizer's own special names."""
    yield from _WRITTEN
    yield "".join(_WRITTEN)
    yield " ".join(_WRITTEN)
    yield from (
        "a" * 5000,
        "ab" * 3000,
        " " * 3001,
        "\n" * 501,
        "\t \t" * 300,
        "-" * 999,
        "9" * 777,
        "\u00e9" * 999,
        "\u4e2d" * 999,
    )
    yield "x = [" + ", ".join(str(number * number) for number in range(2000)) + "]"
    for length in range(1, 40):
        yield f"a{' ' * length}b\n{' ' * length}c{chr(10) * length}"
    for name in list(tokenizer.special_ids)[:_MOST_SPECIAL_NAMES]:
        yield from (name, f"a{name}b {name}\n", f"{name}{name}", name[:-1], name[1:])
    characters = [chr(point) for point in range(0x3000)]
    characters += [chr(point) for point in range(0x3000, 0x110000, _CODE_POINT_STEP) if not 0xD800 <= point < 0xE000]
    for first in range(0, len(characters), 256):
        group = characters[first : first + 256]
        yield "".join(group)
        yield "".join(f"a{character}1{character} " for character in group)
        yield unicodedata.normalize("NFD", "".join(group))
