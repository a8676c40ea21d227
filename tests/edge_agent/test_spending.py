"""Money: counted once, never spent twice, remembered over a restart, forgotten at midnight."""

import asyncio
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from edge_sides import Local, Remote, ask, collect, policy_file
from fakes import ScriptedAnswer
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.caller import Caller
from edge_agent.daemon import Daemon, put_together
from edge_agent.experience import MAX_OPEN, Experience
from edge_agent.journal import Journal
from edge_agent.spending import Spending
from router.confidence import Heard, Judged
from router.decide import decide
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.money import Price
from router.policy import parse
from router.records import Outcome, Recorded, read
from shared.errors import RateLimited, UpstreamFailed
from shared.schemas import Cached, Delta, Route, Switched, Target, Usage
from shared.telemetry import RequestFinished

PRICES = "prices: {cloud: {input_per_million: 1000, output_per_million: 1000, currency: EUR}}\n"
"""A thousandth for each token."""
POLICY = "mode: prefer_cloud\n" + PRICES + "budgets: {day: 1}\nexpected_output_tokens: 95\n"
"""With the scripted sides' prompts of 5 tokens a request may cost 0.1."""
PRICE = Price(input_per_million=1000.0, output_per_million=1000.0, currency="EUR")
NOW = time.mktime((2026, 5, 4, 12, 0, 0, 0, 0, -1))
LAST = Delta(finish_reason="stop", usage=Usage(prompt_tokens=5, completion_tokens=95))


def record(cost: float | None = None, at: float = NOW, tenant: str = "", tokens: int = 50) -> Recorded:
    return Recorded(
        at=at,
        request=RequestFeatures(prompt_tokens=tokens, expected_output_tokens=50, tenant=tenant),
        device=DeviceReading(model="small", context_length=4096),
        link=LinkReading(model="large"),
        target="cloud",
        price=PRICE,
        outcome=Outcome(cost=cost),
    )


def at_noon() -> Spending:
    return Spending(now=lambda: NOW)


def daemon_for(folder: Path, cloud: ScriptedAnswer, policy: str = POLICY, **parts: object) -> Daemon:
    local = Local(ScriptedAnswer(Delta(text="here", tokens=1), LAST))
    return put_together(local, Remote(cloud), policy_file(folder, policy), **parts)  # type: ignore[arg-type]


def test_what_may_cost_gives_way_to_what_did() -> None:
    """Set aside while under way, by tenant; then its own amount, or nothing."""
    spending = at_noon()
    spending.begun("a", record(tenant="lab"))
    spending.begun("b", record())
    assert spending.spent("lab").tenant == pytest.approx(0.1)
    assert spending.spent("lab").day == pytest.approx(0.2)
    spending.ended("a", record(0.03, tenant="lab"))
    spending.ended("b", record(None))
    assert (spending.spent("lab").tenant, spending.spent("").tenant) == (pytest.approx(0.03), pytest.approx(0))
    assert spending.stats() == {
        "today": pytest.approx(0.03),
        "tenants": {"lab": pytest.approx(0.03), "": 0},
        "set_aside": 0,
    }


def test_midnight_forgets() -> None:
    """Sums begin anew; what was decided before and ends after counts for its own day."""
    clock = [NOW]
    spending = Spending({"": 0.5}, now=lambda: clock[0])
    spending.begun("late", record())
    clock[0] += 86_400
    assert spending.spent("").day == 0
    spending.begun("new", record(at=clock[0]))
    spending.ended("late", record(0.1))
    assert spending.spent("").day == pytest.approx(0.1)
    spending.ended("new", record(0.02, at=clock[0]))
    assert spending.spent("").day == pytest.approx(0.02)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["", "lab"]),
        st.integers(0, 400),
        st.none() | st.integers(1, 400),
        st.floats(0, 1),
        st.integers(0, 5),
    ),
    min_size=5,
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_no_interleaving_spends_more_than_the_budget(steps: list[tuple[str, int, int | None, float, int]]) -> None:
    """Whatever begins while others run and however they end within what was expected of them: never more than the
    day's money, nor the tenant's; and who was let in is only turned away where it would not have fitted."""
    rules = parse(f"mode: prefer_cloud\n{PRICES}budgets: {{day: 2, tenant_day: 1.5}}\nexpected_output_tokens: 100\n")
    spending, running, paid = at_noon(), list[tuple[str, Recorded, float]](), {"": 0.0, "lab": 0.0}
    for number, (tenant, tokens, limit, share, ends) in enumerate(steps):
        seen = record(tenant=tenant).request
        seen = replace(
            seen, prompt_tokens=tokens, max_tokens=limit, expected_output_tokens=100, spent=spending.spent(tenant)
        )
        decision = decide(seen, rules, device=DeviceReading(model="small", context_length=4096), link=LinkReading())
        one = replace(record(), request=seen, target=decision.target)
        if decision.target == "cloud":
            spending.begun(str(number), one)
            running.append((str(number), one, PRICE.of(tokens, int(seen.answer_tokens * share))))
        else:
            cost = PRICE.of(tokens, seen.answer_tokens)
            assert seen.spent.day + cost > 2 or seen.spent.tenant + cost > 1.5
        for name, ended, cost in running[:ends]:
            paid[ended.request.tenant] += cost
            spending.ended(name, replace(ended, outcome=Outcome(cost=cost)))
        del running[:ends]
        assert spending.spent("").day <= 2 + 1e-9
        assert sum(paid.values()) <= 2 + 1e-9
        assert max(paid.values()) <= 1.5 + 1e-9


async def test_a_burst_does_not_overshoot(tmp_path: Path) -> None:
    """Fifty at once with money for ten: ten go, the others are answered here; and when those have ended for less than
    was set aside, there is room again."""
    go = asyncio.Event()
    cheap = Delta(finish_reason="stop", usage=Usage(prompt_tokens=5, completion_tokens=20))
    cloud = ScriptedAnswer(Delta(text="there", tokens=1), go, cheap)
    daemon = daemon_for(tmp_path, cloud)
    burst = [asyncio.create_task(collect(daemon.intake, ask(id=str(number)))) for number in range(50)]
    for ended in islice(asyncio.as_completed(burst), 40):
        await ended
    under_way = daemon.experience.spending.spent("").day
    go.set()
    replies = await asyncio.gather(*burst)
    targets = [deltas[-1].route.target for deltas, _ in replies if deltas[-1].route]
    (later, _) = await collect(daemon.intake, ask(id="later"))

    assert (targets.count("cloud"), targets.count("edge")) == (10, 40)
    assert under_way == pytest.approx(1.0)
    assert later[-1].route is not None
    assert later[-1].route.target == "cloud"
    assert daemon.experience.spending.spent("").day == pytest.approx(11 * 0.025)


async def test_each_tenant_has_its_own(tmp_path: Path) -> None:
    """One that has spent its money does not take another's."""
    daemon = daemon_for(tmp_path, ScriptedAnswer(LAST), POLICY.replace("day: 1", "tenant_day: 0.1, over: refuse"))

    async def one(number: int, tenant: str) -> str:
        try:
            deltas = [delta async for delta in daemon.intake.answer(ask(id=str(number)), Caller(tenant))]
        except RateLimited:
            return "refused"
        return deltas[-1].route.target if deltas[-1].route else ""

    assert [await one(number, tenant) for number, tenant in enumerate(["a", "a", "b", "b"])] == [
        "cloud",
        "refused",
        "cloud",
        "refused",
    ]


async def test_each_key_of_a_tenant_has_its_own(tmp_path: Path) -> None:
    """Also after a restart; whoever asks with another key of the same tenant is not held up."""
    path, rules = tmp_path / "journal.db", POLICY.replace("day: 1", "key_day: 0.1")
    for targets in (["cloud", "edge", "cloud"], ["edge", "edge", "edge"]):
        spending, journal = Spending.remembered(path), Journal(path)
        daemon = daemon_for(tmp_path, ScriptedAnswer(LAST), rules, journal=journal, spending=spending)
        found = []
        for number, key in enumerate(["k1", "k1", "k2"]):
            deltas = [delta async for delta in daemon.intake.answer(ask(id=str(number)), Caller("a", key))]
            found.append(deltas[-1].route.target if deltas[-1].route else "")
        journal.close()
        assert found == targets


async def test_a_restart_remembers(tmp_path: Path) -> None:
    """The day's sum comes back from the journal, and goes on barring."""
    path = tmp_path / "journal.db"
    for start in range(2):
        spending, journal = Spending.remembered(path), Journal(path)
        daemon = daemon_for(
            tmp_path, ScriptedAnswer(LAST), POLICY.replace("day: 1", "day: 0.25"), journal=journal, spending=spending
        )
        replies = [await collect(daemon.intake, ask(id=f"{start}{number}")) for number in range(2)]
        journal.close()
        targets = [deltas[-1].route.target for deltas, _ in replies if deltas[-1].route]
        assert targets == (["cloud", "cloud"] if not start else ["edge", "edge"])

    assert [one.outcome.cost for one in read(path)] == [pytest.approx(0.1), pytest.approx(0.1), 0.0, 0.0]
    assert Spending.remembered(path, now=lambda: time.time() + 2 * 86_400).spent("").day == 0


@pytest.mark.parametrize("content", [None, b"this is no database" * 100])
def test_no_journal_is_no_money_spent(tmp_path: Path, content: bytes | None) -> None:
    """A new device, or a damaged file: counted from now on."""
    path = tmp_path / "journal.db"
    if content is not None:
        path.write_bytes(content)
    assert Spending.remembered(path).spent("").day == 0


def event(target: Target | None, outcome: str = "done", usage: Usage | None = None, **more: object) -> RequestFinished:
    route = target and Route(target=target, reason="because", **more)  # type: ignore[arg-type]
    return RequestFinished("r", "auto", outcome, 1.0, usage=usage, route=route or None, tokens=7)  # type: ignore[arg-type]


USED = Usage(prompt_tokens=60, completion_tokens=40)
ABOVE = Switched(target="edge", model="small", starts_at=9, usage=Usage(prompt_tokens=30, completion_tokens=3))


@pytest.mark.parametrize(
    ("ended", "cost"),
    [
        (event("cloud", usage=USED), 0.1),
        (event("edge", usage=USED), 0.0),
        (event("cloud", usage=USED, cached=Cached(use="hit")), 0.0),
        (event("cloud", usage=USED, cached=Cached(use="shared")), 0.0),
        (event("cloud", usage=USED, cached=Cached(use="miss")), 0.1),
        (event("cloud", "cancelled"), 0.057),
        (event("cloud", "error"), 0.057),
        (event("cloud", usage=USED, switched=ABOVE), 0.067),
        (event("cloud", "cancelled", switched=ABOVE), 0.054),
        (event(None, "cancelled"), 0.057),
        (event(None, "error"), 0.0),
    ],
)
def test_what_an_end_costs(ended: RequestFinished, cost: float) -> None:
    """Usage where it is known, else what came; the cache's and the device's answers are free."""
    kept: list[Recorded] = []
    experience = Experience(kept.append, at_noon())
    experience.decided("r", record())
    experience(ended)

    assert kept[0].outcome.cost == pytest.approx(cost)
    assert experience.spending.spent("").day == pytest.approx(cost)


def test_a_cascade_may_cost_too() -> None:
    """Set aside once, while the device's answer is judged; then whoever answered counts."""
    for served, cost in (("edge", 0.0), ("cloud", 0.1)):
        experience = Experience(None, at_noon())
        trial = replace(record(), target="edge", escalates=True)
        experience.decided("r", trial)
        experience.decided("r", replace(trial, judged=Judged(heard=Heard(), p=0.1, threshold=0.6)))
        assert experience.spending.spent("").day == pytest.approx(0.1)
        experience(event(served, usage=USED))
        assert experience.spending.spent("").day == pytest.approx(cost)


@pytest.mark.parametrize(("failovers", "cost"), [(0, 0.05), (1, 0.0)])
def test_who_leaves_while_the_cloud_is_asked_has_it_read_the_prompt(failovers: int, cost: float) -> None:
    """Although the edge's beginning was shown; not where the edge goes on because the cloud had failed."""
    experience = Experience(None, at_noon())
    trial = replace(record(), target="edge", escalates=True)
    experience.decided("r", replace(trial, judged=Judged(heard=Heard(), p=0.1, threshold=0.6)))
    experience(event("edge", "cancelled", failovers=failovers))
    assert experience.spending.spent("").day == pytest.approx(cost)


async def test_a_cloud_that_fails_costs_nothing(tmp_path: Path) -> None:
    """The device stands in, and what was set aside is there again."""
    daemon = daemon_for(tmp_path, ScriptedAnswer(UpstreamFailed("broken")))
    await collect(daemon.intake, ask())
    assert daemon.experience.spending.stats()["today"] == pytest.approx(0)


def test_an_end_that_nobody_waits_for_counts_in_full() -> None:
    """Beyond the decisions that can be open."""
    experience = Experience(None, at_noon())
    for number in range(MAX_OPEN + 1):
        experience.decided(str(number), record(tokens=0))
    assert experience.lost == 1
    assert experience.spending.spent("").day == pytest.approx((MAX_OPEN + 1) * 0.05)
    assert experience.spending.stats()["set_aside"] == pytest.approx(MAX_OPEN * 0.05)


def test_without_prices_nothing_is_counted() -> None:
    """No cost in the record, no sum."""
    kept: list[Recorded] = []
    experience = Experience(kept.append, at_noon())
    experience.decided("r", replace(record(), price=None))
    experience(event("cloud", usage=USED))
    assert (kept[0].outcome.cost, experience.spending.spent("").day) == (None, 0)
