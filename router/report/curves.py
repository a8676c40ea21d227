"""The report's sections on quality and cost: what the router is worth on tables of outcomes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from router.assess import MARKS, TARGETS, Assessment, Point
from router.calibrate import Bin
from router.clauses import Goal
from router.difficulty import Difficulty
from router.money import spelled
from router.observe import outlook
from router.policy import Policy
from router.report.charts import Axis, Dot, Line, chart, linear
from router.report.markup import Markup, tag
from router.report.parts import NONE, count, figure, percent, points, ratio, section, table

LEGEND: Final = (
    ("router", "this router"),
    ("oracle", "an oracle, which knows both outcomes"),
    ("random", "choosing at random"),
    ("cloud level", "always the cloud"),
    ("edge level", "always the edge"),
)


@dataclass(frozen=True, slots=True)
class Aim:
    """A threshold of the difficulty, frozen when the weights were made, and what it is to achieve. `goal`: an
    administrator's, in words, and the `tenant` it is for; empty for one of the shares that are always tried."""

    threshold: float
    cloud_share: float
    goal: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class CallCost:
    """What the cloud takes for a request, on average; `source` says what that is an average of."""

    amount: float
    currency: str
    source: str

    def of_thousand(self, cloud_share: float) -> str:
        return f"{spelled(1000 * cloud_share * self.amount)} {self.currency}"


@dataclass(frozen=True, slots=True)
class Tables:
    """Outcome tables that were scored in one way. `note` says how."""

    name: str
    title: str
    note: str
    assessments: Sequence[Assessment]


def aims(model: Difficulty, policy: Policy | None) -> list[Aim]:
    """The shares that are always tried, and the goals of the policy and of its tenants."""
    tried = [Aim(model.threshold(share), share) for share in TARGETS]
    if policy is None:
        return tried
    named = {"": policy.goal, **{name: policy.of(name).goal for name in policy.tenants}}
    goals = {name: goal for name, goal in named.items() if goal is not None and (not name or goal != policy.goal)}
    return [*tried, *(_aim(model, name, goal) for name, goal in goals.items())]


def _aim(model: Difficulty, tenant: str, goal: Goal) -> Aim:
    whose = f" of {tenant}" if tenant else ""
    said = f"at most {percent(goal.cloud_share, 0)} to the cloud"
    if goal.cloud_share is None:
        said = f"keep {percent(goal.quality, 0)} of what the cloud does better"
    expected = outlook(goal, model)
    return Aim(expected.threshold, expected.cloud_share, f"goal{whose}: {said}", tenant)


def sections(tables: Tables, tried: Sequence[Aim], cost: CallCost | None) -> Markup:
    rows = [_overview(one) for one in tables.assessments]
    columns = ("table", "questions", "edge right", "cloud right", "APGR", "its oracle", "CPT50", "CPT80", "off by")
    return section(
        tables.name,
        tables.title,
        tag("p", tables.note, class_="faint"),
        table("Summary: of the router's score", columns, rows),
        tag(
            "p",
            "APGR: the average part of the gap between edge and cloud that is recovered, over all shares of cloud "
            "calls; 0.5 is chance. CPT50 and CPT80: the share of calls it takes to recover 50 and 80 %. Off by: the "
            "expected calibration error of the score.",
            class_="faint",
        ),
        (_one(one, tried, cost) for one in tables.assessments),
    )


def _overview(one: Assessment) -> list[str]:
    own = one.figures
    return [
        own.name,
        count(own.rows),
        percent(own.edge),
        percent(own.cloud),
        ratio(own.apgr),
        ratio(one.oracle_apgr),
        percent(own.cpt50),
        percent(own.cpt80),
        ratio(one.error),
    ]


def _one(one: Assessment, tried: Sequence[Aim], cost: CallCost | None) -> Markup:
    return tag(
        "article",
        tag("h3", one.figures.name),
        tag(
            "div",
            tag("div", _curve(one, tried), _numbers(one, cost), class_="card"),
            tag("div", calibration(one.figures.name, one.bins, one.error, "the cloud is needed"), class_="card"),
            class_="pair",
        ),
        _operating(one, [aim for aim in tried if aim.goal], cost),
        _thresholds(one, [aim for aim in tried if not aim.goal], cost),
        _domains(one),
    )


def _curve(one: Assessment, tried: Sequence[Aim]) -> Markup:
    own, marks = one.figures, [at / (MARKS - 1) for at in range(MARKS)]
    low, high = min(own.edge, *one.quality), max(own.cloud, *one.oracle)
    lines = [
        Line("edge level", [(0, own.edge), (1, own.edge)]),
        Line("cloud level", [(0, own.cloud), (1, own.cloud)]),
        Line("random", [(0, own.edge), (1, own.cloud)]),
        Line("oracle", list(zip(marks, one.oracle, strict=True))),
        Line("router", list(zip(marks, one.quality, strict=True))),
    ]
    dots = [Dot((at.cloud_share, at.quality), *_marked(aim, at)) for aim in tried for at in [one.at(aim.threshold)]]
    legend = [*LEGEND, ("frozen", f"thresholds frozen for {', '.join(percent(share, 0) for share in TARGETS)}")]
    if any(aim.goal for aim in tried):
        legend.append(("aim", "the policy's goal"))
    drawing = chart(
        f"{own.name}: share of right answers by share of cloud calls; the table below has the numbers",
        _shares("share of requests to the cloud"),
        linear("right answers", low, high, lambda value: percent(value, 0)),
        lines,
        dots,
    )
    return figure(drawing, "Quality over cost", legend)


def _marked(aim: Aim, at: Point) -> tuple[str, float, str]:
    said = f"{percent(at.cloud_share)} to the cloud, {percent(at.quality)} right"
    return ("aim", 7, f"{aim.goal}: {said}") if aim.goal else ("frozen", 4, f"{percent(aim.cloud_share, 0)}: {said}")


def _shares(label: str) -> Axis:
    return linear(label, 0, 1, lambda value: percent(value, 0))


def _operating(one: Assessment, goals: Sequence[Aim], cost: CallCost | None) -> Markup | None:
    """What the administrator's goals come to on this table."""
    if not goals:
        return None
    columns = ("goal", "difficulty from", "to the cloud", "right answers", "of the gain", *_cost_columns(cost))
    rows = [
        [
            aim.goal,
            ratio(at.threshold),
            percent(at.cloud_share),
            percent(at.quality),
            percent(one.recovered(at.quality), 0),
            *_cost_cells(cost, at.cloud_share),
        ]
        for aim in goals
        for at in [one.at(aim.threshold)]
    ]
    return table("The policy's goal: expected quality and cost", columns, rows)


def _thresholds(one: Assessment, tried: Sequence[Aim], cost: CallCost | None) -> Markup:
    columns = ("asked for", "threshold", "to the cloud", "off by points", "right answers", *_cost_columns(cost))
    rows = [
        [
            percent(aim.cloud_share, 0),
            ratio(aim.threshold),
            percent(at.cloud_share),
            points(at.cloud_share - aim.cloud_share),
            percent(at.quality),
            *_cost_cells(cost, at.cloud_share),
        ]
        for aim in tried
        for at in [one.at(aim.threshold)]
    ]
    return table(
        "Cloud share against target: thresholds frozen with the weights, for all of their tables together",
        columns,
        rows,
    )


def _numbers(one: Assessment, cost: CallCost | None) -> Markup:
    own = one.figures
    rows = [
        [
            percent(share, 0),
            percent(one.quality[at]),
            percent(own.edge + share * (own.cloud - own.edge)),
            percent(one.oracle[at]),
            *_cost_cells(cost, share),
        ]
        for at in range(0, MARKS, (MARKS - 1) // 10)
        for share in [at / (MARKS - 1)]
    ]
    columns = ("to the cloud", "router", "at random", "oracle", *_cost_columns(cost))
    return table("Right answers by share of cloud calls", columns, rows)


def _cost_columns(cost: CallCost | None) -> list[str]:
    return [] if cost is None else ["cost of 1,000 requests"]


def _cost_cells(cost: CallCost | None, share: float) -> list[str]:
    return [] if cost is None else [cost.of_thousand(share)]


def _domains(one: Assessment) -> Markup | None:
    if len(one.domains) < 2:
        return None
    largest = sorted(one.domains, key=lambda domain: -domain.rows)
    rows = [
        [
            domain.name,
            count(domain.rows),
            percent(domain.edge),
            percent(domain.cloud),
            ratio(domain.apgr),
            percent(domain.cpt50, 0),
            percent(domain.cpt80, 0),
        ]
        for domain in largest
    ]
    columns = ("domain", "questions", "edge right", "cloud right", "APGR", "CPT50", "CPT80")
    note = f"By domain, the largest first ({NONE}: the cloud is no better there; small ones scatter)"
    return table(note, columns, rows)


def calibration(name: str, bins: Sequence[Bin], error: float, what: str) -> Iterator[Markup]:
    """A reliability curve, and its numbers."""
    most = max(one.count for one in bins)
    drawing = chart(
        f"{name}: how often {what}, by the probability that was said; the table below has the numbers",
        _shares("probability that was said"),
        _shares("how often it was so"),
        [Line("random", [(0, 0), (1, 1)]), Line("router", [(one.said, one.right) for one in bins])],
        [Dot((one.said, one.right), "router", 3 + 3 * one.count / most) for one in bins],
    )
    legend = (("router", f"this router, off by {error:.3f} on average"), ("random", "perfectly calibrated"))
    yield figure(drawing, f"Calibration: that {what}", legend)
    rows = [[percent(one.said), percent(one.right), count(one.count)] for one in bins]
    yield table("Said and come true", ("said", "came true", "answers"), rows)
