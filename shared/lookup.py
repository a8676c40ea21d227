"""Prompt lookup: where a sequence's last few tokens stood before, the tokens that followed may follow again.

That is right for much of a summary, a correction, a quotation or code, and seldom for free text.
"""

MATCHES = (4, 2)
"""How many tokens must have stood before; the longer match counts first."""
LONGEST = 10
"""Tokens of a draft."""
FIRST_RATE = 0.7
"""Of right guesses, before any was made."""
MEMORY = 0.12
"""How much of the rate is the last guess."""
HOPE = 0.02
"""How far a rate recovers in a step that could have drafted but did not: what was no use once may be later."""


class Lookup:
    """What one sequence's tokens were followed by, and the rate at which that was right."""

    def __init__(self) -> None:
        self.rate = FIRST_RATE
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def guess(self, tokens: list[int]) -> tuple[int, ...]:
        """What followed the last time, up to LONGEST tokens; if that reaches the end of `tokens`, it goes on with the
        guesses themselves, since what repeats once may repeat again. Looks at each token once."""
        for end in range(self._seen, len(tokens)):
            for size in MATCHES:
                if end >= size:
                    self._after[tuple(tokens[end - size : end])] = end
        self._seen = len(tokens)
        for size in MATCHES:
            at = self._after.get(tuple(tokens[-size:]))
            if at is not None:
                known = tokens[at : at + LONGEST]
                return tuple(known[index % len(known)] for index in range(LONGEST))
        return ()

    def learn(self, guessed: int, right: int) -> None:
        """Of so many guesses the first `right` were; what follows a wrong one says nothing."""
        for index in range(min(guessed, right + 1)):
            self.rate += MEMORY * ((index < right) - self.rate)

    def rest(self) -> None:
        """A guess was not worth a row."""
        self.rate += HOPE * (FIRST_RATE - self.rate)


def worth(rate: float, guesses: int, *, free_rows: float, rows: int, expected: float) -> tuple[int, float]:
    """How many of one sequence's guesses are worth rows of a step that has `rows` without them and is expected to give
    so many tokens; and how many it is expected to give with them.

    `free_rows` is how many rows cost as much as what a step costs whatever its rows, so that its worth, with T tokens
    expected of R rows, is T / (free_rows + R). A guess that is right with probability p belongs in it if that rises:
    if p > T / (free_rows + R). It is right if those before it were, so p falls with each.
    """
    count, chance = 0, rate
    while count < guesses and chance * (free_rows + rows + count) > expected:
        count, expected, chance = count + 1, expected + chance, chance * rate
    return count, expected
