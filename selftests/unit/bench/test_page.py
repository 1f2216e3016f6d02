"""Check the page of bench/page.py: self-contained, complete, drawn to scale."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench.figures import Figure, Results, document
from bench.page import NAMES, PLOT, Scale, page

TCP = Figure(name="tcp1", title="TCP, one stream", unit="Mbit/s", group="tcp1", more_is_better=True)
CPU = Figure(name="tcp1_cpu_sender", title="CPU time, sender", unit="s/Gbit", group="tcp1", is_detail=True)
PROGRAMS = ["refwg+simple", "wireguard-go"]


def content(**more: Any) -> dict[str, Any]:
    """Make the content of a JSON file: two rounds of two programs."""
    results = Results()
    for number, (ours, theirs) in enumerate([(200.0, 2000.0), (300.0, 1000.0)], 1):
        results.add(number, PROGRAMS[0], {"tcp1": ours, "tcp1_cpu_sender": 4.0})
        results.add(number, PROGRAMS[1], {"tcp1": theirs})
    host = {"cpu": "A CPU <fast>", "cores": 2, "kernel": "6.1", "python": "3.11", "loads": [0.5, 1.5]}
    facts = {
        "time": 1_700_000_000, "seconds": 90, "rounds": 2, "interrupted": False, "baseline": "wireguard-go",
        "host": host, "implementations": [{"name": name, "version": "1.0"} for name in PROGRAMS],
    }  # fmt: skip
    return {**document(results, [TCP, CPU], PROGRAMS, facts), **more}


def plots(text: str) -> list[ET.Element]:
    """Return the plots of a page as XML."""
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]  # noqa: S314 - ours


class Links(HTMLParser):
    """Collects what a browser would fetch, and the tags that are open at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in {"src", "href", "data", "poster"}]
        if tag not in {"meta", "link", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_fetches_nothing_and_closes_every_element() -> None:
    text = page(content())
    links = Links()
    links.feed(text)
    assert links.fetched == []
    assert links.open == []
    assert not re.search(r"@import|url\(|<script", text)


def test_page_has_colours_for_light_and_dark() -> None:
    light, dark = re.findall(r"--paper: (#\w+)", page(content()))
    assert light != dark
    assert "prefers-color-scheme: dark" in page(content())


def test_page_escapes_text_of_machine() -> None:
    assert "A CPU &lt;fast&gt;" in page(content())


def test_page_shows_each_median_with_ratio_within_rounds() -> None:
    (plot,) = plots(page(content()))
    texts = ["".join(element.itertext()).strip() for element in plot.iter("text")]
    # 200 / 2000 and 300 / 1000: the median of both ratios is 0.2; the ratio of the medians would be 0.17.
    assert "250 0.20 x" in texts
    assert "1500" in texts


def test_plot_has_dot_for_each_round_at_its_value() -> None:
    (plot,) = plots(page(content()))
    dots = [float(circle.attrib["cx"]) for circle in plot.iter("circle")]
    assert dots == [NAMES + PLOT * value / 2000 for value in (200, 300, 2000, 1000)]


def test_detail_is_in_table_and_not_in_plot() -> None:
    text = page(content())
    assert len(plots(text)) == 1
    assert "CPU time, sender" in text.partition("More figures")[2]


def test_page_names_what_was_not_measured() -> None:
    failure = {"round": 2, "measurement": "udp64", "impl": "mine", "message": "iperf3: no route"}
    assert "udp64 mine, round 2: iperf3: no route" in page(content(failures=[failure]))


def test_ratio_to_later_baseline_is_inverse_of_recorded_one() -> None:
    text = page(content(baseline="refwg+simple"))
    # 2000 / 200 and 1000 / 300, recorded as 0.1 and 0.3: the inverse of their median.
    assert "1500 5.00 x" in ["".join(e.itertext()).strip() for e in plots(text)[0].iter("text")]


def test_figures_of_guest_have_part_of_their_own() -> None:
    text = page(content(guest={**content(), "accelerator": "tcg"}))
    assert "In a guest (tcg)" in text
    assert len(plots(text)) == 2


@pytest.mark.parametrize(
    ("most", "last"), [(2290.0, 2500.0), (1000.0, 1000.0), (0.083, 0.1), (7.0, 8.0), (0.0, 1.0), (51.0, 60.0)]
)
def test_scale_ends_at_round_number_above_greatest_value(most: float, last: float) -> None:
    scale = Scale.of([most / 2, most])
    assert scale.ticks[0] == 0
    assert scale.ticks[-1] == pytest.approx(last)
    assert len(scale.ticks) <= 6
