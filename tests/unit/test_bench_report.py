"""What the benchmark of mounts makes of its rows."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from tests.bench import Figure, number
from tests.bench.report import Results, Row, plot


def results() -> Results:
    return Results(
        [
            Row("scan", "desfs", [0.5, 0.4, 0.6], requests=20, received=124_000_000, rss=150_000_000),
            Row("scan", "many objects", [300.0], capped=True, is_peer=True, one_object=True),
            Row("scan", "fewer objects", [230.0], is_peer=True, one_object=True),
            Row("scan", "archive", [3.9, 3.8, 4.0], is_peer=True),
            Row("a | b", "desfs", [0.05], fuse={"read": 3, "open": 0, "forget": 7}),
        ],
        {"scan": 0.4},
    )


def test_the_best_peer_is_the_fastest_of_its_kind() -> None:
    found = results()
    best = [found.best_peer("scan", one_object=kept) for kept in (None, True, False)]
    assert [row.system for row in best if row] == ["archive", "fewer objects", "archive"]
    assert found.best_peer("a | b") is None


def test_lines_have_medians_and_ratios() -> None:
    floor, ours, capped, *_ = results().lines()
    assert floor[:3] == ("scan", "floor", "0.40 s")
    assert ours == ("scan", "desfs", "0.50 s", "1.25", "0.13", "20", "124 MB", "150 MB", "3", "")
    assert capped[2:5] == ("> 300 s", "750", "77")


def test_requests_that_cost_no_reader_anything_are_not_shown() -> None:
    assert results().lines()[-1][-1] == "read:3"


def test_every_line_of_the_markdown_has_all_columns() -> None:
    lines = results().markdown().splitlines()
    assert {line.count("|") for line in lines} == {11}


def test_the_plot_is_svg_with_a_bar_a_row() -> None:
    svg = ElementTree.fromstring(plot(results(), ["scan", "a | b", "not measured"]))
    bars = [rect for rect in svg.iter("{http://www.w3.org/2000/svg}rect") if rect.get("x") == "210"]
    assert len(bars) == 5


def test_a_figure_says_whether_it_holds() -> None:
    assert Figure("a", 1.5, "", 1.5, at_least=False).verdict == "ok"
    assert Figure("a", 1.51, "", 1.5, at_least=False).verdict == "MISSED"
    assert (Figure("a", 200, "", 200).verdict, Figure("a", 7, "").verdict) == ("ok", "")
    assert [number(value) for value in (0.123, 3.0, 99.5, 1234.5)] == ["0.12", "3", "99.50", "1,234"]
