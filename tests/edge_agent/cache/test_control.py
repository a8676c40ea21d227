import pytest

from edge_agent.cache.control import Control, parse_control
from shared.errors import BadRequest


@pytest.mark.parametrize(
    ("header", "meant"),
    [
        (None, Control()),
        ("", Control()),
        ("no-cache", Control(no_cache=True)),
        ("No-Store", Control(no_store=True)),
        ("only-if-cached, max-age=60", Control(only_if_cached=True, max_age_s=60.0)),
        ('max-age="5"', Control(max_age_s=5.0)),
        ("max-age=0", Control(no_cache=True)),
        ("no-transform, max-stale=9, x", Control()),
    ],
)
def test_reads_what_a_caller_asks_of_a_cache(header: str | None, meant: Control) -> None:
    """The directives of a request; those that say nothing here are passed over. An age of 0 is nothing old at all."""
    assert parse_control(header) == meant


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "1e9", "9" * 11, "²"])
def test_an_age_that_is_none_is_refused(value: str) -> None:
    """By the name of the header: nobody gets older answers than he thinks."""
    with pytest.raises(BadRequest) as refused:
        parse_control(f"max-age={value}")
    assert refused.value.param == "cache-control"
