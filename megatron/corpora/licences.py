"""Licences: which one a licence file holds, what a file's SPDX header says, and whether an expression is allowed."""

from __future__ import annotations

import re

# Of files in a folder, the ones that hold its licence.
LICENCE_FILE = re.compile(
    r"(?i)^(?:(?:mit-|bsd-|apache-|gpl-)?licen[cs]es?|copying(?:[.-]lesser)?|unlicense)(?:[.-](?:md|txt|rst|mit|bsd|apache(?:-2\.0)?))?$"
)
LICENCE_FILE_BYTES = 1 << 17  # no licence's text is longer
SPDX_HEADER_BYTES = 1 << 12  # where in a file its header is looked for

_SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+\-() \t]+)")
_SPDX_FIELD_ENDS = re.compile(r"\s*(?:-->|\*/|-$)?\s*$")

# What a licence's text says and no other above it does, white space as one space, lower case; the first match counts.
_PHRASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("AGPL-3.0-only", ("gnu affero general public license version 3",)),
    ("LGPL-3.0-only", ("gnu lesser general public license version 3",)),
    ("LGPL-2.1-only", ("gnu lesser general public license version 2.1",)),
    ("LGPL-2.0-only", ("gnu library general public license version 2",)),
    ("GPL-3.0-only", ("gnu general public license version 3",)),
    ("GPL-2.0-only", ("gnu general public license version 2",)),
    ("GPL-1.0-only", ("gnu general public license version 1",)),
    ("MPL-2.0", ("mozilla public license", "version 2.0")),
    ("MPL-2.0", ("mozilla public license, v. 2.0",)),
    ("MPL-1.1", ("mozilla public license", "version 1.1")),
    ("EPL-2.0", ("eclipse public license - v 2.0",)),
    ("EPL-1.0", ("eclipse public license - v 1.0",)),
    ("EUPL-1.2", ("european union public licence v. 1.2",)),
    ("CC0-1.0", ("cc0 1.0 universal",)),
    ("CC-BY-NC-SA-4.0", ("attribution-noncommercial-sharealike 4.0 international",)),
    ("CC-BY-NC-4.0", ("attribution-noncommercial 4.0 international",)),
    ("CC-BY-SA-4.0", ("attribution-sharealike 4.0 international",)),
    ("CC-BY-4.0", ("attribution 4.0 international",)),
    ("PSF-2.0", ("python software foundation license version 2",)),
    ("Artistic-2.0", ("the artistic license 2.0",)),
    ("Apache-2.0", ("apache license", "version 2.0, january 2004")),
    ("Apache-2.0", ("licensed under the apache license, version 2.0",)),
    ("BSL-1.0", ("boost software license - version 1.0",)),
    ("Unlicense", ("this is free and unencumbered software released into the public domain",)),
    ("WTFPL", ("do what the fuck you want to public license",)),
    ("Zlib", ("this software is provided 'as-is', without any express or implied warranty", "altered source versions")),
    (
        "MIT",
        (
            "permission is hereby granted, free of charge, to any person obtaining a copy",
            "the above copyright notice and this permission notice",
        ),
    ),
    ("MIT-0", ("permission is hereby granted, free of charge, to any person obtaining a copy",)),
    (
        "ISC",
        (
            "permission to use, copy, modify, and/or distribute this software for any purpose with or without fee",
            "provided that the above copyright notice",
        ),
    ),
    (
        "ISC",
        (
            "permission to use, copy, modify, and distribute this software for any purpose with or without fee",
            "provided that the above copyright notice",
        ),
    ),
    ("0BSD", ("permission to use, copy, modify, and/or distribute this software for any purpose with or without fee",)),
    ("BSD-4-Clause", ("redistribution and use in source and binary forms", "all advertising materials mentioning")),
    ("BSD-3-Clause", ("redistribution and use in source and binary forms", "endorse or promote products")),
    ("BSD-2-Clause", ("redistribution and use in source and binary forms",)),
)
# A file may hold several licences, one after another; these are of one text and exclude each other.
_FAMILIES = ("AGPL", "LGPL", "GPL", "MIT", "ISC", "0BSD", "BSD", "CC", "Apache", "MPL", "EPL")


def identify_licence(text: str) -> str:
    """The SPDX identifier of a licence text, several joined by AND where the file holds several; "" if unknown.

    Found by phrases that each licence's text has. GNU licences are given as `-only`: what their text alone says.
    """
    if header := spdx_expression(text):
        return header
    words = re.sub(r"[\s>*#/]+", " ", text.lower()).replace("“", '"').replace("”", '"').replace("’", "'")
    head = words[:2000]
    found: list[str] = []
    for name, phrases in _PHRASES:
        family = next((family for family in _FAMILIES if name.startswith(family)), name)
        gnu = "GPL" in family
        # the GNU licences name each other inside: their own name stands in the title
        if family not in [own for own, _ in _named(found)] and all(p in (head if gnu else words) for p in phrases):
            if gnu and any("GPL" in other for other in found):
                continue
            if family in ("ISC", "0BSD") and any(own in ("ISC", "0BSD") for own, _ in _named(found)):
                continue
            found.append(name)
    return " AND ".join(sorted(found))


def _named(found: list[str]) -> list[tuple[str, str]]:
    return [(next((family for family in _FAMILIES if name.startswith(family)), name), name) for name in found]


def combined_licence(licences: dict[str, str]) -> str:
    """The licence of a folder from its licence files, file name to expression; "" if none is known.

    Several hold together, but for LICENSE-MIT beside LICENSE-APACHE: by custom the user's choice.
    """
    known = {name: licence for name, licence in licences.items() if licence}
    if len(known) < len(licences) and known:
        return " AND ".join(sorted({*known.values(), "LicenseRef-unknown"}))
    names = sorted(set(known.values()))
    by_choice = len(known) == 2 and names == ["Apache-2.0", "MIT"] and all("-" in name for name in known)
    return (" OR " if by_choice else " AND ").join(f"({name})" if " OR " in name else name for name in names)


def spdx_expression(text: str) -> str:
    """The expression of the first `SPDX-License-Identifier:` in a text; "" if there is none."""
    if (match := _SPDX.search(text)) is None:
        return ""
    return re.sub(r"\s+", " ", _SPDX_FIELD_ENDS.sub("", match[1])).strip(" -")


def licences_allowed(expression: str, allowed: tuple[str, ...]) -> bool:
    """Whether an SPDX expression can be met with the allowed licences alone: AND needs both sides, OR one of them.

    Case does not count; `X-only` and `X-or-later` are also met by an allowed `X`; an exception (WITH) only widens.
    What cannot be parsed is not allowed.
    """
    names = {name.lower() for name in allowed}
    tokens = re.findall(r"\(|\)|[^\s()]+", expression)
    try:
        met, rest = _either(tokens, names)
    except (IndexError, RecursionError):
        return False
    return met and not rest


def _either(tokens: list[str], names: set[str]) -> tuple[bool, list[str]]:
    met, rest = _both(tokens, names)
    while rest and rest[0].upper() == "OR":
        other, rest = _both(rest[1:], names)
        met = met or other
    return met, rest


def _both(tokens: list[str], names: set[str]) -> tuple[bool, list[str]]:
    met, rest = _one(tokens, names)
    while rest and rest[0].upper() == "AND":
        other, rest = _one(rest[1:], names)
        met = met and other
    return met, rest


def _one(tokens: list[str], names: set[str]) -> tuple[bool, list[str]]:
    if tokens[0] == "(":
        met, rest = _either(tokens[1:], names)
        if rest[0] != ")":
            raise IndexError
        return met, rest[1:]
    name = tokens[0].lower()
    base = re.sub(r"(?:-only|-or-later|\+)$", "", name)
    rest = tokens[3:] if len(tokens) > 2 and tokens[1].upper() == "WITH" else tokens[1:]
    return name in names or base in names, rest
