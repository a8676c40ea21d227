"""How sure the local model was of what it said: signals from its own token probabilities, and from them the probability
that the answer is right. Values only, and no text is kept in them.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from router.answer import final_answer
from router.cascade_rules import Calibration, CascadeRules, Curve
from router.heads import logistic
from shared.schemas import Delta, ModelCard, TokenLogprob

ALTERNATIVES: Final = 5
"""Likeliest tokens that margin and entropy are made of."""
FLOOR: Final = -30.0
"""No log probability counts for less."""

Flaw = Literal["", "is empty", "repeats itself", "is not the JSON asked for"]
"""What no probability can make good."""

_SENTENCE: Final = re.compile(r"""(?<![\d\s.])[.!?\u2026]["')\]]{0,3}\s|[\u3002\uff01\uff1f]|(?<=\S)\n""")
_WORD: Final = re.compile(r"\w+")
_NUMBER: Final = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*")
_RUN: Final = 4
_LEAST_WORDS: Final = 32
_LEAST_DISTINCT: Final = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """An answer, or its beginning, in numbers; means are over its tokens. Natural logarithms, before temperature."""

    tokens: int = 0
    """Those whose probability is known."""
    chars: int = 0
    whole: bool = False
    mean_logprob: float = 0.0
    least_logprob: float = 0.0
    margin: float = 0.0
    """Probability of the likeliest token less that of the next."""
    entropy: float = 0.0
    """Of the likeliest tokens, all others as one; in nats."""
    agreement: float | None = None
    """How far a second sample says the same, 0 to 1; None where none was heard."""
    flaw: Flaw = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """`p`: the probability that the answer is right; None where there was nothing to judge by."""

    heard: Heard
    p: float | None
    threshold: float
    calibrated: bool = False
    """By outcomes of this very model; else `p` is the geometric mean of its tokens' probabilities."""

    @property
    def good(self) -> bool:
        return not self.heard.flaw and (self.p is None or self.p >= self.threshold)

    @property
    def said(self) -> str:
        """Fit for a reply header, like `cascade: p 0.31 < 0.60`."""
        if self.heard.flaw:
            return f"cascade: the local answer {self.heard.flaw}"
        if self.p is None:
            return "cascade: nothing to judge by"
        # Rounded away from each other: 0.5999 is not shown as 0.60 < 0.60.
        p = (math.ceil if self.good else math.floor)(self.p * 100) / 100
        known = "" if self.calibrated else " (uncalibrated)"
        return f"cascade: p {p:.2f} {'>=' if self.good else '<'} {self.threshold:.2f}{known}"


class Tally:
    """What of one answer has come so far. Whoever pushes bounds it."""

    def __init__(self) -> None:
        self._text = self._called = ""
        self._whole = self.sentence = False
        self._chars = self._tokens = 0
        self._logprob = self._margin = self._entropy = 0.0
        self._least = 0.0

    def push(self, delta: Delta) -> None:
        start = max(0, len(self._text) - 4)
        self._text += delta.text
        self._chars += len(delta.text) + sum(len(piece.arguments) for piece in delta.tool_calls)
        for piece in delta.tool_calls:
            self._called += f" {piece.name} {piece.arguments}" if piece.name else piece.arguments
        self._whole = delta.finish_reason is not None
        self.sentence = self.sentence or _SENTENCE.search(self._text, start) is not None
        for token in delta.logprobs:
            self._take(token)

    def enough(self, rules: CascadeRules, waited_s: float) -> bool:
        """Whether to judge now, `waited_s` after the first of it came."""
        if self._whole or self._chars >= rules.max_chars or waited_s >= rules.max_s:
            return True
        return rules.hold != "answer" and self.sentence and self._tokens >= rules.min_tokens

    @property
    def said(self) -> str:
        """What it says and calls."""
        return self._text + self._called

    def heard(self, *, as_json: bool = False, agreed: float | None = None) -> Heard:
        """`as_json`: that is what was asked for; `agreed`: how far another sample says the same."""
        count = max(1, self._tokens)
        return Heard(
            tokens=self._tokens,
            chars=self._chars,
            whole=self._whole,
            mean_logprob=self._logprob / count,
            least_logprob=self._least,
            margin=self._margin / count,
            entropy=self._entropy / count,
            agreement=agreed,
            flaw=self._flaw(as_json),
        )

    def _take(self, token: TokenLogprob) -> None:
        logprob = max(token.logprob, FLOOR)
        self._tokens += 1
        self._logprob += logprob
        self._least = min(self._least, logprob)
        shares = [math.exp(min(one.logprob, 0.0)) for one in token.top] or [math.exp(min(logprob, 0.0))]
        self._margin += shares[0] - (shares[1] if len(shares) > 1 else 0.0)
        self._entropy += _entropy((*shares, max(0.0, 1 - sum(shares))))

    def _flaw(self, as_json: bool) -> Flaw:
        if not self._called:
            if self._whole and not self._text.strip():
                return "is empty"
            if self._whole and as_json and not _is_json(self._text):
                return "is not the JSON asked for"
        return "repeats itself" if _repeats(self._text) else ""


def judge(heard: Heard, rules: CascadeRules, card: ModelCard) -> Judged:
    """Under the calibration that the policy has for this model, if it has one for these very bytes of it."""
    calibration = rules.calibration.get(card.id)
    if calibration is not None and not card.digest.startswith(calibration.digest):
        calibration = None
    return Judged(
        heard=heard,
        p=probability(heard, calibration) if heard.tokens else None,
        threshold=rules.threshold,
        calibrated=calibration is not None,
    )


def probability(heard: Heard, calibration: Calibration | None) -> float:
    """That the answer is right: the calibration's logistic curve over the signals; without one, the geometric mean of
    the tokens' probabilities or, where a second sample was heard, the mean of that and of the agreement."""
    if calibration is None:
        fluent = math.exp(min(heard.mean_logprob, 0.0))
        return fluent if heard.agreement is None else (fluent + heard.agreement) / 2
    agreed = calibration.agreed
    if agreed is None or heard.agreement is None:
        return logistic(_weighed(heard, calibration))
    return logistic(_weighed(heard, agreed) + agreed.agreement * heard.agreement)


def agreement(one: str, other: str) -> float:
    """How far two answers to one question say the same, 0 to 1: the share of words that they have in common; where both
    come down to a number, half of it is whether that is the same."""
    words = [Counter(_WORD.findall(text.casefold())) for text in (one, other)]
    total = words[0].total() + words[1].total()
    overlap = 2 * (words[0] & words[1]).total() / total if total else 1.0
    numbers = [_NUMBER.findall(final_answer(text)) for text in (one, other)]
    if not all(numbers):
        return overlap
    same: bool = numbers[0][-1].replace(",", "") == numbers[1][-1].replace(",", "")
    return (overlap + same) / 2


def _weighed(heard: Heard, curve: Curve) -> float:
    return (
        curve.bias
        + curve.mean_logprob * heard.mean_logprob
        + curve.least_logprob * heard.least_logprob
        + curve.margin * heard.margin
        + curve.entropy * heard.entropy
    )


def _entropy(shares: Iterable[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share > 0)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _repeats(text: str) -> bool:
    """Few of its runs of words are said only once."""
    words = text.split()
    if len(words) < _LEAST_WORDS:
        return False
    runs = list(zip(*(words[at:] for at in range(_RUN)), strict=False))
    return len(set(runs)) < _LEAST_DISTINCT * len(runs)
