"""Text to tokens and back, through the tokenizer and the chat template that come with the model.

Everything is read from the model's own files: no network, no code from the checkpoint. Templates are run by
transformers in Jinja's immutable sandbox. Tokens turn back into text by their bytes, so that a character that several
tokens share is never shown in halves.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from shared.errors import BadRequest
from shared.gguf import ModelInvalid
from shared.guides import Vocabulary
from shared.schemas import Message, Tool
from shared.tool_formats import format_of
from shared.tool_prompts import prepared

END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "</s>")
"""Tokens that end an answer in the model families we know, whether or not the checkpoint lists them all."""


class Tokenizer:
    """Not thread-safe: one thread encodes. `token_bytes` may be read by any."""

    def __init__(self, path: Path) -> None:
        """`path` is a Hugging Face folder or a GGUF file. Raises ModelInvalid."""
        self._inner: Any = _load(path)
        self._bytes = _token_bytes(self._inner)
        written = (len(added.content) for added in self._inner.added_tokens_decoder.values())
        self._longest = max(*map(len, self._bytes), *written, 1)
        self.stop_ids = _stop_ids(self._inner, path)
        template = self._inner.chat_template
        self._template = template if isinstance(template, str) else ""
        self.tool_format = format_of(self._template)
        self.markers = {
            token: added.content.encode()
            for token, added in self._inner.added_tokens_decoder.items()
            if added.content in self.tool_format.markers
        }
        """Tokens that are markers of a tool's call, and their spelling: as text they may be nothing."""

    def encode(self, text: str) -> list[int]:
        """Tokens of raw text, with whatever the tokenizer itself puts around it; no template."""
        return list(self._inner.encode(text))

    def encode_chat(self, messages: Iterable[Message], tools: Iterable[Tool] = ()) -> list[int]:
        """Tokens of a conversation in the model's chat template, up to where the assistant speaks. Raises BadRequest if
        the model has no template or its template refuses; the reason may quote the messages, so it is not passed on."""
        if not self._inner.chat_template:
            raise BadRequest("this model has no chat template: send a prompt", param="messages")
        native = re.search(r"\btools\b", self._template) is not None
        values, offered = prepared(tuple(messages), tuple(tools), self.tool_format, native=native)
        try:
            text = self._inner.apply_chat_template(
                values, tools=offered or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise BadRequest("the model's chat template does not accept these messages", param="messages") from error
        return list(self._inner.encode(text, add_special_tokens=False))

    @property
    def vocabulary(self) -> Vocabulary:
        """All that a grammar needs to know of it: here control tokens are spelled too."""
        added = self._inner.added_tokens_decoder.items()
        spelled = {token: one.content.encode() for token, one in added if one.special or token in self.markers}
        pieces = [spelled.get(token, piece) for token, piece in enumerate(self._bytes)]
        spell = self._inner.backend_tokenizer
        return Vocabulary(
            pieces, spelled.keys(), self.stop_ids, lambda text: spell.encode(text, add_special_tokens=False).ids
        )

    def least_tokens(self, characters: int) -> int:
        """A lower bound, without work, on the tokens that so many characters of text make."""
        return characters // self._longest

    def token_bytes(self, token: int) -> bytes:
        """What a token adds to the text: nothing for control tokens and ids beyond the vocabulary."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else b""


class Detokenizer:
    """Turns tokens into text one by one; half a character waits for its other half. `shown` are tokens that are spelled
    otherwise than by the vocabulary."""

    def __init__(self, tokenizer: Tokenizer, shown: Mapping[int, bytes] | None = None) -> None:
        self._tokenizer = tokenizer
        self._shown = shown or {}
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._shown.get(token) or self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The end: bytes that never became a character are shown as U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _load(path: Path) -> Any:
    folder, extra = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    try:
        inner = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **extra)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelInvalid(f"{path.name} has no tokenizer that can be read", param="model") from error
    if not getattr(inner, "is_fast", False):
        raise ModelInvalid(f"{path.name} has no tokenizer.json, and a slow tokenizer is not supported", param="model")
    return inner


def _stop_ids(inner: Any, path: Path) -> frozenset[int]:
    """The tokenizer's end token, those of `generation_config.json`, and the known ones that are control tokens here."""
    ids = {inner.eos_token_id}
    file = path / "generation_config.json"
    if path.is_dir() and file.exists():
        listed = json.loads(file.read_bytes()).get("eos_token_id")
        ids.update(listed if isinstance(listed, list) else [listed])
    ids.update(token for token, added in inner.added_tokens_decoder.items() if added.content in END_TOKENS)
    return frozenset(token for token in ids if token is not None)


def _token_bytes(inner: Any) -> list[bytes]:
    """The bytes of every token, for the two ways in which vocabularies spell bytes: GPT-2's alphabet of printable
    characters for all 256, or text with U+2581 for a space and <0xNN> for what no piece covers."""
    decoder = json.loads(inner.backend_tokenizer.decoder.__getstate__())
    kinds = {decoder["type"], *(part["type"] for part in decoder.get("decoders", ()))}
    spell: Callable[[str], bytes]
    if "ByteLevel" in kinds:
        spell = partial(_byte_level, _byte_alphabet())
    elif "ByteFallback" in kinds:
        spell = _sentencepiece
    else:
        raise ModelInvalid(f"the tokenizer's decoder {decoder['type']} is not supported", param="model")
    table = [b""] * len(inner)
    for piece, token in inner.get_vocab().items():
        if token < len(table):
            table[token] = spell(piece)
    for token, added in inner.added_tokens_decoder.items():
        if token < len(table):
            table[token] = b"" if added.special else added.content.encode()
    return table


def _byte_level(alphabet: Mapping[str, int], piece: str) -> bytes:
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: the printable ones of Latin-1 as themselves, the others from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
