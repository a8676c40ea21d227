"""What a policy from elsewhere must keep of a device's own."""

import pytest

from router.defaults import default_policy
from router.floor import loosened
from router.policy import parse

DEFAULT = default_policy()


MODE = "mode: prefer_edge\n"
PRIVACY, CACHE = MODE + "privacy: ", MODE + "cache: "
LABELLED = MODE + "rules: [{name: a, when: {%s: true}, label: redact}]"
ACME = MODE + "tenants: {acme: {privacy: {personal: %s}}}"


@pytest.mark.parametrize(
    ("candidate", "own", "what"),
    [
        ("mode: prefer_cloud", MODE, None),
        ("mode: only_edge", "mode: only_edge", None),
        (MODE, "mode: only_edge", "mode: prefer_edge"),
        (PRIVACY + "{personal: edge_only}", MODE, None),
        (MODE, MODE + "label: redact", "label: free"),
        (MODE + "label: edge_only", MODE + "label: redact", None),
        (MODE, LABELLED % "tools", "rules: none labels redact what this device's own rule a does"),
        (LABELLED % "code", LABELLED % "tools", "rules: "),
        (LABELLED % "tools", LABELLED % "tools", None),
        (PRIVACY + "{personal: free}", MODE, "privacy.personal: free"),
        (PRIVACY + "{secrets: redact}", PRIVACY + "{secrets: edge_only}", "privacy.secrets"),
        (PRIVACY + "{kinds: [email]}", MODE, "privacy.kinds"),
        (PRIVACY + "{regions: [DE]}", PRIVACY + "{regions: [DE, FR]}", "privacy.regions: 1 of"),
        (MODE, PRIVACY + "{words: [Falcon]}", "privacy.words: 1 of"),
        (PRIVACY + "{words: [Falcon, Owl]}", PRIVACY + "{words: [Falcon]}", None),
        (PRIVACY + "{personal: free, secrets: free}", PRIVACY + "{personal: free, secrets: free}", None),
        (MODE, CACHE + "{shared: false}", "cache.shared"),
        (MODE, CACHE + "{enabled: false}", "cache.enabled"),
        (CACHE + "{enabled: false}", CACHE + "{shared: false}", None),
        (ACME % "free", MODE, "tenants.acme: privacy.personal"),
        (MODE, ACME % "edge_only", "tenants.acme: privacy.personal"),
        (MODE + "shadow: {privacy: {personal: free}}", MODE, None),
    ],
)
def test_what_would_be_looser_is_named(candidate: str, own: str, what: str | None) -> None:
    """For everybody and for each tenant, whoever names it; what is only tried beside the policy loosens nothing."""
    found = loosened(parse(candidate), parse(own))
    assert found is None if what is None else found is not None and found.startswith(what)


def test_a_word_of_the_device_is_not_told() -> None:
    """It may be somebody's name, and what is refused is told to the cloud."""
    found = loosened(DEFAULT, parse("mode: prefer_edge\nprivacy: {words: [Lovelace]}"))
    assert found is not None
    assert "Lovelace" not in found


def test_the_built_in_policy_is_not_looser_than_itself() -> None:
    """What nobody changed can be sent to everybody."""
    assert loosened(DEFAULT, DEFAULT) is None
