"""What a policy says about its cascade: which local answers are good enough, and what a model's own figures mean."""

from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from router.conditions import ModelName, Number, Written

Hold = Literal["none", "sentence", "answer"]
MAX_CALIBRATIONS: Final = 64
MARK: Final = "---\n*The device was not sure of this. The cloud's answer:*"


class Curve(Written):
    """The logistic curve from one model's signals (`router.confidence.Heard`) to the probability that it is right."""

    bias: Number = Field(description="the curve's constant; all of it is what `router calibrate` prints")
    mean_logprob: Number = Field(0.0, description="weight of the mean log probability of the answer's tokens")
    least_logprob: Number = Field(0.0, description="weight of the least likely token's log probability")
    margin: Number = Field(0.0, description="weight of the mean margin between the two likeliest tokens")
    entropy: Number = Field(0.0, description="weight of the mean entropy of the five likeliest tokens")


class AgreedCurve(Curve):
    """The same where a second sample is heard, too."""

    agreement: Number = Field(description="weight of how far the two say the same, 0 to 1")
    model: Annotated[ModelName | None, Field(description="whose the second samples were; none: the same model's")] = (
        None
    )


class Calibration(Curve):
    """Of one model, as `router calibrate` writes it."""

    digest: Annotated[
        str,
        StringConstraints(pattern=r"^[0-9a-f]{0,64}$"),
        Field(description="how the SHA-256 of the model's file begins: another quantization is another model"),
    ] = ""
    agreed: Annotated[AgreedCurve | None, Field(description="the curve where a second sample is heard, too")] = None


class SecondSample(Written):
    """Another answer to the same question, never shown: how far it agrees with the first is one more signal."""

    model: Annotated[ModelName | None, Field(description="another model of this device; none: the same one")] = None
    temperature: Annotated[float, Field(gt=0, le=2, description="at which it is drawn")] = 0.7
    max_tokens: Annotated[int, Field(ge=1, le=1024, description="of it; heard as far as the first is judged by")] = 256


class CascadeRules(Written):
    """The edge answers first, and is judged by its own probabilities. Off unless it is written."""

    threshold: Annotated[
        float, Field(gt=0, lt=1, description="an answer less likely to be right than this is the cloud's to give")
    ]
    hold: Annotated[
        Hold,
        Field(
            description="held back until judged by its first sentence, or by all of it; none: shown at once, and if "
            "its first sentence will not do, the cloud's answer follows under the mark"
        ),
    ] = "sentence"
    mark: Annotated[
        str,
        StringConstraints(min_length=1, max_length=500, strip_whitespace=True),
        Field(description="stands between the two answers, empty lines around it, where nothing is held back"),
    ] = MARK
    min_tokens: Annotated[int, Field(ge=1, le=1000, description="fewer make no first sentence")] = 8
    max_chars: Annotated[int, Field(ge=1, le=65_536, description="judged by so much of it at the latest")] = 4000
    max_s: Annotated[float, Field(gt=0, le=3600, description="held back no longer, from its first token on")] = 10.0
    second_sample: Annotated[SecondSample | None, Field(description="agreement with another sample counts, too")] = None
    calibration: Annotated[dict[ModelName, Calibration], Field(max_length=MAX_CALIBRATIONS)] = Field(
        default_factory=dict, description="by the model's name; without one, its tokens' mean probability counts"
    )

    @model_validator(mode="after")
    def _calibrated_with_its_second(self) -> Self:
        """A curve that was fitted without second samples, or with another model's, cannot say what these are worth."""
        if (second := self.second_sample) is None:
            return self
        for name, calibration in self.calibration.items():
            agreed = calibration.agreed
            if agreed is None or agreed.model != second.model:
                samples = f"second samples of {second.model}" if second.model else "second samples of its own"
                message = f"was not calibrated with {samples}: do that, or leave second_sample out"
                raise PydanticCustomError(
                    "uncalibrated", "{message}", {"message": message, "path": ("calibration", name)}
                )
        return self
