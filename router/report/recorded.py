"""The report's sections on recorded decisions: what the router did, and what another policy would have done."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from router.activity import Activity, Attained, Forecast, Group, Period, Spread, Wait
from router.replay import Comparison, said
from router.report.charts import Axis, Dot, Line, bar, chart, linear, logarithmic
from router.report.markup import Child, Markup, tag
from router.report.parts import NONE, count, facts, figure, money, percent, seconds, section, table

WHAT: Final = {"first_token_s": "first token", "total_s": "whole answer"}
SERVED: Final = {"edge": "the edge", "cloud": "the cloud", "cache": "the cache"}
NOBODY: Final = "(no key shown)"
LEAST_S: Final = 1e-4
"""No time is drawn as less."""


def sections(activity: Activity, goal_share: float | None) -> Iterator[Markup]:
    """`goal_share` is the share of cloud calls that the policy's goal asks for or is expected to take."""
    if not activity.decisions:
        yield section("decisions", "Recorded decisions", tag("p", "None yet: the journal is empty.", class_="faint"))
        return
    yield section("decisions", "Recorded decisions", _facts(activity), list(_counts(activity)))
    yield section("share", "Cloud share against target", _shares(activity.periods, goal_share))
    yield section("times", "Times", _waits(activity.waits), _attained(activity.attained))
    yield section("predictions", "Predicted and happened", list(_forecasts(activity.forecasts)))
    yield section("spending", "Spending", _spending(activity))


def _facts(activity: Activity) -> Markup:
    judged, shadowed = activity.judgements, activity.shadowed
    rows: dict[str, Child] = {
        "decisions": count(activity.decisions),
        "from": _moment(activity.first_at),
        "to": _moment(activity.last_at),
        "policies": ", ".join(f"{name or 'unnamed'} ({count(number)})" for name, number in activity.policies[:6]),
        "ended": ", ".join(f"{name} {count(number)}" for name, number in activity.endings[:8]),
    }
    if judged.judged:
        share = percent(judged.escalated / judged.judged)
        rows["cascade"] = f"{count(judged.judged)} local answers judged, {share} given to the cloud"
    if shadowed:
        share = percent(activity.shadow_differs / shadowed)
        rows["shadow"] = f"would have chosen otherwise in {share} of {count(shadowed)}"
    return tag("div", facts(rows), class_="card")


def _moment(at: float | None) -> str:
    return NONE if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"


def _counts(activity: Activity) -> Iterator[Markup]:
    yield _groups("By target", activity.targets, activity.decisions)
    yield _groups("By rule", activity.rules, activity.decisions)
    yield _groups("By tenant", activity.tenants, activity.decisions)
    yield _groups("By class", activity.classes, activity.decisions)


def _groups(caption: str, groups: Sequence[Group], total: int) -> Markup:
    columns = ("", "", "decisions", "share", "to the cloud", "refused", "failed", "first token p50", "p95", "cost")
    rows = [
        [
            one.name or NOBODY,
            bar(one.decisions / total, _side(one)),
            count(one.decisions),
            percent(one.decisions / total),
            percent(one.to_cloud / one.decisions),
            count(one.refused),
            count(one.failed),
            *_two(one.first_token_s),
            money(one.cost),
        ]
        for one in groups
    ]
    return table(caption, columns, rows, words=2)


def _side(group: Group) -> str:
    if group.refused * 2 > group.decisions:
        return "bad"
    return "cloud" if group.to_cloud * 2 > group.decisions else "edge"


def _two(spread: Spread | None) -> tuple[str, str]:
    return (NONE, NONE) if spread is None else (seconds(spread.p50), seconds(spread.p95))


def _shares(periods: Sequence[Period], goal_share: float | None) -> list[Markup]:
    """Of all decisions, and of those that the goal decided; the target where there is one."""
    share = [(number, one.to_cloud / one.decisions) for number, one in enumerate(periods)]
    by_goal = [(number, one.goal_to_cloud / one.by_goal) for number, one in enumerate(periods) if one.by_goal]
    many = len(periods)
    lines, legend = [Line("cloud", share)], [("cloud", "to the cloud, of all decisions")]
    if by_goal:
        lines.append(Line("router", by_goal))
        legend.append(("router", "of those that the goal decided"))
    if goal_share is not None:
        lines.append(Line("random", [(-0.5, goal_share), (many - 0.5, goal_share)]))
        legend.append(("random", f"the goal's target, {percent(goal_share, 0)}"))

    ticks = tuple((float(at), periods[at].label[5:]) for at in sorted({0, (many - 1) // 2, many - 1}))
    drawing = chart(
        "Cloud share over time; the table below has the numbers",
        Axis("time, UTC", lambda value: (value + 0.5) / many, ticks),
        linear("to the cloud", 0, 1, lambda value: percent(value, 0)),
        lines,
        [Dot(point, "cloud", 2.5, periods[int(point[0])].label) for point in share],
    )
    rows = [
        [
            one.label,
            count(one.decisions),
            percent(one.to_cloud / one.decisions),
            count(one.by_goal),
            percent(one.goal_to_cloud / one.by_goal if one.by_goal else None),
            money(one.cost),
        ]
        for one in reversed(periods)
    ]
    columns = ("from, UTC", "decisions", "to the cloud", "by the goal", "of these to the cloud", "cost")
    shown = tag("div", figure(drawing, "Cloud share", legend), class_="card narrow")
    return [shown, table("The latest first", columns, rows)]


def _waits(waits: Sequence[Wait]) -> Markup:
    columns = ("answered by", "answers", "first token p50", "p95", "p99", "whole answer p50", "p95", "p99")
    rows = [
        [
            SERVED.get(one.server, one.server),
            count(one.total_s.count if one.total_s else 0),
            *_three(one.first_token_s),
            *_three(one.total_s),
        ]
        for one in waits
    ]
    return table("How long answers took, to the end or to the first token", columns, rows)


def _three(spread: Spread | None) -> tuple[str, str, str]:
    if spread is None:
        return (NONE, NONE, NONE)
    return seconds(spread.p50), seconds(spread.p95), seconds(spread.p99)


def _attained(classes: Sequence[Attained]) -> Markup:
    rows = [[one.name, count(one.requests), percent(one.p50), percent(one.p95), percent(one.p99)] for one in classes]
    columns = ("class", "requests", "within p50", "within p95", "within p99")
    return table("First tokens within the targets of their class (50, 95 and 99 % are asked for)", columns, rows)


def _forecasts(forecasts: Sequence[Forecast]) -> Iterator[Markup]:
    columns = ("of", "answers", "off by p50", "p95", "took longer than said")
    rows = [
        [f"{SERVED[one.target]}: {WHAT[one.what]}", count(one.answers), *_two(one.off_s), percent(one.too_low)]
        for one in forecasts
    ]
    yield table("Predictions for answers that went as decided", columns, rows)
    yield tag("div", _scatters(forecasts), class_="pair")


def _scatters(forecasts: Sequence[Forecast]) -> Iterator[Markup]:
    for what, title in WHAT.items():
        dots = [
            Dot((max(was, LEAST_S), max(took, LEAST_S)), one.target, 3)
            for one in forecasts
            if one.what == what
            for was, took in one.dots
        ]
        if dots:
            yield tag("div", _scatter(title, dots), class_="card")


def _scatter(title: str, dots: Sequence[Dot]) -> Markup:
    low = min(min(dot.at) for dot in dots)
    high = max(max(dot.at) for dot in dots)
    drawing = chart(
        f"{title}: happened by predicted, for each answer; the table above has the errors",
        logarithmic("predicted", low, high, seconds),
        logarithmic("happened", low, high, seconds),
        [Line("random", [(low, low), (high, high)])],
        dots,
    )
    legend = (("edge dot", "the edge"), ("cloud dot", "the cloud"), ("random", "as predicted"))
    return figure(drawing, f"{title[0].upper()}{title[1:]}, the latest answers", legend)


def _spending(activity: Activity) -> list[Markup]:
    if not activity.cost:
        return [tag("p", "No decision had a price: the policies in force said nothing of money.", class_="faint")]
    rows = [[one.name or NOBODY, count(one.decisions), money(one.cost)] for one in activity.tenants]
    whole = tag("p", f"The cloud took {money(activity.cost)} in all.")
    return [whole, table("By tenant", ("tenant", "decisions", "cost"), rows)]


def candidate(comparison: Comparison, recorded: Sequence[Group]) -> Markup:
    """What another policy would have done with the same requests."""
    moves = [[f"{old} → {new}", count(number)] for (old, new), number in comparison.moved.most_common()]
    before, after = Counter({group.name: group.decisions for group in recorded}), comparison.rules
    rules = [[name, count(before[name]), count(after[name])] for name, _ in (before + after).most_common()]
    return section(
        "candidate",
        "What the policy would change",
        tag("p", f"It would {said(comparison)}.", class_="bad" if comparison.leaks else "good"),
        tag("p", "Each recorded request was decided again on the same values; no model was called.", class_="faint"),
        table("Moved", ("from → to", "requests"), moves),
        table("Decided by", ("rule", "as recorded", "under this policy"), rules),
    )
