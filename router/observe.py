"""All that is measured of one request under one policy. What the policy does not ask about is not computed."""

import functools
import hashlib
import math
from typing import Final

from router.classes import class_of
from router.clauses import Goal
from router.difficulty import Difficulty, Outlook, shipped_difficulty
from router.document import Path, read
from router.features import RequestFeatures, measure
from router.money import NOTHING_SPENT, Spent
from router.policy import InvalidPolicy, Override, Policy, parse
from router.privacy.inspect import CLEAN, inspect
from router.weights import InvalidWeights
from shared.schemas import ChatRequest

BUCKETS: Final = 10_000


def observe(
    request: ChatRequest,
    policy: Policy,
    *,
    prompt_tokens: int,
    tenant: str = "",
    key: str = "",
    spent: Spent = NOTHING_SPENT,
    scenario: str | None = None,
) -> RequestFeatures:
    """`prompt_tokens` is the tokenizer's count of the whole templated prompt, or `estimate_tokens(request)`. Takes well
    under a millisecond for a short prompt; the first call makes the detector or reads the difficulty's weights.

    `scenario` is the class that the caller asked for beside the request. Raises BadRequest if the policy has no class
    of the name that was asked for.
    """
    looked_through = policy.asks_privacy or request.label == "redact"
    difficulty, difficult_from = _difficulty(request, policy.goal) if policy.asks_difficulty else (None, None)
    return measure(
        request,
        prompt_tokens=prompt_tokens,
        expected_output_tokens=policy.expected_output_tokens,
        privacy=inspect(request, policy.privacy.detector) if looked_through else CLEAN,
        difficulty=difficulty,
        difficult_from=difficult_from,
        tenant=tenant,
        key=key,
        bucket=bucket(request) if policy.asks_bucket else None,
        spent=spent,
        scenario=class_of(request, scenario, policy.default_class, policy.targets),
    )


def usable(source: str | bytes, *, name: str) -> Policy:
    """The policy written in `source`, as `parse` reads it. Raises InvalidPolicy, too, where it asks for a difficulty
    that cannot be measured here: nobody could keep its goal."""
    policy = parse(source, name=name)
    if (field := _asking(policy)) is not None:
        try:
            shipped_difficulty()
        except InvalidWeights as error:
            what = f"needs the difficulty, which cannot be measured here: {error.message}; install Causeway again"
            raise InvalidPolicy(name, (read(source, name=name).problem(field, what),)) from None
    return policy


def _asking(policy: Policy) -> Path | None:
    """Where it first asks for a difficulty."""
    parts: list[tuple[Path, Policy | Override | None]] = [((), policy), (("shadow",), policy.shadow)]
    parts += [(("tenants", name), override) for name, override in policy.tenants.items()]
    for path, part in parts:
        if part is None:
            continue
        for field in ("goal", "weights"):
            if getattr(part, field) is not None:
                return (*path, field)
        for number, rule in enumerate(part.rules):
            if "difficulty" in rule.when.asked:
                return (*path, "rules", number, "when")
    return None


def bucket(request: ChatRequest) -> float:
    """A number in [0, 100), the same for every request of a conversation: a hash of how it began."""
    began = next((message.content for message in request.messages if message.role == "user"), request.prompt or "")
    digest = hashlib.blake2b(began.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) % BUCKETS * 100 / BUCKETS


def _difficulty(request: ChatRequest, goal: Goal | None) -> tuple[float | None, float | None]:
    """Of the last thing the user said, and from where on the goal sends a request to the cloud. Unknown if the weights
    cannot be used: then no rule that asks for it applies, and the goal decides nothing."""
    try:
        model = shipped_difficulty()
    except InvalidWeights:
        return None, None
    said = next((message.content for message in reversed(request.messages) if message.role == "user"), "")
    score = model.score([request.prompt or said])[0]
    if not math.isfinite(score):
        return None, None
    return score, None if goal is None else _threshold(goal.cloud_share, goal.quality)


@functools.lru_cache(64)
def _threshold(cloud_share: float | None, quality: float | None) -> float:
    """The difficulty that achieves such a goal, by the shipped weights."""
    return outlook(Goal(cloud_share=cloud_share, quality=quality), shipped_difficulty()).threshold


def outlook(goal: Goal, model: Difficulty) -> Outlook:
    """Where the goal puts the threshold, and what that should bring."""
    return model.at_share(goal.cloud_share) if goal.cloud_share else model.at_recovery(goal.quality or 1.0)
