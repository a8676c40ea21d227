import pytest

from router.clauses import Rule
from router.conditions import Range, When
from router.facts import FACTS, Case
from router.features import NO_CLOUD, DeviceReading, LinkReading, RequestFeatures
from router.policy import Policy

REQUEST = RequestFeatures(
    prompt_tokens=1200, max_tokens=300, expected_output_tokens=200, turns=3, code=True, json=True, bucket=7.25
)
DEVICE = DeviceReading(
    model="small",
    context_length=1400,
    queue_depth=2,
    queue_capacity=8,
    running=4,
    tokens_per_s=100.0,
    prefill_tokens_per_s=400.0,
    battery_percent=55.5,
    on_battery=True,
    battery_j=72_000.0,
    work_w=15.0,
    radio_w=1.0,
    cpu_percent=80.0,
    cpu_percent_others=20.0,
    memory_available=512_000_000,
    temperature_c=71.5,
    online=True,
    metered=False,
    token_s=0.02,
    weekday="tue",
    hour=13.5,
)
LINK = LinkReading(
    round_trip_s=0.05, first_token_s=0.4, token_s=0.01, failure_ratio=0.25, model="large", context_length=8192
)
BARE = DeviceReading(model="small", context_length=1400)


def case(*rules: Rule, request=REQUEST, device=DEVICE, link=LINK) -> Case:
    return Case(request, Policy(mode="prefer_edge", rules=rules), device, link)


def test_every_condition_has_its_fact():
    """A condition that can be written can be evaluated, and nothing is measured that cannot be asked for."""
    assert set(FACTS) == {field.alias or name for name, field in When.model_fields.items()}


@pytest.mark.parametrize(
    ("name", "value", "unknown"),
    [
        ("prompt_tokens", 1200, 1200),
        ("expected_output_tokens", 200, 200),
        ("turns", 3, 3),
        ("code", True, True),
        ("maths", False, False),
        ("json", True, True),
        ("tools", False, False),
        ("label", "free", "free"),
        ("class", "real_time_chat", "real_time_chat"),
        ("model", "auto", "auto"),
        ("fits_edge", False, False),
        ("fits_cloud", True, None),
        ("queue_depth", 2, 0),
        ("running", 4, 0),
        ("edge_first_token_ms", 7000.0, None),
        ("cloud_first_token_ms", 400.0, None),
        ("round_trip_ms", 50.0, None),
        ("battery_percent", 55.5, None),
        ("on_battery", True, None),
        ("cpu_percent", 80.0, None),
        ("cpu_percent_others", 20.0, None),
        ("memory_available_mb", 512.0, None),
        ("temperature_c", 71.5, None),
        ("online", True, None),
        ("metered", False, None),
        ("edge_total_ms", 10_980.0, None),
        ("cloud_total_ms", 2390.0, None),
        ("cloud_failure_ratio", 0.25, None),
        ("cloud_cost", None, None),
        ("edge_battery_percent", 100 * 15.0 * (3 + 199 * 0.02) / 5 / 72_000, None),
        ("cloud_battery_percent", 100 * 1.0 * 2.39 / 72_000, None),
        ("spent_today", None, None),
        ("tenant_spent_today", None, None),
        ("key_spent_today", None, None),
        ("weekday", "tue", None),
        ("hour", 13.5, None),
        ("bucket", 7.25, 7.25),
    ],
)
def test_facts(name, value, unknown):
    """Each condition reads its own value, and None where nothing was measured."""
    assert FACTS[name](case()) == (pytest.approx(value) if type(value) is float else value)
    assert FACTS[name](case(device=BARE, link=NO_CLOUD)) == unknown


@pytest.mark.parametrize(
    ("device", "seconds"),
    [
        (DeviceReading(model="s", context_length=1, prefill_tokens_per_s=400.0), 3.0),
        (DeviceReading(model="s", context_length=1, prefill_tokens_per_s=400.0, queue_depth=1), None),
        (DeviceReading(model="s", context_length=1, tokens_per_s=100.0, queue_depth=1), None),
        (DeviceReading(model="s", context_length=1, prefill_tokens_per_s=400.0, tokens_per_s=50.0, queue_depth=1), 7.0),
        (DeviceReading(model="s", context_length=1, prefill_tokens_per_s=0.0), None),
    ],
)
def test_edge_first_token(device, seconds):
    """Those waiting are answered first (200 tokens each), then 1,200 tokens prefilled; unmeasured is unknown."""
    assert case(device=device).predictions.edge.first_token_s == seconds


@pytest.mark.parametrize(
    ("when", "reason"),
    [
        (When(), "always"),
        (When(prompt_tokens=Range(**{">": 800})), "prompt_tokens 1200 > 800"),
        (When(prompt_tokens=Range(**{">": 1200})), None),
        (When(code=True, maths=False), "code true, maths false"),
        (When(code=True, maths=True), None),
        (When(model=("auto", "x")), "model auto"),
        (When(model=("x",)), None),
        (When(label="free"), "label free"),
        (When(label="edge_only"), None),
        (When(json=True), "json true"),
        (When(battery_percent=Range(**{">=": 50, "<": 60})), "battery_percent 55.5 >= 50 and < 60"),
        (When(round_trip_ms=Range(**{"<": 60}), fits_edge=False), "fits_edge false, round_trip_ms 50 < 60"),
    ],
)
def test_conditions(when, reason):
    """All conditions must hold, and the reason shows each with what was measured."""
    match = case(Rule(name="r", when=when, target="cloud")).match
    assert (match and match.reason) == (reason and f"rule r: {reason}")


@pytest.mark.parametrize(
    "when",
    [
        When(round_trip_ms=Range(**{"<": 1e9})),
        When(battery_percent=Range(**{">=": 0})),
        When(on_battery=False),
        When(fits_cloud=False),
    ],
)
def test_what_is_not_measured_holds_for_no_condition(when):
    """An unknown is neither large nor small, neither true nor false."""
    assert case(Rule(name="r", when=when, target="cloud"), device=BARE, link=NO_CLOUD).match is None


def test_no_fact_is_read_twice_or_in_vain(monkeypatch):
    """A fact that several rules ask for is worked out once, and none after a condition of the rule that fails."""
    read = []
    for name in ("maths", "code", "turns"):
        monkeypatch.setitem(FACTS, name, lambda case, name=name: read.append(name) or getattr(case.request, name))
    rules = (
        Rule(name="a", when=When(code=False, maths=False), target="edge"),
        Rule(name="b", when=When(code=True, turns=Range(**{"==": 3})), target="edge"),
    )
    match = case(*rules).match
    assert match is not None
    assert (match.rule.name, read) == ("b", ["code", "turns"])


def test_the_first_rule_that_holds_applies():
    """Order is the administrator's way to say what matters more."""
    rules = (
        Rule(name="no", when=When(maths=True), target="edge"),
        Rule(name="first", when=When(code=True), target="cloud"),
        Rule(name="second", when=When(code=True), target="edge"),
    )
    match = case(*rules).match
    assert match is not None
    assert match.rule.name == "first"


def test_rules_for_the_cloud_do_not_see_edge_only_requests():
    """Such a request is looked at by the next rule instead."""
    request = RequestFeatures(prompt_tokens=1, label="edge_only")
    rules = (Rule(name="up", when=When(label="edge_only"), target="cloud"), Rule(name="down", target="edge"))
    match = case(*rules, request=request).match
    assert match is not None
    assert match.rule.name == "down"
