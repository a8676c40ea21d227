from cache_parts import entry, query
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.cache.base import MAX_ENTRY_BYTES
from edge_agent.cache.rows import Rows, Seal

KEY = query().key
SECRET = "s3cret-of-these-tests"
SEALED = Rows(Seal(SECRET))


def test_a_sealed_row_can_be_read_with_its_secret_alone() -> None:
    """And shows neither text nor, twice, the same bytes; another secret, or none, finds nothing in it."""
    row = SEALED.row(KEY, entry("a secret answer"))
    assert row is not None

    assert SEALED.entry(KEY, row) == Rows(Seal(SECRET)).entry(KEY, row) == entry("a secret answer")
    assert Rows(Seal("another")).entry(KEY, row) is None
    assert Rows().entry(KEY, row) is None
    assert b"secret answer" not in row
    assert row != SEALED.row(KEY, entry("a secret answer"))


def test_a_plain_row_is_no_sealed_one() -> None:
    """With a seal in use, what was written before it is not read."""
    row = Rows().row(KEY, entry())

    assert Rows().entry(KEY, row) == entry()
    assert SEALED.entry(KEY, row) is None


@settings(max_examples=100, deadline=None)
@given(sealed=st.booleans(), at=st.integers(0, 10_000), bit=st.integers(0, 7), cut=st.booleans())
def test_one_flipped_bit_is_no_answer(sealed: bool, at: int, bit: int, cut: bool) -> None:
    """Wherever it is, or where the row was cut off."""
    rows = SEALED if sealed else Rows()
    row = bytearray(rows.row(KEY, entry()) or b"")
    at %= len(row)
    if cut:
        del row[at:]
    else:
        row[at] ^= 1 << bit

    assert rows.entry(KEY, bytes(row)) is None


def test_a_row_in_anothers_place_is_no_answer() -> None:
    """The place is part of what is checked, and of what is sealed."""
    other = query("something else").key

    for rows in (Rows(), SEALED):
        assert rows.entry(other, rows.row(KEY, entry())) is None


def test_what_is_too_long_has_no_row() -> None:
    """Nor is a row read that is longer than any can be, or that is no bytes at all."""
    assert Rows().row(KEY, entry("x" * MAX_ENTRY_BYTES)) is None
    assert Rows().entry(KEY, bytes(MAX_ENTRY_BYTES * 2)) is None
    assert Rows().entry(KEY, "text") is None
    assert Rows().entry(KEY, None) is None
