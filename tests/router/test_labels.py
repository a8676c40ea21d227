"""Labels from the request, the policy, a tenant, the rules and the detector: the strictest holds."""

from itertools import product

import pytest

from router.decide import Decision, decide
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.observe import observe
from router.policy import InvalidPolicy, Policy, parse
from router.privacy.inspect import Privacy
from shared.schemas import LABELS, ChatRequest, Label, Message

DEVICE = DeviceReading(model="small", context_length=4096)
LINK = LinkReading(model="large", context_length=8192)
OFF = "privacy: {personal: free, secrets: free}\n"


def decided(policy: Policy, tenant: str = "", **request: object) -> Decision:
    features = RequestFeatures(**({"prompt_tokens": 900, "tenant": tenant} | request))  # type: ignore[arg-type]
    return decide(features, policy.of(tenant), device=DEVICE, link=LINK)


@pytest.mark.parametrize("labels", list(product(LABELS, repeat=5)))
def test_the_strictest_of_all_holds(labels: tuple[Label, ...]) -> None:
    """P-7: whoever says it: the request, the policy (or its tenant), a rule, or the policy for what was found."""
    asked, common, tenant, of_rule, found = labels
    rule = f"rules: [{{name: r, when: code, label: {of_rule}{'' if of_rule != 'free' else ', target: cloud'}}}]"
    policy = parse(
        f"mode: prefer_cloud\nlabel: {common}\nprivacy: {{personal: {found}, secrets: free}}\n{rule}\n"
        f"tenants: {{t: {{label: {tenant}}}}}"
    )
    for whose, over in (("", common), ("t", tenant)):
        decision = decided(policy, whose, label=asked, code=True, privacy=Privacy(("email",)))
        strictest = min((asked, over, of_rule, found), key=LABELS.index)
        assert decision.label == strictest
        assert decision.target == ("edge" if strictest == "edge_only" else "cloud")
        assert decision.redact is (strictest == "redact")
        assert decision.reason.isascii()


def test_a_rule_that_only_labels_does_not_end_the_search() -> None:
    """Every rule that holds gives its label, also after the one that says where to go; the reason names it."""
    policy = parse("""
mode: prefer_edge
rules:
  - {name: finance, when: {tenant: finance}, label: redact}
  - {name: long, when: {prompt_tokens: {">": 800}}, target: cloud}
  - {name: board, when: maths, label: edge_only}
""")
    assert decided(policy).rule == "rule long"
    marked = decided(policy, "finance")
    assert (marked.rule, marked.target, marked.label, marked.redact) == ("rule long", "cloud", "redact", True)
    kept = decided(policy, "finance", maths=True)
    assert (kept.target, kept.fallback, kept.label) == ("edge", None, "edge_only")
    assert kept.reason == "rule board: maths true; label edge_only: stays on the device"


def test_a_labelling_condition_that_fails_is_taken_for_the_safe_side() -> None:
    """A division by nothing labels all the same."""
    policy = parse("mode: prefer_cloud\nrules: [{name: r, when: '1 / int(battery_percent) > 5', label: edge_only}]")
    empty = DeviceReading(model="small", context_length=4096, battery_percent=0.0)
    decision = decide(RequestFeatures(prompt_tokens=9), policy, device=empty, link=LINK)
    assert (decision.target, decision.reason) == (
        "edge",
        "rule r: its condition failed; label edge_only: stays on the device",
    )


def test_a_tenants_last_word_on_targets_takes_no_label_away() -> None:
    """Its own rule for everything, or a mode that a common rule contradicts, leaves that rule's label as it was."""
    policy = parse("""
mode: prefer_cloud
rules:
  - {name: secret, when: code, target: edge, label: edge_only}
tenants:
  all: {rules: [{name: mine, target: cloud}]}
  far: {mode: only_cloud}
""")
    assert decided(policy, "all", code=True).label == "edge_only"
    assert decided(policy, "all").rule == "rule mine"
    with pytest.raises(Exception, match="nobody may answer"):
        decided(policy, "far", code=True)


def test_what_a_rule_redacts_was_looked_through() -> None:
    """A label for redaction in the policy alone makes the detector look, though it is off for what it finds."""
    request = ChatRequest(id="r", model="auto", messages=(Message(role="user", content="I am bob@example.com"),))
    for said in ("label: redact", "rules: [{name: r, when: '!code', label: redact}]"):
        policy = parse(f"mode: prefer_cloud\n{OFF}{said}")
        features = observe(request, policy, prompt_tokens=9)
        assert features.privacy.kinds == ("email",)
        assert decide(features, policy, device=DEVICE, link=LINK).redact
    assert observe(request, parse(f"mode: prefer_cloud\n{OFF}"), prompt_tokens=9).privacy.kinds == ()


@pytest.mark.parametrize(
    ("rule", "field", "message"),
    [
        ("{name: r}", "rules[0].target", "is required"),
        ("{name: r, label: free}", "rules[0].target", "is required"),
        ("{name: r, label: secret, target: edge}", "rules[0].label", "must be"),
        ("{name: r, label: redact, fallback: false}", "rules[0].fallback", "needs a target"),
        ("{name: r, target: cloud}, {name: s, label: redact}, {name: t, target: edge}", "rules[2]", "never reached"),
    ],
)
def test_rules_that_say_nothing(rule: str, field: str, message: str) -> None:
    """A rule gives a target, a label, or both."""
    with pytest.raises(InvalidPolicy, match=message) as caught:
        parse(f"mode: prefer_edge\nrules: [{rule}]")
    assert [problem.field for problem in caught.value.problems] == [field]
