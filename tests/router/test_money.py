"""What an answer costs, and when there is no money left for it."""

from dataclasses import replace

import pytest

from router.decide import Decision, decide
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.money import Budgets, Price, Spent, spelled
from router.policy import InvalidPolicy, Policy, parse
from shared.errors import PolicyDenied, RateLimited

PRICES = "prices: {cloud: {input_per_million: 1, output_per_million: 10, currency: EUR}}\n"
ASK = RequestFeatures(prompt_tokens=1000, expected_output_tokens=100)
DEVICE = DeviceReading(model="small", context_length=4096, hour=21.5)
LINK = LinkReading(model="large", context_length=8192)


def policy(budgets: str, mode: str = "prefer_cloud", more: str = "") -> Policy:
    return parse(f"mode: {mode}\n{PRICES}budgets: {budgets}\n{more}")


def decided(rules: Policy, request: RequestFeatures = ASK, day: float = 0.0, tenant: float = 0.0) -> Decision:
    return decide(replace(request, spent=Spent(day=day, tenant=tenant)), rules, device=DEVICE, link=LINK)


def test_a_price_is_for_a_million_tokens() -> None:
    """Of prompts and of answers, each by its own."""
    assert Price(input_per_million=2.0, output_per_million=6.0, currency="EUR").of(500_000, 1_000_000) == 7.0


@pytest.mark.parametrize(("amount", "said"), [(0.0, "0.00"), (0.42, "0.42"), (12.345, "12.35"), (0.00123, "0.00123")])
def test_amounts_are_said_in_cents_or_finer(amount: float, said: str) -> None:
    assert spelled(amount) == said


def test_a_decision_says_what_the_answer_would_cost() -> None:
    """The prompt and the length expected, in the cloud; without prices nothing."""
    there = decided(parse(f"mode: prefer_edge\n{PRICES}")).predictions
    assert (there.edge.cost, there.cloud.cost) == (None, pytest.approx(0.002))
    assert decided(parse("mode: prefer_edge")).predictions.cloud.cost is None


@pytest.mark.parametrize(
    ("budgets", "day", "tenant", "target"),
    [
        ("{day: 1}", 0.998, 0.0, "cloud"),
        ("{day: 1}", 0.9981, 0.0, "edge"),
        ("{tenant_day: 1}", 50.0, 0.998, "cloud"),
        ("{tenant_day: 1}", 0.0, 1.0, "edge"),
        ("{day: 0}", 0.0, 0.0, "edge"),
    ],
)
def test_what_does_not_fit_into_the_budget_stays(budgets: str, day: float, tenant: float, target: str) -> None:
    """The request's own cost counts; the last one that fits still goes."""
    assert decided(policy(budgets), day=day, tenant=tenant).target == target


def test_the_reason_says_what_was_spent_and_what_it_may_cost() -> None:
    """By whom, too; the rule is the bar."""
    decision = decided(policy("{day: 2, tenant_day: 1}"), day=1.5, tenant=1.0)
    assert decision.rule == "budget"
    assert decision.reason == "budget: 1.00 of 1.00 EUR spent today by the tenant, this may cost 0.002"
    assert decided(policy("{day: 1}"), day=1.0).reason == "budget: 1.00 of 1.00 EUR spent today, this may cost 0.002"


def test_max_tokens_is_what_it_may_cost() -> None:
    """Longer than expected is possible where the caller asked for it."""
    long = replace(ASK, max_tokens=3000)
    assert decided(policy("{day: 1}"), long, day=0.97).target == "edge"
    assert decided(policy("{day: 1}"), ASK, day=0.97).target == "cloud"


def test_no_rule_and_no_wish_spends_what_is_not_there() -> None:
    """A rule for the cloud gives way; where nobody is left the refusal names the budget."""
    over = policy("{day: 1}", more="rules: [{name: up, target: cloud}]")
    assert decided(over, day=1.0).target == "edge"
    with pytest.raises(PolicyDenied, match="not the cloud: budget: 1"):
        decided(over, replace(ASK, model="cloud"), day=1.0)


def test_refused_if_the_policy_says_so() -> None:
    """Only what the cloud was to answer, until midnight; the device goes on answering the rest."""
    with pytest.raises(RateLimited, match="budget: 1") as caught:
        decided(policy("{day: 1, over: refuse}"), day=1.0)
    assert (caught.value.source, caught.value.retry_after) == ("edge", 2.5 * 3600)
    assert decided(policy("{day: 1, over: refuse}", mode="prefer_edge"), day=1.0).target == "edge"


@pytest.mark.parametrize(("day", "escalates"), [(0.5, True), (1.0, False)])
@pytest.mark.parametrize("over", ["edge", "refuse"])
def test_no_cascade_without_money(day: float, escalates: bool, over: str) -> None:
    """What the device answers is not held back for a cloud that may not be asked."""
    rules = policy(f"{{day: 1, over: {over}}}", mode="prefer_edge", more="cascade: {threshold: 0.6}")
    assert decided(rules, day=day).escalates is escalates


def test_a_tenant_may_have_more_of_the_days_money() -> None:
    """What its own part does not give stays."""
    budgets = policy("{day: 5, tenant_day: 1, over: refuse}", more="tenants: {lab: {budgets: {tenant_day: 3}}}")
    assert budgets.of("lab").budgets == Budgets(day=5.0, tenant_day=3.0, over="refuse")
    assert budgets.of("other").budgets == Budgets(day=5.0, tenant_day=1.0, over="refuse")


def test_a_keys_own_money() -> None:
    """One key that has spent its part is barred, the tenant's others go on; the reason and a condition tell of it."""
    budgets = policy("{day: 5, key_day: 1}")
    poor, rich = replace(ASK, spent=Spent(day=2, tenant=2, key=1)), replace(ASK, spent=Spent(day=2, tenant=2))
    barred = decide(poor, budgets, device=DEVICE, link=LINK)
    assert barred.reason == "budget: 1.00 of 1.00 EUR spent today with this key, this may cost 0.002"
    assert decide(rich, budgets, device=DEVICE, link=LINK).target == "cloud"
    rule = policy("{day: 5}", more="rules: [{name: r, when: 'key_spent_today > 0.5', target: edge}]")
    assert decide(poor, rule, device=DEVICE, link=LINK).reason == "rule r: key_spent_today 1"
    assert decide(rich, rule, device=DEVICE, link=LINK).target == "cloud"


def test_conditions_on_money() -> None:
    """The predicted cost and what was spent are facts, said in reasons; unknown without prices."""
    rules = 'rules: [{name: dear, when: {cloud_cost: {">": 0.001}, spent_today: {">=": 0.5}}, target: edge}]'
    assert decided(policy("{day: 1}", more=rules), day=0.75).reason == (
        "rule dear: cloud_cost 0.002 > 0.001, spent_today 0.75 >= 0.5"
    )
    assert decided(policy("{day: 1}", more=rules), day=0.25).target == "cloud"
    assert decided(parse(f"mode: prefer_cloud\n{rules}"), day=0.75).target == "cloud"


@pytest.mark.parametrize(
    ("source", "field", "message"),
    [
        ("budgets: {day: 5}", "budgets", "without prices nobody can tell"),
        (PRICES + "budgets: {over: refuse}", "budgets", "give day, tenant_day"),
        (PRICES + "budgets: {day: -1}", "budgets.day", "greater than or equal to 0"),
        (PRICES + "budgets: {day: .nan}", "budgets.day", "finite"),
        (PRICES + "budgets: {dya: 1}", "budgets.dya", "did you mean day?"),
        (PRICES + "budgets: {day: 1, over: stop}", "budgets.over", "must be 'edge' or 'refuse'"),
        ("prices: {}", "prices.cloud", "is required"),
        ("prices: {cloud: {input_per_milion: 1}}", "prices.cloud", "did you mean input_per_million?"),
        (PRICES.replace("EUR", "euro"), "prices.cloud.currency", "must match"),
        (PRICES + "tenants: {lab: {budgets: {over: refuse}}}", "tenants.lab.budgets", "give day, tenant_day"),
    ],
)
def test_mistakes_are_named_where_they_stand(source: str, field: str, message: str) -> None:
    with pytest.raises(InvalidPolicy) as caught:
        parse(f"mode: prefer_edge\n{source}")
    assert any(field in problem.field and message in problem.message for problem in caught.value.problems)
