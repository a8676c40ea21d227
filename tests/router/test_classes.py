"""Scenario classes: whose a request is, and when its target moves it."""

from dataclasses import replace

import pytest

from router.classes import BATCH, CHAT, GENERATION, Class
from router.decide import Decision, decide
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.observe import observe
from router.policy import InvalidPolicy, parse
from router.privacy.inspect import Privacy
from shared.errors import BadRequest
from shared.schemas import ChatRequest, Message

HELLO = (Message(role="user", content="hello"),)
CHATTING = ChatRequest(id="r", model="auto", messages=HELLO)
FLEX = ChatRequest(id="r", model="auto", messages=HELLO, priority="batch")
SPOKEN = ChatRequest(id="r", model="auto", messages=HELLO, scenario="voice")
RAW = ChatRequest(id="r", model="auto", prompt="once upon a time")
VOICE = "mode: prefer_edge\nclasses: {voice: {p50_ms: 100, p95_ms: 200, p99_ms: 400}}\n"


@pytest.mark.parametrize(
    ("request_", "policy", "asked", "scenario"),
    [
        (CHATTING, VOICE, None, Class(CHAT)),
        (FLEX, VOICE, None, Class(BATCH)),
        (RAW, VOICE, None, Class(GENERATION)),
        (FLEX, VOICE, "voice", Class("voice", guessed=False)),
        (FLEX, VOICE + "default_class: voice", None, Class("voice", guessed=False)),
        (SPOKEN, VOICE, None, Class("voice", guessed=False)),
        (SPOKEN, VOICE, CHAT, Class(CHAT, guessed=False)),
        (RAW, VOICE + "default_class: voice", CHAT, Class(CHAT, guessed=False)),
    ],
)
def test_whose_class_a_request_is(request_: ChatRequest, policy: str, asked: str | None, scenario: Class) -> None:
    """Asked for, else the policy's, else a guess that says so."""
    assert observe(request_, parse(policy), prompt_tokens=1, scenario=asked).scenario == scenario


def test_a_tenant_may_have_its_own() -> None:
    policy = parse(VOICE + "tenants: {lab: {default_class: voice}}")
    assert (policy.of("lab").default_class, policy.of("other").default_class) == ("voice", None)


@pytest.mark.parametrize("asked", ["", "zap", "voice\n", "x" * 10_000])
def test_a_class_that_there_is_not_is_refused_by_name(asked: str) -> None:
    """Where it was written is named, and what there is; the message is printable and short."""
    in_body = ChatRequest(id="r", model="auto", messages=HELLO, scenario=asked)
    with pytest.raises(BadRequest) as of_body:
        observe(in_body, parse(VOICE), prompt_tokens=1)
    assert of_body.value.param == "causeway.class"
    with pytest.raises(BadRequest, match=r"no class .*; there are real_time_chat, ") as caught:
        observe(CHATTING, parse(VOICE), prompt_tokens=1, scenario=asked)
    assert caught.value.param == "x-causeway-class"
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300


ASK = RequestFeatures(prompt_tokens=100, scenario=Class(CHAT, guessed=False))


def decided(
    policy: str = "mode: prefer_edge",
    request: RequestFeatures = ASK,
    edge: float | None = 1.4,
    cloud: float | None = 0.3,
) -> Decision:
    """With first tokens predicted to come after so many seconds."""
    device = DeviceReading(model="small", context_length=4096, prefill_tokens_per_s=edge and 100 / edge)
    return decide(request, parse(policy), device=device, link=LinkReading(first_token_s=cloud, model="large"))


@pytest.mark.parametrize(
    ("mode", "edge", "cloud", "target", "reason"),
    [
        ("prefer_edge", 1.4, 0.3, "cloud", "class real_time_chat: edge first token 1400 ms > 500 ms"),
        ("prefer_cloud", 0.2, 0.9, "edge", "class real_time_chat: cloud first token 900 ms > 500 ms"),
        ("prefer_edge", 0.5, 0.3, "edge", "mode prefer_edge"),
        ("prefer_edge", 1.4, 0.6, "edge", "mode prefer_edge"),
        ("prefer_edge", None, 0.3, "edge", "mode prefer_edge"),
        ("prefer_edge", 1.4, None, "edge", "mode prefer_edge"),
    ],
)
def test_the_side_that_makes_the_target_answers(
    mode: str, edge: float | None, cloud: float | None, target: str, reason: str
) -> None:
    """Where the standing choice would miss it and the other not; what is unknown never acts."""
    decision = decided(f"mode: {mode}", edge=edge, cloud=cloud)
    assert (decision.target, decision.reason) == (target, reason)


def test_a_guessed_class_moves_nothing() -> None:
    """A slow device alone sends nothing away."""
    assert decided(request=replace(ASK, scenario=Class(CHAT))).target == "edge"


@pytest.mark.parametrize(
    ("policy", "request_"),
    [
        ("mode: prefer_edge\nrules: [{name: here, target: edge}]", ASK),
        ("mode: only_edge", ASK),
        ("mode: prefer_edge", replace(ASK, label="edge_only")),
        ("mode: prefer_edge\nprivacy: {personal: edge_only}", replace(ASK, privacy=Privacy(("email",)))),
        ("mode: prefer_edge", replace(ASK, model="edge")),
        ("mode: prefer_edge\nclasses: {real_time_chat: {p50_ms: 1, p95_ms: 1500, p99_ms: 1500}}", ASK),
        ("mode: prefer_edge", replace(ASK, scenario=Class("of another policy", guessed=False))),
    ],
)
def test_rules_and_bars_come_first(policy: str, request_: RequestFeatures) -> None:
    """No class sends what an administrator, a label or the caller keeps here."""
    assert decided(policy, request_).target == "edge"


def test_the_goal_is_a_standing_choice_too() -> None:
    """It gives way like the mode does, and is told."""
    hard = replace(ASK, difficulty=0.9, difficult_from=0.5)
    decision = decided("mode: prefer_edge", hard, edge=0.1, cloud=2.0)
    assert decision.reasons == (
        "class real_time_chat: cloud first token 2000 ms > 500 ms",
        "goal: difficulty 0.90 >= 0.50",
    )


def test_a_condition_on_the_class() -> None:
    """In a map and in an expression."""
    for when in ("{class: [voice, real_time_chat]}", "\"class == 'real_time_chat'\""):
        decision = decided(f"mode: prefer_edge\nrules: [{{name: up, when: {when}, target: cloud}}]", edge=0.1)
        assert decision.reason == "rule up: class real_time_chat"


BULK = "mode: prefer_edge\nrules: [{name: bulk, when: {prompt_tokens: 100}, class: batch_processing}%s]"


def test_a_rule_gives_a_class() -> None:
    """Whatever was asked for; where it says no more, the others decide, and what is asked of the class is asked of that
    one: here the slow edge makes the target. The decision says which it was, for the record."""
    plain = decided(BULK % "")
    assert (plain.target, plain.reason, plain.scenario) == ("edge", "mode prefer_edge", Class(BATCH, guessed=False))
    asked = decided(BULK % ", {name: up, when: {class: batch_processing}, target: cloud}")
    assert (asked.target, asked.reason) == ("cloud", "rule up: class batch_processing")
    with_target = decided(BULK % ", {name: chat, class: real_time_chat, target: cloud}")
    assert (with_target.target, with_target.scenario.name) == ("cloud", BATCH)
    other = decided(BULK % "", request=replace(ASK, prompt_tokens=99))
    assert (other.target, other.scenario.name) == ("cloud", CHAT)


def test_a_tenants_rules_keep_the_common_classes() -> None:
    """Also where its mode leaves a rule's target out."""
    common = "mode: prefer_edge\nrules: [{name: bulk, class: batch_processing, target: cloud}]\n"
    policy = parse(common + "tenants: {lab: {mode: only_edge}}").of("lab")
    device = DeviceReading(model="small", context_length=4096)
    decision = decide(ASK, policy, device=device, link=LinkReading(model="large"))
    assert (decision.target, decision.scenario.name) == ("edge", BATCH)


@pytest.mark.parametrize(
    ("source", "field", "message"),
    [
        ("default_class: zap", "default_class", "no class zap; there are real_time_chat,"),
        ("classes: {voice: {p50_ms: 1, p95_ms: 2}}", "classes.voice.p99_ms", "is required"),
        ("classes: {voice: {p50_ms: 3, p95_ms: 2, p99_ms: 4}}", "classes.voice", "must not fall"),
        ("classes: {voice: {p50_ms: 0, p95_ms: 2, p99_ms: 4}}", "classes.voice.p50_ms", "greater than 0"),
        ("classes: {voice: {p50: 1, p95_ms: 2, p99_ms: 4}}", "classes.voice.p50", "did you mean p50_ms?"),
        ("classes: {'A b': {p50_ms: 1, p95_ms: 2, p99_ms: 4}}", "classes.A b", "must match"),
        ("tenants: {lab: {default_class: zap}}", "tenants.lab.default_class", "no class zap"),
        ("rules: [{name: a, class: zap}]", "rules[0].class", "no class zap"),
        ("tenants: {lab: {rules: [{name: a, class: zap}]}}", "tenants.lab.rules[0].class", "no class zap"),
    ],
)
def test_mistakes_are_named_where_they_stand(source: str, field: str, message: str) -> None:
    with pytest.raises(InvalidPolicy) as caught:
        parse(f"mode: prefer_edge\n{source}")
    assert any(field in problem.field and message in problem.message for problem in caught.value.problems)
