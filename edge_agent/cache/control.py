"""The request header `Cache-Control` (RFC 9111, section 5.2.1): what the caller asks of the cache."""

from dataclasses import dataclass
from typing import Final

from shared.errors import BadRequest

MAX_HEADER: Final = 1024
MAX_SECONDS_DIGITS: Final = 10


@dataclass(frozen=True, slots=True)
class Control:
    """`no_cache`: answer anew, and keep that. `no_store`: neither serve nor keep. `max_age_s`: serve nothing older;
    asking for it also says that a sampled answer may be kept. `only_if_cached`: do not answer anew."""

    no_cache: bool = False
    no_store: bool = False
    only_if_cached: bool = False
    max_age_s: float | None = None


NO_WISHES: Final = Control()


def parse_control(header: str | None) -> Control:
    """Raises BadRequest for a max-age that is no number of seconds; directives that are not ours are passed over."""
    given: dict[str, str] = {}
    for directive in (header or "")[:MAX_HEADER].split(","):
        name, _, value = directive.strip().partition("=")
        given[name.strip().lower()] = value.strip().strip('"')
    max_age = _seconds(given["max-age"]) if "max-age" in given else None
    return Control(
        no_cache="no-cache" in given or max_age == 0,
        no_store="no-store" in given,
        only_if_cached="only-if-cached" in given,
        max_age_s=max_age or None,
    )


def _seconds(value: str) -> float:
    if not (value.isascii() and value.isdecimal() and len(value) <= MAX_SECONDS_DIGITS):
        raise BadRequest("Cache-Control: max-age must be a number of seconds", param="cache-control", source="edge")
    return float(value)
