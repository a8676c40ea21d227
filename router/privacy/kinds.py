"""What the detector knows: each kind of personal data or secret, how it is written, and how a candidate is checked.

A pattern finds candidates and may be generous; `accepts` (a checksum, a registry of number plans) decides. Numbers
whose checksum one in ten random numbers would pass count only where `context` is written before them. Patterns are
RE2's, whose time is linear in the text whatever the text is; every repetition is bounded all the same.

What no pattern can find: names, addresses, and facts told in free words. For those, label the request or the rule.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from stdnum import bitcoin
from stdnum.br import cpf
from stdnum.cn import ric
from stdnum.de import idnr
from stdnum.es import dni, nie
from stdnum.fr import nir
from stdnum.gb import nhs
from stdnum.in_ import aadhaar
from stdnum.it import codicefiscale
from stdnum.nl import bsn
from stdnum.pl import pesel
from stdnum.pt import cc
from stdnum.se import personnummer
from stdnum.us import ssn

from router.privacy.checks import (
    Check,
    anything,
    compact,
    entropy,
    is_assigned_secret,
    is_card,
    is_email,
    is_iban,
    is_ip,
    is_jwt,
    is_phone,
)

REGIONS: Final = ("US", "GB", "DE", "FR", "ES", "IT", "NL", "PL", "PT", "BR", "IN", "CN", "SE")
"""Number plans that a phone number without a country code is tried against, unless the administrator names others."""


PHONE_CHECKS: Final = 24
"""A number plan takes about 0.1 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """`name` is what policies, placeholders and reports say. `secret` tells credentials from personal data."""

    name: str
    pattern: str
    """Where it has groups, the one that matched is the value; what is around it only tells what it is."""
    accepts: Check = anything
    context: str = ""
    """A pattern that must be found, ignoring case, in the text right before or after a candidate; "" asks for none."""
    secret: bool = False
    checks: int = 400
    """How many candidates of one request are checked; what is over counts as found, so that no text can cost more."""


def kinds(regions: Sequence[str] = REGIONS) -> tuple[Kind, ...]:
    """Every kind, in order of precedence where two would claim the same characters."""
    phone = partial(is_phone, regions=tuple(regions))
    return (
        *_SECRETS,
        *_PERSONAL,
        Kind(name="phone", pattern=_MARKED_PHONE, accepts=phone, checks=PHONE_CHECKS),
        Kind(name="phone", pattern=_BARE_PHONE, accepts=phone, context=_PHONE_WORDS, checks=PHONE_CHECKS),
    )


# --- secrets ----------------------------------------------------------------------------------------------------------


def _secret(name: str, pattern: str, accepts: Check = anything) -> Kind:
    return Kind(name=name, pattern=pattern, accepts=accepts, secret=True)


_KEY_WORDS = (
    r"pass(?:word|wd|phrase|wort)?|pwd|secret(?:[_-]?key)?|client[_-]?secret|api[_-]?key|access[_-]?(?:key|token)"
    r"|auth[_-]?token|token|private[_-]?key|mot de passe|contrasena|senha|has\x{142}o|wachtwoord|kennwort"
)
_SECRETS: Final = (
    _secret(
        "private_key",
        r"-----BEGIN (?:[A-Z]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----(?:[A-Za-z0-9+/=\s:,.\\]|-[A-Za-z0-9])*"
        r"(?:-----END (?:[A-Z]{2,10} ){0,3}PRIVATE KEY(?: BLOCK)?-----)?",
    ),
    _secret(
        "jwt", r"\beyJ[A-Za-z0-9_-]{8,900}\.[A-Za-z0-9_-]{2,990}[A-Za-z0-9_-]{0,990}\.[A-Za-z0-9_-]{0,900}", is_jwt
    ),
    _secret("url_credentials", r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,64}:[^\s/@]{1,128}@[^\s/@]{1,128}"),
    _secret("aws_key", r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b"),
    _secret("github_token", r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b|\bgithub_pat_[A-Za-z0-9_]{22,255}\b"),
    _secret("gitlab_token", r"\bglpat-[A-Za-z0-9_-]{20,64}"),
    _secret(
        "api_key",
        r"\bsk-(?:ant-|proj-|or-)?[A-Za-z0-9_-]{20,200}|\bhf_[A-Za-z]{30,40}\b"
        r"|\bcw_[A-Za-z0-9]{4,32}_[A-Za-z0-9_-]{16,128}",
        lambda text: entropy(text) >= 3.5,
    ),
    _secret("google_key", r"\bAIza[A-Za-z0-9_-]{35}"),
    _secret("slack_token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,250}"),
    _secret("stripe_key", r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,247}\b"),
    _secret("sendgrid_key", r"\bSG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"),
    _secret("npm_token", r"\bnpm_[A-Za-z0-9]{36}\b"),
    _secret("telegram_token", r"\b[0-9]{8,10}:AA[A-Za-z0-9_-]{33}"),
    _secret(
        "password",
        rf"""(?i:(?:\b|_)(?:{_KEY_WORDS})["']?)[ \t]{{0,4}}[:=][ \t]{{0,4}}"""
        r"""(?:"((?:[^\s"\\]|\\\S){8,200})"|'([^\s']{8,200})'|["'`]?([^\s"'`,;]{8,200}))""",
        is_assigned_secret,
    ),
)


# --- personal data ----------------------------------------------------------------------------------------------------

_LETTER: Final = r"A-Za-z0-9\x{80}-\x{10ffff}"
"""Of a word in any script. RE2's classes of Unicode letters, repeated, make patterns too large to compile."""

_PERSONAL: Final = (
    Kind(
        name="email",
        pattern=rf"[{_LETTER}.!#$%&'*+=?^_{{|}}~-]{{1,64}}"
        rf"@(?:[{_LETTER}-]{{1,63}}\.){{1,6}}[{_LETTER}-]{{2,63}}",
        accepts=is_email,
    ),
    Kind(
        name="iban",
        pattern=r"\b[A-Z]{2}[0-9]{2}(?:[ -]?[A-Z0-9]{2,4}){3,8}(?:[ -]?[A-Z0-9]{1,3})?\b",
        accepts=compact(is_iban),
    ),
    Kind(name="card", pattern=r"\b[2-6](?:[ .-]{0,3}[0-9]){12,18}\b", accepts=is_card),
    Kind(name="ip", pattern=r"\b(?:[0-9]{1,3}\.){3}[0-9]{1,3}\b", accepts=is_ip),
    Kind(name="ip", pattern=r"(?i)\b(?:[0-9a-f]{0,4}:){3,7}[0-9a-f]{1,4}\b", accepts=is_ip),
    Kind(name="mac", pattern=r"\b(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}\b|\b(?:[0-9A-Fa-f]{2}-){5}[0-9A-Fa-f]{2}\b"),
    Kind(name="us_ssn", pattern=r"\b[0-9]{3}[- ][0-9]{2}[- ][0-9]{4}\b", accepts=compact(ssn.is_valid)),
    Kind(name="us_ssn", pattern=r"\b[0-9]{9}\b", accepts=ssn.is_valid, context=r"\b(?:ssn|social security)\b"),
    Kind(
        name="gb_nino",
        pattern=r"(?i)\b[a-ceghj-prstw-z][a-ceghj-nprstw-z] ?(?:[0-9]{2} ?){3}[a-d]\b",
        accepts=lambda text: text[:2].upper() not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ"),
    ),
    Kind(
        name="gb_nhs",
        pattern=r"\b[0-9]{3}[ -]?[0-9]{3}[ -]?[0-9]{4}\b",
        accepts=compact(nhs.is_valid),
        context=r"\bnhs\b",
    ),
    Kind(
        name="fr_nir",
        pattern=r"\b[1278] ?[0-9]{2} ?[0-9]{2} ?[0-9][0-9AB] ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}\b",
        accepts=compact(nir.is_valid),
    ),
    Kind(
        name="de_idnr",
        pattern=r"\b[1-9][0-9] ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}\b",
        accepts=compact(idnr.is_valid),
        context=r"steuer|\bidnr|\bid-?nr|\btax\b|\btin\b|identifikation",
    ),
    Kind(name="es_dni", pattern=r"(?i)\b[0-9]{8}[ -]?[a-z]\b", accepts=compact(dni.is_valid)),
    Kind(name="es_nie", pattern=r"(?i)\b[xyz][ -]?[0-9]{7}[ -]?[a-z]\b", accepts=compact(nie.is_valid)),
    Kind(
        name="it_cf",
        pattern=r"(?i)\b[a-z]{6}[0-9lmnp-v]{2}[a-ehlmprst][0-9lmnp-v]{2}[a-z][0-9lmnp-v]{3}[a-z]\b",
        accepts=codicefiscale.is_valid,
    ),
    Kind(
        name="nl_bsn",
        pattern=r"\b[0-9]{4}[ .]?[0-9]{2}[ .]?[0-9]{3}\b",
        accepts=compact(bsn.is_valid),
        context=r"\bbsn\b|burgerservice|sofinummer",
    ),
    Kind(name="pl_pesel", pattern=r"\b[0-9]{11}\b", accepts=pesel.is_valid, context=r"pesel"),
    Kind(
        name="pt_cc",
        pattern=r"\b[0-9]{8} ?[0-9] ?[A-Z0-9]{2}[0-9]\b",
        accepts=compact(cc.is_valid),
        context=r"cartao|cidadao|\bcc\b|identi",
    ),
    Kind(name="br_cpf", pattern=r"\b[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}\b", accepts=compact(cpf.is_valid)),
    Kind(name="br_cpf", pattern=r"\b[0-9]{11}\b", accepts=cpf.is_valid, context=r"\bcpf\b"),
    Kind(
        name="in_aadhaar",
        pattern=r"\b[2-9][0-9]{3}[ -]?[0-9]{4}[ -]?[0-9]{4}\b",
        accepts=compact(aadhaar.is_valid),
        context=r"aadhaar|aadhar|uidai|\x{906}\x{927}\x{93e}\x{930}",
    ),
    Kind(
        name="cn_ric",
        pattern=r"\b[1-9][0-9]{5}(?:18|19|20)[0-9]{2}[01][0-9][0-3][0-9]{4}[0-9Xx]\b",
        accepts=ric.is_valid,
    ),
    Kind(name="se_pn", pattern=r"\b(?:19|20)?[0-9]{6}[-+][0-9]{4}\b", accepts=personnummer.is_valid),
    Kind(
        name="birth_date",
        pattern=r"\b[0-9]{1,2}[./-][0-9]{1,2}[./-](?:19|20)[0-9]{2}\b"
        r"|\b(?:19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]\b",
        context=r"\bborn\b|birth|\bdob\b|geboren|geburt|\bgeb\.|\bnee? le\b|naissance|\bnaci|\bnat[oa] il|nascita"
        r"|\bnasc|urodz",
    ),
    Kind(
        name="bitcoin", pattern=r"\b(?:bc1[a-z0-9]{25,62}|[13][1-9A-HJ-NP-Za-km-z]{25,34})\b", accepts=bitcoin.is_valid
    ),
)


# --- phones -----------------------------------------------------------------------------------------------------------

_MARKED_PHONE: Final = (
    r"(?:\+|\b00|\()[0-9](?:[ ()./-]{0,3}[0-9]){6,14}\b"  # a country code, or an area code in brackets
    r"|\b0[1-9][0-9]{0,4}[ )./-]{1,3}[0-9](?:[ ./-]{0,2}[0-9]){4,9}\b"  # a trunk prefix
    r"|\b0[1-9](?:[ .-]?[0-9]{2}){4}\b"
    r"|\b[2-9][0-9]{2}[-.][2-9][0-9]{2}[-.][0-9]{4}\b"  # North America
)
_BARE_PHONE: Final = r"\b[0-9](?:[ ./-]{0,2}[0-9]){6,14}\b"
_PHONE_WORDS: Final = (
    r"phone|\btel\b|\btel[.:]|telefon|\bcall (?:me|us|him|her|them)\b"
    r"|\bmobile\b|\bcell\b|\bhandy|\bmovil|\bportable"
    r"|\bcellulare|\bmobiel|komork|celular|whatsapp|\bsms\b|\bfax\b|\bnummer\b|\brufnummer|\x{7535}\x{8bdd}|\x{624b}\x{673a}|mobil"
)

KINDS: Final = frozenset(kind.name for kind in kinds())
