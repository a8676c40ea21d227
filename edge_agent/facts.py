"""What a GGUF file says of itself, in the words that people use: family, quantization, context, licence, template."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shared.gguf import Header, Value, check

QUANTIZATIONS: Final[Mapping[int, str]] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE",
}  # fmt: skip
"""`general.file_type` of the format."""
KV_BYTES: Final = 2
"""Of one number in the KV cache: half precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Empty or 0 where the file does not say. `kv_bytes` is what one token of context takes in the KV cache: an upper
    bound where the layers differ."""

    architecture: str
    parameters: int
    quantization: str = ""
    context_length: int = 0
    embedding_length: int = 0
    kv_bytes: int = 0
    template: str = ""
    licence: str = ""

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.template.encode()).hexdigest() if self.template else ""


def facts_of(file: Path) -> Facts:
    """Looks the file over on the way (`shared.gguf.check`). Raises ModelInvalid."""
    return _facts(check(file))


def _facts(header: Header) -> Facts:
    name = header.architecture

    def number(key: str) -> int:
        return _number(header.values.get(f"{name}.{key}".encode()))

    heads = number("attention.head_count")
    width = number("embedding_length") // heads if heads else 0
    key, value = number("attention.key_length") or width, number("attention.value_length") or width
    kv_heads = number("attention.head_count_kv") or heads
    return Facts(
        architecture=name,
        parameters=header.parameters,
        quantization=QUANTIZATIONS.get(_number(header.values.get(b"general.file_type"), missing=-1), ""),
        context_length=number("context_length"),
        embedding_length=number("embedding_length"),
        kv_bytes=number("block_count") * kv_heads * (key + value) * KV_BYTES,
        template=_text(header.values.get(b"tokenizer.chat_template")),
        licence=_text(header.values.get(b"general.license")),
    )


def _number(value: Value, missing: int = 0) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else missing


def _text(value: Value) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else ""
