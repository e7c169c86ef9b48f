"""Prose out of docstrings, comments, reST and Markdown: paragraphs that read as English, without the markup."""

from __future__ import annotations

import inspect
import re

_WORDS = (
    "a all also an and any are as at be because been before between both but by can could do does each either for from "
    "given has have how i if in into is it its may more must no not of on one only or other our out over same should "
    "since so some such than that the their them then there these they this those through to under until up used using "
    "was we were what when where whether which while who will with within without would you your"
)
_FUNCTION_WORDS = frozenset(_WORDS.split())
_LICENCE = re.compile(
    r"copyright|\(c\) ?\d{4}|licen[sc]ed? under|all rights reserved|without warrant|permission is hereby|"
    r"redistribution and use|in no event shall|apache license|the software is provided|spdx-",
    re.IGNORECASE,
)
_UNDERLINE = re.compile(r"\s*([=\-~^\"'`*+#_:.])\1{2,}\s*")
_DIRECTIVE = re.compile(r"\s*\.\. ?([\w:+-]+)::\s*(.*)")
_KEPT_DIRECTIVES = {"note", "warning", "tip", "important", "caution", "attention", "hint", "admonition"}
_ITEM = re.compile(r"^\s*(?:[-*+•]|\(?\d{1,2}[.)]|\(?[a-z]\)|:\w+[^:]*:|@\w+\b)\s+")
_NAMES = r"^\s*\*{0,2}`{0,2}[\w.\[\]]+`{0,2}(?:, ?\*{0,2}`{0,2}[\w.\[\]]+`{0,2})*"
_PARAMETER = re.compile(_NAMES + r"(?: ?\([^()]*(?:\([^()]*\)[^()]*)*\))? ?(?::|--)\s+(?=\S)")
_PARAMETER_LINE = re.compile(_NAMES + r" ?:(?: \S.*)?")
_HTML = (
    "a|b|big|blockquote|br|center|code|details|div|em|h[1-6]|hr|i|img|kbd|li|ol|p|pre|span|strong|su[bp]|summary|"
    "t[dhrt]|table|tip|u|ul"
)
_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")
_INLINE = [
    (re.compile(r"!\[[^\]]*\]\([^)]*\)|\|\w[\w -]*\||\[\d+\]_|\[\^\w+\]|<!--.*?-->"), ""),
    (re.compile(r"\[([^\]]+)\]\((?:[^()]|\([^()]*\))*\)"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\[[^\]]*\]"), r"\1"),
    (re.compile(r":[\w:+-]+:`[!~]?([^`<]+?)(?:\s*<[^>`]*>)?`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^>`]*>`_{0,2}"), r"\1"),
    (re.compile(rf"</?(?:{_HTML})\b[^<>]*>", re.IGNORECASE), ""),
    (re.compile(r"``([^`]+)``|`([^`]+)`_{0,2}"), lambda m: m.group(1) or m.group(2)),
    (re.compile(r"(?<!\w)(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?!\w)"), r"\2"),
    (re.compile(r"(?<![\w*])([*_])(?=[^\s*_])([^*_]+?)(?<=\S)\1(?![\w*])"), r"\2"),
    (re.compile(r"\[~?([\w.]+)\]"), r"\1"),
    (re.compile(r"::(?=\s|$)"), ":"),
    (re.compile(r"\s+"), " "),
    (re.compile(r" ([,.;:!?)])(?=\s|$)"), r"\1"),
]


def paragraphs_of(text: str) -> list[str]:
    """The paragraphs of a text that are English prose, each on one line, markup removed, in order."""
    blocks = _blocks(_without_literal_parts(inspect.cleandoc(text.replace("\r\n", "\n")).split("\n")))
    cleaned = (_clean(block) for block in blocks)
    return [paragraph for paragraph in cleaned if is_prose(paragraph)]


def is_licence(text: str) -> bool:
    """True for licence headers and copyright notes, which every file repeats."""
    return _LICENCE.search(text) is not None


def is_prose(text: str) -> bool:
    """True for whole English sentences: enough words, mostly letters, function words among them, an end."""
    if len(text) < 50 or text[-1] not in ".!?\"')" or is_licence(text):
        return False
    first = text[0]
    if not (first.isupper() or first in "\"'(" or first.isdigit()):
        return False
    tokens = text.split()
    words = [word for word in tokens if _WORD.fullmatch(word.strip(".,;:!?()\"'"))]
    if len(tokens) < 9 or len(words) < 0.8 * len(tokens):
        return False
    letters = sum(map(str.isalpha, text)) + len(tokens) - 1
    function_words = sum(word.strip(".,;:!?()\"'").lower() in _FUNCTION_WORDS for word in words)
    return letters > 0.88 * len(text) and function_words > 0.22 * len(words) and text.count("=") < 3


def sameness_key(paragraph: str) -> str:
    """What two paragraphs share that differ only in names, numbers and punctuation: their plain words."""
    return " ".join(
        word
        for token in paragraph.split()
        if (word := token.strip(".,;:!?()\"'")) and word.isalpha() and word.islower()
    )


def _without_literal_parts(lines: list[str]) -> list[str]:
    """Lines without code fences, doctests, tables, literal blocks and most directives, each of them an empty line."""
    kept: list[str] = []
    fence = ""
    literal_above = -1  # indentation of the line that opened a literal block
    doctest = False
    for line in lines:
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if fence:
            fence = "" if bare.startswith(fence) else fence
            kept.append("")
            continue
        if literal_above >= 0:
            if not bare or indent > literal_above:
                kept.append("")
                continue
            literal_above = -1
        doctest = bool(bare) and (doctest or bare.startswith((">>>", "... ", "In [")))
        if bare.startswith(("```", "~~~")):
            fence = bare[:3]
            kept.append("")
        elif directive := _DIRECTIVE.fullmatch(line):
            if directive.group(1).lower() not in _KEPT_DIRECTIVES:
                literal_above = indent
            kept.append("")
        elif doctest or bare.startswith(("|", "+--", "+==", ".. ")) or "=====" in bare or _UNDERLINE.fullmatch(line):
            if _UNDERLINE.fullmatch(line) and kept and len(kept[-1].split()) < 9:
                kept.pop()  # a heading goes with its underline
            kept.append("")
        else:
            kept.append(line)
            if bare.endswith("::"):
                literal_above = indent
    return kept


def _blocks(lines: list[str]) -> list[str]:
    """Paragraphs joined to one line each: cut at empty lines, list items, parameters, and changes of indentation."""
    blocks: list[list[str]] = [[]]
    indent = hanging = 0
    for line in lines:
        bare = line.strip()
        now = len(line) - len(line.lstrip())
        if not bare or bare.startswith("#") or _PARAMETER_LINE.fullmatch(line) and not bare.endswith("."):
            blocks.append([])
            continue
        starts_item = _ITEM.match(line) or (_PARAMETER.match(line) and (not blocks[-1] or now <= indent))
        if starts_item or (blocks[-1] and now not in (indent, hanging)):
            blocks.append([])
        if not blocks[-1]:
            indent = hanging = now
            if starts_item:
                hanging = now + 2 if now + 2 == len(line) - len(line.lstrip(" -*+•")) else now + 4
        elif len(blocks[-1]) == 1 and now != indent:
            hanging = now
        blocks[-1].append(bare)
    return [" ".join(block) for block in blocks if block]


def _clean(block: str) -> str:
    if len(block) > 20_000:
        return ""
    text = _ITEM.sub("", block, count=1)
    text = _PARAMETER.sub("", text, count=1) if not text[:1].isupper() or "(" in text[:40] else text
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return text.strip().removeprefix("-- ").removeprefix("- ")
