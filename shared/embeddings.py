"""OpenAI's `embeddings`: its body read strictly (see `shared.openai`), and the reply."""

import sys
from array import array
from base64 import b64encode
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec

from shared.bodies import EmbeddingBody
from shared.errors import BadRequest
from shared.openai import json_object, read_fields

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000
"""Of all inputs of a request."""
MAX_DIMENSIONS = 1 << 20

Encoding = Literal["float", "base64"]


class EmbeddingRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Texts, or their tokens, to be turned into vectors; with `dimensions`, only the first so many numbers of each."""

    id: str
    model: str
    inputs: tuple[str | tuple[int, ...], ...]
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.model) <= 256:
            raise BadRequest("model must have 1 to 256 characters", param="model")
        if not 0 < len(self.inputs) <= MAX_INPUTS:
            raise BadRequest(f"there must be 1 to {MAX_INPUTS} inputs", param="input")
        for at, one in enumerate(self.inputs):
            if not one:
                raise BadRequest("an input must not be empty", param=f"input[{at}]")
        if sum(len(one) for one in self.inputs if not isinstance(one, str)) > MAX_INPUT_TOKENS:
            raise BadRequest(f"the inputs must have at most {MAX_INPUT_TOKENS} tokens", param="input")
        if self.dimensions is not None and not 0 < self.dimensions <= MAX_DIMENSIONS:
            raise BadRequest("dimensions must be positive, and at most the model's own", param="dimensions")

    @property
    def size(self) -> int:
        """Characters of the texts, and tokens."""
        return sum(map(len, self.inputs))


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """A vector of length 1 for each input, in order; `prompt_tokens` of all inputs."""

    vectors: tuple[tuple[float, ...], ...]
    prompt_tokens: int


class Embed(Protocol):
    """Who answers a request for embeddings. Raises CausewayError; cancelled, it stops costing compute."""

    async def __call__(self, request: EmbeddingRequest, /) -> Embeddings: ...


def parse_embeddings(body: bytes, *, request_id: str) -> tuple[EmbeddingRequest, Encoding]:
    """Read the body of `POST /v1/embeddings`. Raises BadRequest naming the field (`param`)."""
    fields = read_fields(json_object(body), EmbeddingBody, {})
    if fields.encoding_format not in ("float", "base64"):
        raise BadRequest("encoding_format must be float or base64", param="encoding_format")
    request = EmbeddingRequest(
        id=request_id, model=fields.model, inputs=_inputs(fields.input), dimensions=fields.dimensions
    )
    return request, "base64" if fields.encoding_format == "base64" else "float"


def _inputs(given: str | list[Any]) -> tuple[str | tuple[int, ...], ...]:
    """One text, one list of tokens, or a list of either kind."""
    if isinstance(given, str):
        return (given,)
    if given and all(type(one) is int for one in given):
        return (_tokens(given, "input"),)
    texts = all(isinstance(one, str) for one in given)
    if not texts and not all(isinstance(one, list) for one in given):
        raise BadRequest("input must be a text, a list of tokens, or a list of either", param="input")
    return tuple(given) if texts else tuple(_tokens(one, f"input[{at}]") for at, one in enumerate(given))


def _tokens(given: list[Any], where: str) -> tuple[int, ...]:
    if not all(type(one) is int and 0 <= one < 1 << 31 for one in given):
        raise BadRequest("a token must be its id, an integer that is not negative", param=where)
    return tuple(given)


def embedding_reply(made: Embeddings, model: str, encoding: Encoding) -> bytes:
    """The response's body."""
    data = [
        {"object": "embedding", "index": at, "embedding": _base64(vector) if encoding == "base64" else vector}
        for at, vector in enumerate(made.vectors)
    ]
    usage: Mapping[str, int] = {"prompt_tokens": made.prompt_tokens, "total_tokens": made.prompt_tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})


def _base64(vector: tuple[float, ...]) -> str:
    """Little-endian float32, one after the other."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return b64encode(numbers.tobytes()).decode("ascii")
