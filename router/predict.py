"""How long an answer to this prompt would take, here and in the cloud, and what it would cost: from what was measured
and written, else unknown.

`Pace` is what was learned of a side from the answers it gave.

    edge first token    those ahead get their whole answer at the device's total rate, then this prompt is prefilled
    cloud first token   a line over the prompts' lengths through what recent answers took, or their average; and what
                        losses on the way are expected to add
    total               first token, then each further token at the pace of recent answers (at the edge: of those that
                        ran beside as many others as would now)
    battery             at the edge what the model's work draws, for as long as this one's takes, shared with those that
                        run beside it; for the cloud what the radio draws until the answer is there
"""

import math
from dataclasses import dataclass
from typing import Final

from router.features import DeviceReading, LinkReading, RequestFeatures, Trouble
from router.money import Price

FADE: Final = 0.95
"""What a sample counts beside the next one: the last twenty or so matter."""
MIN_TOKENS: Final = 8
"""Of an answer from which a pace can be told."""
FIRST_PIECES: Final = 1
"""What is waited for with nothing sent behind it: the first token. A piece with others behind it is soon missed."""
ALL_PIECES: Final = 2
"""The same of a whole answer: its last piece, too."""
MOST_LOSS: Final = 0.4
"""As much as is reckoned with: at half, waits that double would never end."""
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
    battery_percent: float | None = None
    """What the answer would take of the charge that is left; 0 where the device is plugged in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    edge: Prediction = Prediction()
    cloud: Prediction = Prediction()


UNMEASURED: Final = Predictions()


def predict(
    request: RequestFeatures, device: DeviceReading, link: LinkReading, price: Price | None = None
) -> Predictions:
    """`price` is what the cloud takes."""
    return Predictions(edge=_edge(request, device), cloud=_cloud(request, device, link, price))


def _edge(request: RequestFeatures, device: DeviceReading) -> Prediction:
    if not device.prefill_tokens_per_s:
        return Prediction()
    prefill, wait = request.prompt_tokens / device.prefill_tokens_per_s, _wait(request, device)
    work = None if device.token_s is None else prefill + (request.expected_output_tokens - 1) * device.token_s
    beside = device.running if device.slots is None else min(device.running, device.slots - 1)
    return Prediction(
        first_token_s=None if wait is None else wait + prefill,
        total_s=None if wait is None or work is None else wait + work,
        battery_percent=_drained(device, device.work_w, None if work is None else work / (beside + 1)),
    )


def _wait(request: RequestFeatures, device: DeviceReading) -> float | None:
    ahead = device.queue_depth + (device.slots is not None and device.running >= device.slots)
    if not ahead:
        return 0.0
    return ahead * request.expected_output_tokens / device.tokens_per_s if device.tokens_per_s else None


def _cloud(request: RequestFeatures, device: DeviceReading, link: LinkReading, price: Price | None) -> Prediction:
    first, tokens, trouble = _cloud_first(request, link), request.expected_output_tokens, link.trouble
    total = None if first is None or link.token_s is None else first + (tokens - 1) * link.token_s
    if first is not None:
        first += lateness_s(trouble, first, FIRST_PIECES)
    if total is not None:
        total += lateness_s(trouble, total, ALL_PIECES)
    return Prediction(
        first_token_s=first,
        total_s=total,
        cost=None if price is None else price.of(request.prompt_tokens, tokens),
        battery_percent=_drained(device, device.radio_w, total),
    )


def lateness_s(trouble: Trouble, seconds: float, pieces: int) -> float:
    """What losses add on average to what takes `seconds` without them and waits for so many pieces.

    A piece that is lost comes later by the time for sending again, twice that if it is lost again, and so on (RFC 6298,
    5.5). The connection breaks at its rate, as often in each second as in any other, and then costs a new one.
    """
    late = 0.0
    if trouble.loss and trouble.resend_s:
        loss = min(trouble.loss, MOST_LOSS)
        late = pieces * trouble.resend_s * loss / (1 - 2 * loss)
    if trouble.cuts_per_s and trouble.reconnect_s:
        late += -math.expm1(-trouble.cuts_per_s * seconds) * trouble.reconnect_s
    return late


def _drained(device: DeviceReading, watts: float | None, seconds: float | None) -> float | None:
    """In percent of the charge that is left."""
    if not device.on_battery:
        return None if device.on_battery is None else 0.0
    if watts is None or seconds is None or not device.battery_j:
        return None
    return 100 * watts * seconds / device.battery_j


def _cloud_first(request: RequestFeatures, link: LinkReading) -> float | None:
    if link.first_token_base_s is None or link.prompt_token_s is None:
        return link.first_token_s
    seconds = link.first_token_base_s + request.prompt_tokens * link.prompt_token_s
    return max(seconds, link.round_trip_s or 0.0)


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
