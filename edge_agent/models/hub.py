"""A model hub: where its files are, and which of them to take when a user names none.

`HF_ENDPOINT` says which hub and `HF_TOKEN` who asks, as for the hub's own tools; the token is sent to that hub alone.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlsplit

import msgspec

from edge_agent.errors import SourceMissing
from edge_agent.models.sources import Hub, check_url
from shared.errors import BadRequest

LISTING_BYTES: Final = 8 << 20
QUANTIZATIONS: Final = ("q4_k_m", "q4_k_s", "q4_0", "q5_k_m", "q4_1", "iq4_nl", "q6_k", "q8_0")
"""What is taken of several, best first: small enough for a device, good enough to be worth having."""
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


@dataclass(frozen=True, slots=True)
class Credential:
    """Sent to this origin and no other, whoever redirects there or away. `repr` hides it."""

    origin: tuple[str, str]
    token: str

    def __repr__(self) -> str:
        return f"Credential({self.origin})"

    def headers(self, url: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token}"} if origin(url) == self.origin else {}


def origin(url: str) -> tuple[str, str]:
    """Scheme, and host with its port."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def endpoint(env: Mapping[str, str]) -> str:
    """Raises BadRequest if `HF_ENDPOINT` is no https:// URL."""
    if given := env.get("HF_ENDPOINT"):
        return check_url(given).rstrip("/")
    from huggingface_hub.constants import ENDPOINT  # its own default: no hub's address stands in this repository

    return check_url(ENDPOINT).rstrip("/")


def credential(env: Mapping[str, str], base: str) -> Credential | None:
    """Raises BadRequest for a token that no header can hold."""
    token = env.get("HF_TOKEN", "").strip()
    if token and not (token.isascii() and token.isprintable() and " " not in token):
        raise BadRequest("HF_TOKEN is not a token", param="HF_TOKEN")
    return Credential(origin(base), token) if token else None


def file_url(base: str, found: Hub) -> str:
    return f"{base}/{found.repo}/resolve/{quote(found.revision, safe='')}/{quote(found.file or '')}"


class _Listed(msgspec.Struct):
    path: str
    type: str = "file"


def choose(base: str, asked: Hub, get: Callable[[str, int], bytes]) -> Hub:
    """The one GGUF file of a repository, or the best-known quantization of several. Raises SourceMissing saying what is
    there. `get(url, most)` reads a reply of at most so many bytes."""
    where = f"{base}/api/models/{asked.repo}/tree/{quote(asked.revision, safe='')}?recursive=true"
    try:
        listing = msgspec.json.decode(get(where, LISTING_BYTES), type=list[_Listed])
    except msgspec.MsgspecError:
        raise SourceMissing(f"the hub's list of the files of {asked.repo} cannot be read: name a file") from None
    names = sorted(item.path for item in listing if item.type == "file" and item.path.lower().endswith(".gguf"))
    whole = [name for name in names if not _PART.search(name.lower()) and "mmproj" not in name.lower()]
    if not whole:
        what = "only models in several parts" if names else "no GGUF file"
        raise SourceMissing(f"{asked.repo} has {what}")
    if len(whole) > 1:
        known = [name for wish in QUANTIZATIONS for name in whole if wish in name.lower()]
        if not known:
            raise SourceMissing(f"{asked.repo} has {', '.join(whole[:20])}: name one of them after the repository")
        whole = known
    return Hub(asked.repo, asked.revision, whole[0])
