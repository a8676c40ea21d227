"""Who was there when the model's process died."""

import msgspec
import pytest

from edge_agent.backends.suspects import MAX_SUSPECTS, TTL_S, Suspects, fingerprint
from shared.errors import Quarantined
from shared.schemas import ChatRequest, Message, Sampling

REQUEST = ChatRequest(id="a", model="edge", messages=(Message(role="user", content="x"),))


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def suspects(now: list[float]) -> Suspects:
    return Suspects(lambda: now[0])


def test_the_second_death_counts(suspects: Suspects) -> None:
    """Once is chance; twice is refused, and says for how long; others are not."""
    suspects.crashed(b"1")
    suspects.check(b"1")
    suspects.crashed(b"1")

    with pytest.raises(Quarantined, match="2 times") as refused:
        suspects.check(b"1")
    suspects.check(b"2")
    assert not refused.value.retryable
    assert (len(suspects), suspects.refused) == (1, 1)


def test_it_is_forgotten_in_time(suspects: Suspects, now: list[float]) -> None:
    """Ten minutes after the last death."""
    suspects.crashed(b"1")
    now[0] = TTL_S / 2
    suspects.crashed(b"1")
    now[0] = TTL_S * 1.5 - 1
    with pytest.raises(Quarantined, match="1 s"):
        suspects.check(b"1")
    now[0] += 1

    suspects.check(b"1")
    assert len(suspects) == 0


def test_an_answer_clears(suspects: Suspects) -> None:
    """What was answered in full between two deaths is not their cause."""
    suspects.crashed(b"1")
    suspects.cleared(b"1")
    suspects.crashed(b"1")

    suspects.check(b"1")


def test_the_table_is_bounded(suspects: Suspects) -> None:
    """The oldest go."""
    for number in range(MAX_SUSPECTS + 1):
        suspects.crashed(str(number).encode())
        suspects.crashed(str(number).encode())

    suspects.check(b"0")
    with pytest.raises(Quarantined):
        suspects.check(b"1")
    assert len(suspects) == MAX_SUSPECTS


def test_the_fingerprint_is_of_all_but_the_id() -> None:
    """The same under another id is the same; anything else is something else."""
    assert fingerprint(REQUEST) == fingerprint(msgspec.structs.replace(REQUEST, id="b"))
    assert fingerprint(REQUEST) != fingerprint(msgspec.structs.replace(REQUEST, sampling=Sampling(seed=1)))
