"""Whether a candidate is what it looks like: checksums, registries of number plans, the look of a made-up secret."""

import base64
import binascii
import ipaddress
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import phonenumbers
from stdnum import iban, luhn

Check = Callable[[str], bool]
SUPPORTED_REGIONS: Final = frozenset(map(str, phonenumbers.SUPPORTED_REGIONS))


_DIGITS: Final = re.compile(r"\d+")


def anything(_: str) -> bool:
    return True


_ISSUERS: Final = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|(?:222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|(?:6011|64[4-9]\d|65\d\d|62\d\d|35(?:2[89]|[3-8]\d)|50\d\d|5[6-8]\d\d|6[37]\d\d)\d{12,15}"
)


def is_card(text: str) -> bool:
    """A payment card's number: an issuer's first digits, the length of its cards, Luhn's checksum."""
    digits = _digits(text)
    return _ISSUERS.fullmatch(digits) is not None and luhn.is_valid(digits)


def is_iban(text: str) -> bool:
    """Its own checksum alone: the registries of single countries' banks are never complete."""
    return bool(iban.is_valid(text, check_country=False))


def is_email(text: str) -> bool:
    """A mailbox at a name with a top-level domain of letters; not `user@1.2.3`, the version of a package."""
    local, domain = text.rsplit("@", 1)
    labels = domain.rstrip("-").split(".")
    edges = not any(label.startswith("-") or label.endswith("-") for label in labels)
    return edges and not local.startswith(".") and len(text) <= 254 and labels[-1].isalpha()


def is_phone(text: str, regions: Sequence[str]) -> bool:
    """With a country code by its own number plan, without one by that of any of `regions`."""
    groups = _DIGITS.findall(text)
    digits = "".join(groups)
    if not 7 <= len(digits) <= 15 or len(set(digits)) < 3 or _is_date(groups) or _spelled(groups):
        return False
    if text.startswith("+"):
        return _is_plain(digits) or _is_number(text, None)
    if text.startswith("00"):
        return _is_number("+" + text[2:], None)
    return any(_is_number(text, region) for region in regions)


def _is_plain(digits: str) -> bool:
    """Whether they are a number as they stand, country code first: said in a third of the time that parsing takes."""
    codes = phonenumbers.COUNTRY_CODE_TO_REGION_CODE
    size = next((size for size in (1, 2, 3) if int(digits[:size]) in codes), None)
    if size is None or digits[size] == "0":
        return False
    number = phonenumbers.PhoneNumber(country_code=int(digits[:size]), national_number=int(digits[size:]))
    return phonenumbers.is_valid_number(number)


def _is_number(text: str, region: str | None) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(text, region))
    except phonenumbers.NumberParseException:
        return False


def is_ip(text: str) -> bool:
    """A host's address: neither loopback nor a network's, nor four single digits, which are a chapter, a version or a
    public name server."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified or address.is_multicast or address.is_link_local:
        return False
    return address.version == 6 or (max(map(int, text.split("."))) > 9 and not text.endswith(".0"))


def is_jwt(text: str) -> bool:
    """A JSON Web Token: its first part decodes to an object that names an algorithm."""
    head = text.split(".")[0]
    try:
        header = json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return False
    return isinstance(header, dict) and "alg" in header


_STAND_INS: Final = ("your", "my_", "xxx", "***", "...", "none", "null", "true", "false", "<", "$", "{", "%")


def is_assigned_secret(text: str) -> bool:
    """The value in `password = value` looks made to be secret: not a word, a variable or a stand-in."""
    value = text.replace("=", ":").split(":", 1)[1].strip().strip("\"'`")
    if value.lower().startswith(_STAND_INS):
        return False
    varied = any(char.isdigit() for char in value) or any(char in "!@#$^&*+-" for char in value)
    return len(value) >= 8 and varied and entropy(value) >= 2.5


def entropy(text: str) -> float:
    """Shannon's, in bits a character."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


def _digits(text: str) -> str:
    return "".join(_DIGITS.findall(text))


def _is_date(groups: Sequence[str]) -> bool:
    """A year and two short numbers, in one order or the other, are a date and no phone number."""
    lengths = [len(group) for group in groups]
    return len(lengths) == 3 and 4 in (lengths[0], lengths[2]) and sum(lengths) <= 8


def _spelled(groups: Sequence[str]) -> bool:
    """Mostly single digits: a list, or a matrix."""
    return sum(len(group) == 1 for group in groups) * 2 > len(groups)


def compact(check: Check) -> Check:
    """A python-stdnum check on the candidate's letters and digits."""
    return lambda text: check("".join(char for char in text if char.isalnum()))
