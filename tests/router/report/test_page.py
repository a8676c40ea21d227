"""The report's page: nothing hostile gets through, nothing is fetched, every chart has its numbers beside it."""

import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reported import HOSTILE, records, tables

from router.activity import mean_call_cost, summarise
from router.assess import assess, shipped_assessments
from router.calibrate import Bin, Fitted, Reliability
from router.cascade_rules import Calibration
from router.classes import KNOWN
from router.difficulty import shipped_difficulty
from router.policy import parse
from router.replay import replay
from router.report.command import style
from router.report.curves import CallCost, Tables, aims
from router.report.page import Report, page
from router.report.parts import LISTED

MADE = datetime(2026, 5, 1, 12, tzinfo=UTC)
POLICY = parse(
    "mode: prefer_edge\ngoal: {cloud_share: 0.3}\ntenants:\n  lab: {goal: {quality: 0.8}}\n"
    "prices: {cloud: {input_per_million: 1, output_per_million: 2, currency: EUR}}\n"
)


class Reader(HTMLParser):
    """What is on a page: its elements, their attributes, and whether they are well nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def whole() -> Report:
    journal = records()
    told = Reliability((Bin(50, 0.2, 0.3), Bin(50, 0.8, 0.7)), 0.1, 0.7)
    fitted = Fitted(HOSTILE, Calibration(bias=0), 100, 0.5, told, told)
    return Report(
        made=MADE,
        sources={"journal": HOSTILE},
        tables=[Tables("outcomes", "Given", HOSTILE, [assess(table) for table in tables()])],
        aims=aims(shipped_difficulty(), POLICY),
        cost=CallCost(mean_call_cost(journal, POLICY.price), "EUR", "recorded"),  # type: ignore[arg-type]
        cascade=[fitted],
        activity=summarise(journal, KNOWN),
        comparison=replay(journal, POLICY),
    )


def test_hostile_names_stay_text() -> None:
    """Tables, domains, tenants, models, files: none of them becomes an element or an attribute of its own."""
    read = Reader(page(whole(), style()))

    assert sum(HOSTILE in text for text in read.text) >= 4
    assert not {tag for tag, _ in read.elements} & {"script", "img", "iframe", "link", "object", "form"}
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]


def test_nothing_is_fetched() -> None:
    """No address of anybody else anywhere, and a content policy that would forbid it."""
    text = page(whole(), style())
    read = Reader(text)

    assert not re.search(r"https?:|//[a-z]|url\(|@import", text.replace(HOSTILE, ""))
    addresses = [a[name] or "" for _, a in read.elements for name in ("href", "src") if name in a]
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    policies = [a["content"] for _, a in read.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_chart_has_words_and_numbers_beside_it() -> None:
    """A picture has a label and a table follows it; every link leads to a section that is there."""
    read = Reader(page(whole(), style()))
    pictures = [attributes for tag, attributes in read.elements if tag == "svg" and "aria-hidden" not in attributes]
    links = {a["href"] for tag, a in read.elements if tag == "a"}

    assert len(pictures) >= 8
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for attributes in pictures)
    assert sum(tag == "caption" for tag, _ in read.elements) >= len(pictures)
    assert links == {f"#{a['id']}" for tag, a in read.elements if tag == "section"}
    for tag, attributes in read.elements:
        assert tag != "th" or attributes.get("scope") in ("col", "row")


def test_the_goal_is_marked_with_its_quality_and_cost() -> None:
    """The policy's goal and a tenant's: threshold, share, quality and cost, as the table says they would be."""
    text = page(whole(), style())

    assert "goal: at most 30\u202f% to the cloud" in text
    assert "goal of lab: keep 80\u202f% of what the cloud does better" in text
    assert text.count("dot aim") >= 2 * len(tables())
    assert "cost of 1,000 requests" in text


def test_without_anything_the_shipped_curves_are_there() -> None:
    """No journal, no policy, no tables: still a page, and no empty sections."""
    shown = [Tables("shipped", "Quality", "note", shipped_assessments())]
    report = Report(MADE, {}, shown, aims(shipped_difficulty(), None))
    read = Reader(page(report, style()))

    assert [a["id"] for tag, a in read.elements if tag == "section"] == ["shipped"]
    assert "dot aim" not in page(report, style())


def test_an_empty_journal_is_said_to_be_empty() -> None:
    """Instead of tables of nothing."""
    report = replace(whole(), activity=summarise([], KNOWN), comparison=None)
    assert "None yet: the journal is empty." in page(report, style())


def test_long_lists_are_cut_and_counted() -> None:
    """A thousand tenants make no page of a thousand rows."""
    many = [replace(one, request=replace(one.request, tenant=f"tenant {at}")) for at, one in enumerate(records(200))]
    text = page(Report(MADE, {}, [], [], activity=summarise(many, KNOWN)), style())

    assert f"and {200 - LISTED} more" in text


@pytest.mark.parametrize("part", ["console/style.css", "report/report.css"])
def test_its_style_is_in_the_package(part: str) -> None:
    """The page takes the console's sheet and its own with it."""
    import router

    assert (Path(router.__file__).parent / part).read_text() in style()
