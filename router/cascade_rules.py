"""What a policy says about its cascade: which local answers are good enough, and what a model's own figures mean."""

from typing import Annotated, Final, Literal

from pydantic import Field, StringConstraints

from router.conditions import ModelName, Number, Written

Hold = Literal["sentence", "answer"]
MAX_CALIBRATIONS: Final = 64


class Calibration(Written):
    """The logistic curve from one model's signals (`router.confidence.Heard`) to the probability that it is right; as
    `router calibrate` writes it."""

    digest: Annotated[
        str,
        StringConstraints(pattern=r"^[0-9a-f]{0,64}$"),
        Field(description="how the SHA-256 of the model's file begins: another quantization is another model"),
    ] = ""
    bias: Number
    mean_logprob: Number = 0.0
    least_logprob: Number = 0.0
    margin: Number = 0.0
    entropy: Number = 0.0


class CascadeRules(Written):
    """The edge answers first, and is held back until it is known whether that will do. Off unless it is written."""

    threshold: Annotated[
        float, Field(gt=0, lt=1, description="an answer less likely to be right than this is the cloud's to give")
    ]
    hold: Annotated[Hold, Field(description="judged by its first sentence, or by all of it")] = "sentence"
    min_tokens: Annotated[int, Field(ge=1, le=1000, description="fewer make no first sentence")] = 8
    max_chars: Annotated[int, Field(ge=1, le=65_536, description="judged by so much of it at the latest")] = 4000
    max_s: Annotated[float, Field(gt=0, le=3600, description="held back no longer, from its first token on")] = 10.0
    calibration: Annotated[dict[ModelName, Calibration], Field(max_length=MAX_CALIBRATIONS)] = Field(
        default_factory=dict, description="by the model's name; without one, its tokens' mean probability counts"
    )
