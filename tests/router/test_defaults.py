from dataclasses import replace
from pathlib import Path

import pytest

from router.decide import decide
from router.defaults import default_policy
from router.features import NO_CLOUD, DeviceReading, LinkReading, measure
from router.policy import parse
from shared.schemas import ChatRequest, Message

DEPLOYED = Path(__file__).parents[2] / "deploy" / "policy.yaml"
DEVICE = DeviceReading(model="small", context_length=2048)
LINK = LinkReading(round_trip_s=0.02, model="large", context_length=8192)


def ask(text: str):
    request = ChatRequest(id="r", model="auto", messages=(Message(role="user", content=text),))
    return measure(request, prompt_tokens=len(text) // 4 + 10)


@pytest.mark.parametrize("policy", [default_policy(), parse(DEPLOYED.read_bytes())], ids=["default", "deployed"])
@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("Name three rivers.", "edge"),
        ("Summarise this: " + "word " * 1000, "cloud"),
        ("Solve the equation 3x + 5 = 20", "cloud"),
        ("```python\nprint(1)\n```\nWhat does it print?", "cloud"),
    ],
)
def test_shipped_policies_send_easy_requests_to_the_edge_and_hard_ones_away(policy, text, target):
    """What a newcomer sees first: small talk stays, long texts, mathematics and code are offloaded."""
    assert decide(ask(text), policy, device=DEVICE, link=LINK).target == target


@pytest.mark.parametrize("policy", [default_policy(), parse(DEPLOYED.read_bytes())], ids=["default", "deployed"])
def test_shipped_policies_work_without_a_cloud(policy):
    """A device alone answers all that fits it."""
    assert decide(ask("Solve 3x = 20"), policy, device=DEVICE, link=NO_CLOUD).target == "edge"


def test_the_deployed_policy_keeps_tool_results():
    """Its firm rule holds even while the device is busy, so the cloud is no fallback."""
    features = replace(ask("weather?"), tools=True)
    decision = decide(features, parse(DEPLOYED.read_bytes()), device=DEVICE, link=LINK)
    assert (decision.target, decision.rule) == ("edge", "rule tool-results-stay-here")


def test_the_default_policy_is_a_mild_one():
    """It prefers the device and lets it stand in for the cloud."""
    policy = default_policy()
    assert (policy.mode, policy.fallback) == ("prefer_edge", "edge")
