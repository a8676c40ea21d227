"""Which guesses of the next tokens are worth rows of a step, when one request runs alone.

llama.cpp computes several sequences together only where each has as many rows as the others, so that one that drafts
among many costs a second pass (measured: never worth it); alone, a guess costs a row. What a row costs, beside a step
without guesses, depends on the model and the machine, so it is measured while it is done.
"""

from edge_agent.backends.sampling import Ids
from shared.lookup import LONGEST, Lookup, worth

LEAST_GAIN = 1.1
"""Of a step's speed, for guesses to be made at all: llama.cpp rounds a row otherwise where others are computed with it,
so that near ties may be decided otherwise. That is not to be had for nothing."""
FIRST_FREE_ROWS = 1.0
MOST_FREE_ROWS = 64.0
HOPE = 0.02
"""How far the price of a row goes back to the first estimate in a step without guesses."""
SMOOTHING = 0.1


class Drafter:
    """What steps of one request cost, with guesses and without."""

    def __init__(self) -> None:
        self.drafted = self.accepted = 0
        self._plain: float | None = None
        self._row: float | None = None

    @property
    def free_rows(self) -> float:
        """How many rows cost as much as what a step costs whatever its rows: see `shared.lookup.worth`."""
        if self._plain is None or self._row is None:
            return FIRST_FREE_ROWS
        return min(max(self._plain / max(self._row, 1e-9) - 1, 0.0), MOST_FREE_ROWS)

    def observe(self, guesses: int, took: float) -> None:
        """A step of one request computed its token, and so many guesses beside it, in `took` seconds."""
        if not guesses:
            self._plain = smooth(self._plain, took)
            if self._row is not None:  # one bad measurement must not be the last
                self._row += HOPE * (self._plain / (FIRST_FREE_ROWS + 1) - self._row)
        elif self._plain is not None:
            self._row = smooth(self._row, max(0.0, took - self._plain) / guesses)


class Drafts:
    """The guesses of one request."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._lookup = Lookup()
        self._tokens: list[int] = []

    def propose(self, tokens: Ids, room: int) -> list[int]:
        """What may follow `tokens`, at most `room` of it. To be told all tokens that were there before, and more."""
        self._tokens += tokens[len(self._tokens) :].tolist()
        guess = self._lookup.guess(self._tokens)[: max(0, min(room, LONGEST))]
        free_rows = self._drafter.free_rows
        count, expected = worth(self._lookup.rate, len(guess), free_rows=free_rows, rows=1, expected=1.0)
        if expected * (free_rows + 1) < LEAST_GAIN * (free_rows + 1 + count):
            count = 0
        if guess and not count:
            self._lookup.rest()
        return list(guess[:count])

    def learn(self, guessed: int, right: int) -> None:
        self._lookup.learn(guessed, right)
        self._drafter.drafted += guessed
        self._drafter.accepted += right


def smooth(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
