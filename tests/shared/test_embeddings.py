import base64
import json
import struct

import pytest

from shared.embeddings import MAX_INPUT_TOKENS, MAX_INPUTS, Embeddings, embedding_reply, parse_embeddings
from shared.errors import BadRequest


def body(**fields) -> bytes:
    return json.dumps({"model": "m", "input": "a"} | fields).encode()


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_the_four_forms_of_input(given, inputs):
    """One text, texts, one list of tokens, lists of tokens."""
    request, encoding = parse_embeddings(body(input=given, user="u", dimensions=None), request_id="r")
    assert (request.inputs, request.dimensions, encoding) == (inputs, None, "float")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [[1], []]}, "input[1]"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [1, True]}, "input"),
        ({"input": [[1, True]]}, "input[0]"),
        ({"input": [1, -1]}, "input"),
        ({"input": [1 << 40]}, "input"),
        ({"input": 5}, "input"),
        ({"input": None}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": [1] * (MAX_INPUT_TOKENS + 1)}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"encoding_format": 1}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": -1}, "dimensions"),
        ({"dimensions": 1.5}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"dimensions": 1 << 60}, "dimensions"),
        ({"model": ""}, "model"),
        ({"user": 7}, "user"),
        ({"stream": True}, "stream"),
    ],
)
def test_bad_bodies_name_their_field(fields, param):
    """As for every other route: typed, and by the name that the client wrote."""
    with pytest.raises(BadRequest) as refused:
        parse_embeddings(body(**fields), request_id="r")
    assert refused.value.param == param


def test_base64_is_the_same_numbers_as_float32():
    """Four bytes a number, the lowest first."""
    vectors = ((0.5, -0.25, 0.1), (1.0, 0.0, -0.0))
    made = Embeddings(vectors=vectors, prompt_tokens=7)
    plain, packed = (json.loads(embedding_reply(made, "m", encoding)) for encoding in ("float", "base64"))
    assert [tuple(one["embedding"]) for one in plain["data"]] == list(vectors)
    for one, vector in zip(packed["data"], vectors, strict=True):
        assert struct.unpack("<3f", base64.b64decode(one["embedding"])) == pytest.approx(vector, abs=1e-8)
    assert [one["index"] for one in packed["data"]] == [0, 1]
    assert plain["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
