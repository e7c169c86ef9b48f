"""A plot as an SVG file of its own: with its title, legend and caption, light or dark as the reader's system is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from megatron.metrics.report_style import STYLE
from megatron.study.report_plots import LETTER, Plot
from megatron.study.report_style import OWN_STYLE

_PAD, _LINE = 16, 20
_VARIABLES = re.compile(r"(:root\{[^}]*\})\s*(@media \(prefers-color-scheme:dark\)\{:root\{[^}]*\}\})", re.DOTALL)


def svg_file(plot: Plot) -> str:
    """The whole file; nothing outside it is needed."""
    found = re.match(r'<svg class="\w+" viewBox="0 0 (\d+) (\d+)"', plot.wide)
    assert found is not None
    width, high = int(found[1]), int(found[2])
    legend, legend_high = _legend(plot.legend, width)
    caption = _wrapped(plot.caption, int(width / (LETTER * 0.93)))
    top = 34 + legend_high
    height = top + high + 10 + 18 * len(caption)
    lines = "".join(
        f'<text class="label" x="0" y="{top + high + 18 + 18 * number}">{escape(words)}</text>'
        for number, words in enumerate(caption)
    )
    inner = plot.wide.replace('<svg class="wide"', f'<svg y="{top}" width="{width}" height="{high}"', 1)
    outer = f"{-_PAD} {-_PAD} {width + 2 * _PAD} {height + 2 * _PAD}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 2 * _PAD}" height="{height + 2 * _PAD}" '
        f'viewBox="{outer}"><style>{_style()}</style><rect class="paper" x="{-_PAD}" y="{-_PAD}" width="100%" '
        f'height="100%"/><text class="title" x="0" y="14">{escape(plot.title)}</text>{legend}{inner}{lines}</svg>\n'
    )


def graph_file(figure: str) -> str:
    """The graph of `study/page.py` as a file."""
    found = re.search(r'<svg width="(\d+)" height="(\d+)".*</svg>', figure, re.DOTALL)
    assert found is not None
    inner = found[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, body = inner.split(">", 1)
    return f'{head}><style>{_style()}</style><rect class="paper" width="100%" height="100%"/>{body}\n'


def _style() -> str:
    """The page's colours and what it says of SVG."""
    variables = _VARIABLES.search(STYLE)
    assert variables is not None
    rules = [line for line in STYLE.splitlines() if line.startswith(("svg ", ".c0", ".c4")) and "narrow" not in line]
    own = [line for line in OWN_STYLE.splitlines() if line.startswith("svg ")]
    more = "svg .paper{fill:var(--card)}svg .title{font:600 16px system-ui,sans-serif}"
    return "".join([variables[1], variables[2], *rules, *own, more])


def _legend(rows: Sequence[tuple[str, str]], width: int) -> tuple[str, int]:
    """Swatches with words in as many lines as they need, and their height."""
    marks, x, y = [], 0.0, 32.0
    for css, words in rows:
        need = 26 + LETTER * len(words) + 16
        if x and x + need > width:
            x, y = 0.0, y + _LINE
        kind, *colours = css.split()
        colour = " ".join(colours or [kind])
        if kind == "block":
            marks.append(f'<rect class="fill {colour}" x="{x:.0f}" y="{y - 10:.0f}" width="18" height="11"/>')
        elif kind == "point":
            marks.append(f'<circle class="dot {colour}" cx="{x + 9:.0f}" cy="{y - 4:.0f}" r="4.5"/>')
        elif kind == "trunk":
            marks.append(f'<rect class="trunk" x="{x:.0f}" y="{y - 6:.0f}" width="18" height="4"/>')
        else:
            marks.append(f'<line class="line {css}" x1="{x:.0f}" x2="{x + 18:.0f}" y1="{y - 4:.0f}" y2="{y - 4:.0f}"/>')
        marks.append(f'<text x="{x + 25:.0f}" y="{y:.0f}">{escape(words)}</text>')
        x += need
    return "".join(marks), int(y - 12) if rows else 0


def _wrapped(words: str, letters: int) -> list[str]:
    lines = [""]
    for word in words.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > letters:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
