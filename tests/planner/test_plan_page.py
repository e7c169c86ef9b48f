"""The page and the picture show the plan: areas, titles and curves are read back from the SVG and compared."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from planned_runs import GROUPS, LENGTHS, RATES, SIZES, integral, planned

from megatron.planner.mixture_slices import inks
from megatron.planner.plan import plan_of
from megatron.planner.plan_page import page_of, write_page
from megatron.planner.plan_warnings import warnings_of
from megatron.planner.resolve import ResolvedRun, resolve_run

TOTAL = sum(LENGTHS.values())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[ResolvedRun, dict[str, Any], str]:
    config = planned(tmp_path_factory.mktemp("plan"))
    run = resolve_run(config)
    plan = plan_of(run, config.stages, config.train.tokens)
    plan["warnings"] = warnings_of(plan, "no <such> file")
    return run, plan, page_of("a <b> & plan", run, plan)


def svgs(page: str, figure: str) -> list[ElementTree.Element]:
    part = page[page.index(f'<figure id="{figure}">') :]
    part = part[: part.index("</figure>")]
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", part, re.DOTALL)]


def polygon(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]


def area(points: list[tuple[float, float]]) -> float:
    pairs = zip(points, points[1:] + points[:1], strict=True)
    return abs(sum(x * w - z * y for (x, y), (z, w) in pairs)) / 2


def test_the_areas_of_the_bands_are_the_tokens(made: tuple[ResolvedRun, dict[str, Any], str]) -> None:
    run, _, page = made
    for svg in svgs(page, "mixture"):
        frame = svg.find("clipPath/rect")
        assert frame is not None
        whole = float(frame.get("width", "")) * float(frame.get("height", ""))
        found: dict[tuple[str, str], float] = {}
        for path in svg.iter("path"):
            title = path.findtext("title") or ""
            stage, source = re.match(r"(.+?) · (.+?): ", title).groups()  # type: ignore[union-attr]
            found[stage, source] = area(polygon(path.get("d", "")))
        for stage in LENGTHS:
            for source in GROUPS:
                expected = integral(stage, source, 0, 1) / TOTAL
                assert found.pop((stage, source), 0.0) / whole == pytest.approx(expected, abs=4e-4), (stage, source)
        assert not found
    assert len(svgs(page, "mixture")) == 2  # wide and narrow


def test_the_rate_passes_through_both_sides_of_every_boundary(made: tuple[ResolvedRun, dict[str, Any], str]) -> None:
    _, _, page = made
    svg = svgs(page, "rate")[0]
    frame = svg.find("clipPath/rect")
    assert frame is not None
    x0, y0, width, height = (float(frame.get(key, "")) for key in ("x", "y", "width", "height"))
    curves = [polygon(path.get("d", "")) for path in svg.iter("path") if "line" in path.get("class", "")]
    scale = max(rate for pair in RATES.values() for rate in pair) * 1.08
    begin = 0
    for (first, last), curve, length in zip(RATES.values(), curves, LENGTHS.values(), strict=True):
        ends = [(begin, first), (begin + length, last)]
        for (token, rate), (x, y) in zip(ends, (curve[0], curve[-1]), strict=True):
            assert x == pytest.approx(x0 + width * token / TOTAL, abs=0.2)
            assert y == pytest.approx(y0 + height * (1 - rate / scale), abs=0.2)
        begin += length


def test_epoch_curves_end_where_the_integrals_do(made: tuple[ResolvedRun, dict[str, Any], str]) -> None:
    run, _, page = made
    svg = svgs(page, "epochs")[0]
    lines = {path.get("class", "").split()[-1]: polygon(path.get("d", "")) for path in svg.iter("path")}
    ends = {name: sum(integral(stage, name, 0, 1) for stage in LENGTHS) / SIZES[name] for name in GROUPS}
    frame = svg.find("clipPath/rect")
    assert frame is not None
    bottom = float(frame.get("y", "")) + float(frame.get("height", ""))
    heights = {name: bottom - lines[f"s{number}"][-1][1] for number, name in enumerate(inks(run.schedule))}
    for name in GROUPS:
        assert heights[name] / heights["books"] == pytest.approx(ends[name] / ends["books"], abs=0.005)
    assert sum("passes" in (title.text or "") for title in svg.iter("title")) == 4  # books 1, 2, 4 and python 1


class Outside(HTMLParser):
    """Everything in a page that would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "use"):
            self.found.append(tag)
        self.found += [f"{tag} {key}" for key, _ in attrs if key in ("src", "href", "xlink:href", "onclick", "onload")]


def test_the_page_needs_nothing_and_escapes_names(made: tuple[ResolvedRun, dict[str, Any], str]) -> None:
    _, _, page = made
    seen = Outside()
    seen.feed(page)
    assert seen.found == []
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "a &lt;b&gt; &amp; plan" in page and "<such>" not in page and "&lt;such&gt;" in page
    assert "prefers-color-scheme:dark" in page and 'name="viewport"' in page


def test_writing_is_whole_or_not_at_all(made: tuple[ResolvedRun, dict[str, Any], str], tmp_path: Path) -> None:
    run, plan, page = made
    path = write_page(tmp_path / "new" / "folder" / "plan.html", "a <b> & plan", run, plan)
    assert path.read_text() == page
    assert [file.name for file in path.parent.iterdir()] == ["plan.html"]


def test_the_picture_shows_the_colours_in_proportion(
    made: tuple[ResolvedRun, dict[str, Any], str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib.image
    import numpy as np

    from megatron.planner.plan_picture import write_picture

    run, plan, _ = made
    pixels = matplotlib.image.imread(write_picture(tmp_path / "plan.png", "plan", run, plan))[..., :3]
    colours = {
        name: [int(ink.light[at : at + 2], 16) / 255 for at in (1, 3, 5)] for name, ink in inks(run.schedule).items()
    }
    counts = {
        name: int((np.abs(pixels - np.array(colour)).max(axis=-1) < 0.01).sum()) for name, colour in colours.items()
    }
    total = sum(counts.values())
    for name in GROUPS:
        share = sum(integral(stage, name, 0, 1) for stage in LENGTHS) / TOTAL
        # the legend, lines of epochs and the edges of bands are pixels too
        assert counts[name] / total == pytest.approx(share, abs=0.02), name


def test_without_matplotlib_the_remedy_is_said(made: tuple[ResolvedRun, dict[str, Any], str], tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from pathlib import Path\n"
        "from megatron.commands.frame import run_command\n"
        "from megatron.commands.plan import main\n"
        "sys.exit(run_command(main, sys.argv[1:]))"
    )
    from megatron.config.load import config_to_toml

    config = tmp_path / "run.toml"
    config.write_text(config_to_toml(planned(tmp_path)))
    argv = [sys.executable, "-c", program, str(config), "--png", str(tmp_path / "x.png")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 6 and "pip install 'stagemix[plot]'" in done.stderr
    assert not (tmp_path / "x.png").exists()
