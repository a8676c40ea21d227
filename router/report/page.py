"""The whole page, in one file: no script, nothing fetched, light and dark, fit for paper."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from router.activity import Activity
from router.calibrate import Fitted
from router.replay import Comparison
from router.report import curves, recorded
from router.report.curves import Aim, CallCost, Tables
from router.report.markup import Markup, tag
from router.report.parts import count, facts, percent, ratio, section

NOTHING_FETCHED: Final = "default-src 'none'; style-src 'unsafe-inline'"
WIDTHS: Final = "width=device-width, initial-scale=1"


@dataclass(frozen=True, slots=True)
class Report:
    """All that is on the page. `sources`: what it was made from, by option."""

    made: datetime
    sources: Mapping[str, str]
    tables: Sequence[Tables]
    aims: Sequence[Aim]
    cost: CallCost | None = None
    cascade: Sequence[Fitted] = ()
    activity: Activity | None = None
    comparison: Comparison | None = None


def page(report: Report, style: str) -> str:
    """`style` is the text of the style sheet."""
    body = list(_sections(report))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content=WIDTHS),
        tag("meta", http_equiv="Content-Security-Policy", content=NOTHING_FETCHED),
        tag("title", "Causeway: routing report"),
        tag("style", Markup(style)),
    )
    header = tag("header", tag("h1", "Causeway: routing report"), _contents(report))
    main = tag("main", _sources(report), body, class_="report")
    return f"<!doctype html>\n{tag('html', head, tag('body', header, main), lang='en')}\n"


def _sections(report: Report) -> Iterator[Markup]:
    if report.activity is not None:
        yield from recorded.sections(report.activity, _goal_share(report.aims))
    if report.comparison is not None and report.activity is not None:
        yield recorded.candidate(report.comparison, report.activity.rules)
    for tables in report.tables:
        yield curves.sections(tables, report.aims, report.cost)
    if report.cascade:
        yield _cascade(report.cascade)


def _contents(report: Report) -> Markup:
    links: dict[str, str] = {}
    if report.activity is not None:
        links["decisions"] = "Decisions"
        if report.activity.decisions:
            links |= {"share": "Cloud share", "times": "Times", "predictions": "Predictions", "spending": "Spending"}
    if report.comparison is not None:
        links["candidate"] = "Candidate"
    links |= {tables.name: tables.title for tables in report.tables}
    if report.cascade:
        links["cascade"] = "Cascade"
    return tag("nav", (tag("a", said, href=f"#{name}") for name, said in links.items()), aria_label="Sections")


def _sources(report: Report) -> Markup:
    rows = {"made": f"{report.made:%Y-%m-%d %H:%M %Z}".strip(), **report.sources}
    if report.cost is not None:
        rows["cost"] = f"{report.cost.of_thousand(1)} for 1,000 requests in the cloud, {report.cost.source}"
    return tag("div", facts(rows), class_="card")


def _goal_share(aims: Sequence[Aim]) -> float | None:
    """Of the policy's own goal."""
    return next((aim.cloud_share for aim in aims if aim.goal and not aim.tenant), None)


def _cascade(fitted: Sequence[Fitted]) -> Markup:
    said = "Answers judged by the local model's own probabilities; none of them by a curve that was fitted to it."
    return section("cascade", "Cascade", tag("p", said, class_="faint"), (_of_model(one) for one in fitted))


def _of_model(one: Fitted) -> Markup:
    digest = one.calibration.digest
    rows = {
        "answers": count(one.answers),
        "right": percent(one.right),
        "a right one ranks above a wrong one": ratio(one.alone.ranked),
    }
    told = {one.model: one.alone}
    if one.agreed is not None:
        rows["with a second sample"] = ratio(one.agreed.ranked)
        told[f"{one.model}, with a second sample"] = one.agreed
    shown = [
        tag("div", list(curves.calibration(name, curve.bins, curve.error, "the answer is right")), class_="card")
        for name, curve in told.items()
    ]
    title = f"{one.model}{f' ({digest})' if digest else ''}"
    return tag("article", tag("h3", title), tag("div", facts(rows), class_="card"), tag("div", shown, class_="narrow"))
