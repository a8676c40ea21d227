"""A signed policy: what its bytes prove, and what they do not."""

import base64
import itertools
from pathlib import Path

import pytest
from fleets import CLOUD, KEY, OTHER, signed
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.config import InvalidSettings
from shared.errors import TooLarge
from shared.fleet import MAGIC, MAX_SOURCE, BadSignature, InvalidFleetPolicy, Terms, opened, sign
from shared.frames import MAX_OFFER
from shared.signing import holds, new_keys, private_key, public_key


def test_what_was_signed_comes_back() -> None:
    """Terms, text and a digest of it all; the text may hold anything."""
    text = "mode: prefer_cloud\n\n# ü\x00\n"
    found = opened(signed(7, text, groups=("kiosk",), percent=12.5), KEY.public_key())
    assert (found.version, found.terms.groups, found.terms.percent) == (7, ("kiosk",), 12.5)
    assert found.source == text.encode()
    assert len(found.digest) == 64


def test_no_byte_can_be_changed() -> None:
    """One flipped bit, wherever it is, and nobody takes it: also one of base64's last digit that decodes to nothing."""
    whole = signed(3)
    for at, bit in itertools.product(range(len(whole)), range(8)):
        broken = bytearray(whole)
        broken[at] ^= 1 << bit
        with pytest.raises(BadSignature):
            opened(bytes(broken), KEY.public_key())


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda more: MAGIC + b"\n" + more))
def test_any_bytes_are_refused_by_name(content: bytes) -> None:
    """Nothing but a typed error comes of what nobody signed."""
    with pytest.raises(BadSignature):
        opened(content, KEY.public_key())


def test_another_key_is_no_key() -> None:
    """However well it is signed."""
    with pytest.raises(BadSignature):
        opened(signed(1, key=OTHER), KEY.public_key())


def test_a_signature_for_something_else_is_none_for_a_policy() -> None:
    """The first line is part of what is signed."""
    content = b'{"version":1,"why":"x"}\n' + CLOUD.encode()
    proof = base64.b64encode(KEY.sign(content))
    assert holds(KEY.public_key(), KEY.sign(content), content)
    with pytest.raises(BadSignature):
        opened(b"\n".join((MAGIC, proof, content)), KEY.public_key())


def test_terms_that_are_not_known_are_refused() -> None:
    """They may be a restriction; the field is named."""
    content = b'{"version":1,"why":"x","not_after":"2027"}\n' + CLOUD.encode()
    proof = base64.b64encode(KEY.sign(MAGIC + b"\n" + content))
    with pytest.raises(InvalidFleetPolicy, match="not_after"):
        opened(b"\n".join((MAGIC, proof, content)), KEY.public_key())


@pytest.mark.parametrize("terms", [{"version": 0}, {"percent": 0}, {"percent": 101}, {"why": ""}, {"groups": ("",)}])
def test_terms_out_of_range_are_not_even_signed(terms: dict[str, object]) -> None:
    """Who signs is told first."""
    with pytest.raises(InvalidFleetPolicy):
        sign(Terms(**{"version": 1, "why": "x", **terms}), b"", KEY)  # type: ignore[arg-type]


def test_size_is_bounded_on_both_sides() -> None:
    """The largest text that is signed can be sent; a larger one is refused before its signature is looked at."""
    assert len(signed(1, "x" * MAX_SOURCE, why="y" * 400)) <= MAX_OFFER
    with pytest.raises(TooLarge):
        signed(1, "x" * (MAX_SOURCE + 1))
    with pytest.raises(TooLarge):
        opened(b"x" * (MAX_OFFER + 1), KEY.public_key())


def test_a_share_only_grows_with_its_percentage() -> None:
    """Which edges are in depends on their names alone, about as many as asked for; groups narrow it further."""
    edges = [f"{number:016x}" for number in range(2000)]
    tenth = {edge for edge in edges if Terms(version=1, why="x", percent=10).include(edge, "")}
    half = {edge for edge in edges if Terms(version=2, why="x", percent=50).include(edge, "")}
    assert tenth < half
    assert 120 < len(tenth) < 280
    kiosks = Terms(version=3, why="x", groups=("kiosk",))
    assert (kiosks.include("a", "kiosk"), kiosks.include("a", ""), kiosks.include("a", "desk")) == (True, False, False)


def test_keys_are_made_once_and_read_back(tmp_path: Path) -> None:
    """In PEM; the private one for its owner alone, and never over another."""
    public = new_keys(tmp_path / "fleet.key")
    text = sign(Terms(version=1, why="x"), b"mode: only_edge", private_key(tmp_path / "fleet.key", "key"))
    assert opened(text, public_key(public, "fleet_key")).version == 1
    with pytest.raises(InvalidSettings, match="exists"):
        new_keys(tmp_path / "fleet.key")
    (tmp_path / "fleet.key").chmod(0o644)
    with pytest.raises(InvalidSettings, match="chmod 600"):
        private_key(tmp_path / "fleet.key", "key")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_a_file_that_holds_no_key_is_named(tmp_path: Path, content: bytes) -> None:
    """So that the setting can be mended; a private key is no public one."""
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(InvalidSettings, match="fleet_key"):
        public_key(tmp_path / "key", "fleet_key")
    new_keys(tmp_path / "pair")
    with pytest.raises(InvalidSettings, match="fleet_key"):
        public_key(tmp_path / "pair", "fleet_key")
