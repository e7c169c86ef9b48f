"""The mixture and the learning rate over tokens as lines of text: bands of colour, or of letters where there is none.

Every column is a slice of tokens of one training stage; a rule stands between stages. With colour a cell is cut in
eighths; without, every cell is the letter of one source. The letters stand in the bands with colour too, so that no
reader depends on it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from itertools import groupby
from math import floor

from rich.style import Style
from rich.text import Text

from megatron.config.quantities import format_count
from megatron.data.schedule import Schedule
from megatron.optim.lr import LRSchedule
from megatron.planner.mixture_slices import Ink, Slice, inks, slices_of, sources_in_order

ROWS, RATE_ROWS = 16, 5
MARGIN = 7  # what stands left of the chart
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def terminal_chart(schedule: Schedule, lr: LRSchedule, width: int, *, colour: bool, ascii_only: bool) -> list[Text]:
    """The lines of the drawing, none wider than `width`: names of the stages, bands, tokens, learning rate, legend."""
    count = len(schedule.stages)
    rules = count - 1 if count <= (width - MARGIN) // 4 else 0
    columns = max(count, width - MARGIN - rules)
    slices = slices_of(schedule, lr, columns)
    chart = _Chart(schedule, slices, inks(schedule), bool(rules), "|" if ascii_only else "│", ascii_only)
    in_colour = colour and not ascii_only
    stacks = [stacked(part, chart.order, 8 * ROWS if in_colour else ROWS) for part in slices]
    unseen = set(chart.order) - {name for stack in stacks for name in stack}
    lines = [chart.names(), *(chart.coloured_bands(stacks) if in_colour else chart.letter_bands(stacks))]
    lines += [chart.tokens(), Text(""), *chart.rates(colour), Text("")]
    lines += legend(schedule, chart.ink, unseen, width, colour)
    for line in lines:
        line.no_wrap, line.overflow = True, "crop"
        line.rstrip()
    return lines


def stacked(slice_: Slice, order: Sequence[str], units: int) -> list[str]:
    """The source of each of `units` equal parts of a column, from the bottom up: the one that holds the part's middle.

    So every bound between two sources is within half a part of its place, and what is drawn of a source, or of sources
    that stand side by side, is within one part of its share. A source of less than one part may not be seen.
    """
    result: list[str] = []
    below = Fraction(0)
    for name in order:
        below += slice_.shares.get(name, Fraction(0))
        reached = min(units, floor(below * units + Fraction(1, 2)))
        result += [name] * (reached - len(result))
    return result


class _Chart:
    def __init__(
        self,
        schedule: Schedule,
        slices: Sequence[Slice],
        ink: Mapping[str, Ink],
        rules: bool,
        rule: str,
        ascii_only: bool,
    ) -> None:
        self.schedule, self.slices, self.ink, self.rule = schedule, slices, ink, rule if rules else ""
        self.ascii_only = ascii_only
        self.order = sources_in_order(schedule)
        self.widths = [len(list(group)) for _, group in groupby(slices, key=lambda part: part.stage)]

    def names(self) -> Text:
        """The stages' names above their bands; a number where a name has no room, and nothing where that has none."""
        line = Text(" " * MARGIN)
        for number, (stage, width) in enumerate(zip(self.schedule.stages, self.widths, strict=True), start=1):
            words = (
                stage.name if len(stage.name) <= width else stage.name[: width - 1] + "…" if width > 5 else str(number)
            )
            if self.ascii_only:
                words = words.replace("…", ".")
            line.append(f"{words if len(words) <= width else '':<{width}}", style="bold")
            line.append(self.rule if number < len(self.widths) else "", style="dim")
        return line

    def letter_bands(self, stacks: Sequence[Sequence[str]]) -> list[Text]:
        """Rows from the top down; a cell is the letter of the source that holds its middle."""
        lines = []
        for row in reversed(range(ROWS)):
            cells = [Text(self.ink[stack[row]].letter) for stack in stacks]
            lines.append(self._line(_percent(row, ROWS), cells))
        return lines

    def coloured_bands(self, stacks: Sequence[Sequence[str]]) -> list[Text]:
        """Rows from the top down; stacks are in eighths of a cell."""
        letters = self._letters_in_bands(stacks)
        lines = []
        for row in reversed(range(ROWS)):
            cells = [
                self._cell(stack[8 * row : 8 * row + 8], letters.get((column, row), ""))
                for column, stack in enumerate(stacks)
            ]
            lines.append(self._line(_percent(row, ROWS), cells))
        return lines

    def _letters_in_bands(self, stacks: Sequence[Sequence[str]]) -> dict[tuple[int, int], str]:
        """By (column, row), the letters that name bands: in each stage once, where the band is a whole cell."""
        found: dict[tuple[int, int], str] = {}
        first = 0
        for width in self.widths:
            for name in self.order:
                for offset in _from_the_middle(width):
                    column = stacks[first + offset]
                    whole = [row for row in range(ROWS) if set(column[8 * row : 8 * row + 8]) == {name}]
                    if whole:
                        found[first + offset, whole[len(whole) // 2]] = name
                        break
            first += width
        return found

    def _cell(self, parts: Sequence[str], label: str) -> Text:
        """One cell of eighths from the bottom up; of more than two sources the two largest parts are shown."""
        if label:
            ink = self.ink[label]
            return Text(ink.letter, _label_style(ink))
        runs = [(name, len(list(run))) for name, run in groupby(parts)]
        kept = sorted(sorted(range(len(runs)), key=lambda at: -runs[at][1])[:2])
        lower = runs[kept[0]][0]
        if len(kept) == 1:
            return Text("█", Style(color=self.ink[lower].light))
        upper = runs[kept[1]][0]
        height = max(1, min(7, sum(size for _, size in runs[: kept[0] + 1])))
        return Text(_EIGHTHS[height], Style(color=self.ink[lower].light, bgcolor=self.ink[upper].light))

    def tokens(self) -> Text:
        """The token axis: the position of each stage's start and of the run's end, where there is room."""
        room = sum(self.widths) + len(self.rule) * (len(self.widths) - 1)
        cells = [" "] * (MARGIN + room + 1)
        end = format_count(self.schedule.tokens)
        _write(cells, MARGIN + room - len(end), end)
        column = MARGIN
        for stage, width in zip(self.schedule.stages, self.widths, strict=True):
            words = format_count(stage.start_token)
            if all(cell == " " for cell in cells[column - 1 : column + len(words) + 1]):
                _write(cells, column, words)
            column += width + len(self.rule)
        line = "".join(cells).rstrip()
        return Text("tokens" + line[6:], style="dim")

    def rates(self, colour: bool) -> list[Text]:
        """The learning rate as columns from 0 to its largest value."""
        most = max((part.rate for part in self.slices), default=0.0)
        if not most:
            return [Text("the learning rate is 0 everywhere")]
        lines = []
        for row in reversed(range(RATE_ROWS)):
            cells = []
            for part in self.slices:
                eighths = max(0, min(8, round(part.rate / most * RATE_ROWS * 8) - 8 * row))
                if row == 0 and part.rate > 0:
                    eighths = max(1, eighths)
                mark = ("#" if eighths > 3 or (row == 0 and eighths) else " ") if self.ascii_only else _EIGHTHS[eighths]
                cells.append(Text(mark, "cyan" if colour else ""))
            label = f"{most:.2g}" if row == RATE_ROWS - 1 else "0" if row == 0 else ""
            lines.append(self._line(label, cells))
        lines.append(Text("lr".rjust(MARGIN - 1) + " " + "each column: the rate in its middle", style="dim"))
        return lines

    def _line(self, label: str, cells: Sequence[Text]) -> Text:
        line = Text(f"{label:>{MARGIN - 1}} ", style="")
        column = 0
        for number, width in enumerate(self.widths):
            for cell in cells[column : column + width]:
                line.append_text(cell)
            column += width
            if number < len(self.widths) - 1:
                line.append(self.rule, style="dim")
        return line


def legend(schedule: Schedule, ink: Mapping[str, Ink], unseen: Collection[str], width: int, colour: bool) -> list[Text]:
    """What the letters and colours stand for: groups line by line, sources that are a group of their own together.
    `unseen` are too thin to be drawn anywhere, which is said."""
    facts = schedule.stages[-1].facts
    groups = [(group, list(members)) for group, members in groupby(ink, key=lambda name: facts[name].group)]
    alone = [members[0] for group, members in groups if members == [group]]
    lines: list[Text] = []
    for head, names in [*((f"{group}: ", names) for group, names in groups if names != [group]), ("", alone)]:
        line = Text(head, style="")
        line.stylize("bold")
        for number, name in enumerate(names):
            words = f" {name}" + (" (too thin to be seen)" if name in unseen else "")
            if number and len(line) + len(words) + 3 > width:
                lines.append(line)
                line = Text(" " * min(len(head), width // 3))
            elif number:
                line.append("  ")
            mark = _label_style(ink[name]) if colour else Style(bold=True)
            line.append(ink[name].letter, style=mark).append(words, style="not bold")
        if names:
            lines.append(line)
    return lines


def _label_style(ink: Ink) -> Style:
    """White letters on dark colours, black ones on light."""
    red, green, blue = (int(ink.light[at : at + 2], 16) for at in (1, 3, 5))
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    return Style(color="#000000" if light else "#ffffff", bgcolor=ink.light, bold=True)


def _percent(row: int, rows: int) -> str:
    marks = {rows - 1: "100%", rows // 2: "50%", 0: "0%"}
    return marks.get(row, "")


def _from_the_middle(width: int) -> list[int]:
    return sorted(range(width), key=lambda at: abs(at - width // 2))


def _write(cells: list[str], column: int, words: str) -> None:
    cells[column : column + len(words)] = list(words)
