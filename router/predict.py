"""How long an answer to this prompt would take, here and in the cloud, and what it would cost: from what was measured
and written, else unknown.

`Pace` is what was learned of a side from the answers it gave.

    edge first token    those ahead get their whole answer at the device's total rate, then this prompt is prefilled
    cloud first token   a line over the prompts' lengths through what recent answers took, or their average
    total               first token, then each further token at the pace of recent answers (at the edge: of those that
                        ran beside as many others as would now)
"""

from dataclasses import dataclass
from typing import Final

from router.features import DeviceReading, LinkReading, RequestFeatures
from router.money import Price

FADE: Final = 0.95
"""What a sample counts beside the next one: the last twenty or so matter."""
MIN_TOKENS: Final = 8
"""Of an answer from which a pace can be told."""
SPREAD: Final = 0.05
"""Of the places along a line, as a share of their mean: with less, its slope would be guessed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of one side, times in seconds; None where nothing was measured to tell from."""

    first_token_s: float | None = None
    total_s: float | None = None
    """Until the last of the tokens expected of the answer."""
    cost: float | None = None
    """Of the prompt and that answer, where the policy has a price."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    edge: Prediction = Prediction()
    cloud: Prediction = Prediction()


UNMEASURED: Final = Predictions()


def predict(
    request: RequestFeatures, device: DeviceReading, link: LinkReading, price: Price | None = None
) -> Predictions:
    """`price` is what the cloud takes."""
    further = request.expected_output_tokens - 1
    cost = None if price is None else price.of(request.prompt_tokens, request.expected_output_tokens)
    return Predictions(
        edge=_whole(_edge_first(request, device), further, device.token_s),
        cloud=_whole(_cloud_first(request, link), further, link.token_s, cost),
    )


def _edge_first(request: RequestFeatures, device: DeviceReading) -> float | None:
    if not device.prefill_tokens_per_s:
        return None
    prefill = request.prompt_tokens / device.prefill_tokens_per_s
    ahead = device.queue_depth + (device.slots is not None and device.running >= device.slots)
    if not ahead:
        return prefill
    if not device.tokens_per_s:
        return None
    return ahead * request.expected_output_tokens / device.tokens_per_s + prefill


def _cloud_first(request: RequestFeatures, link: LinkReading) -> float | None:
    if link.first_token_base_s is None or link.prompt_token_s is None:
        return link.first_token_s
    seconds = link.first_token_base_s + request.prompt_tokens * link.prompt_token_s
    return max(seconds, link.round_trip_s or 0.0)


def _whole(first: float | None, further: int, token_s: float | None, cost: float | None = None) -> Prediction:
    total = None if first is None or token_s is None else first + further * token_s
    return Prediction(first_token_s=first, total_s=total, cost=cost)


@dataclass(frozen=True, slots=True)
class Line:
    """y over x by least squares, old samples fading: their weight and weighted sums."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def after(self, x: float, y: float) -> "Line":
        return Line(
            FADE * self.weight + 1,
            FADE * self.x + x,
            FADE * self.y + y,
            FADE * self.xx + x * x,
            FADE * self.xy + x * y,
        )

    def fit(self) -> tuple[float, float] | None:
        """Base and slope, neither negative (more is never faster); level while all samples lie at one place. None
        before the first."""
        if not self.weight:
            return None
        x, y = self.x / self.weight, self.y / self.weight
        variance = self.xx / self.weight - x * x
        if variance <= (SPREAD * x) ** 2 or x <= 0:
            return y, 0.0
        slope = min(max(0.0, (self.xy / self.weight - x * y) / variance), y / x)
        return y - slope * x, slope

    def at(self, x: float) -> float | None:
        fit = self.fit()
        return None if fit is None else fit[0] + fit[1] * x


@dataclass(frozen=True, slots=True)
class Pace:
    """What one side's answers took, of those that went well."""

    first_token: Line = Line()
    """Over the prompt's tokens."""
    token: Line = Line()
    """Seconds for each further token, over how many answers were under way, this one included."""

    def after(self, *, prompt_tokens: int, first_token_s: float, tokens: int, total_s: float, together: int) -> "Pace":
        token = self.token
        if tokens >= MIN_TOKENS:
            token = token.after(together, max(0.0, total_s - first_token_s) / (tokens - 1))
        return Pace(self.first_token.after(prompt_tokens, first_token_s), token)
