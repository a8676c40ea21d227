"""What a policy from elsewhere must keep of a device's own: `loosened` names the first thing that it would not.

Compared is what can be compared: the mode `only_edge`, labels, what happens to personal data and secrets and what is
looked for, and whether answers are kept; for everybody and for each tenant. A rule that labels must be there with the
same condition. Where rules send requests is not compared, since an expression's meaning cannot be held against
another's: what must stay here whoever writes the policy is to be labelled, by the policy or by its requests.
"""

from collections.abc import Collection, Iterator

from router.clauses import CacheRules, Rule
from router.policy import Policy
from router.privacy.kinds import KINDS
from shared.schemas import LABELS, Label


def loosened(candidate: Policy, own: Policy) -> str | None:
    """Such as `privacy.personal: free, but this device's own policy says redact`; None if nothing is."""
    for tenant in dict.fromkeys(("", *own.tenants, *candidate.tenants)):
        for what in _looser(candidate.of(tenant), own.of(tenant)):
            return f"tenants.{tenant}: {what}" if tenant else what
    return None


def _looser(candidate: Policy, own: Policy) -> Iterator[str]:
    if own.mode == "only_edge" != candidate.mode:
        yield f"mode: {candidate.mode}, but this device's own policy says only_edge"
    yield from _laxer("label", candidate.label, own.label)
    for rule in own.rules:
        if rule.label != "free" and not any(_keeps(other, rule) for other in candidate.rules):
            yield f"rules: none labels {rule.label} what this device's own rule {rule.name} does"
    theirs, ours = candidate.privacy, own.privacy
    yield from _laxer("privacy.personal", theirs.personal, ours.personal)
    yield from _laxer("privacy.secrets", theirs.secrets, ours.secrets)
    if not ours.off:
        yield from _missing("kinds", theirs.kinds or KINDS, ours.kinds or KINDS)
        yield from _missing("regions", theirs.regions, ours.regions)
        yield from _missing("words", theirs.words, ours.words)
    for name, kept in _kept(candidate.cache).items():
        if kept and not _kept(own.cache)[name]:
            yield f"cache.{name}: true, but not in this device's own policy"


def _laxer(name: str, theirs: Label, ours: Label) -> Iterator[str]:
    if LABELS.index(theirs) > LABELS.index(ours):
        yield f"{name}: {theirs}, but this device's own policy says {ours}"


def _keeps(other: Rule, rule: Rule) -> bool:
    return other.when == rule.when and LABELS.index(other.label) <= LABELS.index(rule.label)


def _missing(name: str, theirs: Collection[str], ours: Collection[str]) -> Iterator[str]:
    """Not which: a word may be somebody's name, and what is refused is told to the cloud."""
    if missing := set(ours) - set(theirs):
        yield f"privacy.{name}: {len(missing)} of this device's own policy are missing"


def _kept(rules: CacheRules) -> dict[str, bool]:
    kept = {"enabled": True, "edge_only": rules.edge_only, "shared": rules.shared}
    return {name: rules.enabled and value for name, value in kept.items()}
