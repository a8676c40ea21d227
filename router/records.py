"""Decisions as they are recorded: what each one saw, said and led to, in a SQLite file that the edge agent writes.

No prompt, no answer and no secret is in a record: it has no field for them.
"""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from router.confidence import Judged
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.money import Price
from router.predict import UNMEASURED, Prediction, Predictions
from shared.schemas import Target

SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS decisions (id INTEGER PRIMARY KEY, at REAL NOT NULL, recorded BLOB NOT NULL)"
)
INSERT: Final = "INSERT INTO decisions (at, recorded) VALUES (?, ?)"
MAX_ROWS: Final = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a recorded request ended. Times in seconds; None where it has not ended, or no token came."""

    served: Target | None = None
    ending: str = ""
    first_token_s: float | None = None
    total_s: float | None = None
    completion_tokens: int = 0
    cache: str = ""
    """What the edge's cache had to do with it: `hit`, `shared`, `miss`, `bypass`; empty where there was none."""
    cost: float | None = None
    """What the cloud took for it, by the price then in force; None where there was none."""
    switched: bool = False
    """The beginning of the edge's answer was shown, then a mark and the cloud's."""

    @property
    def worked(self) -> bool:
        """A model has worked for this one alone."""
        return self.cache not in ("hit", "shared")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadowed:
    """What the policy's shadow would have done."""

    target: Target | None = None
    rule: str = ""
    refused: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One decision: what it saw, what it said, what came of it. `at` in seconds since 1970; `refused` is an error's
    code, and then there is no target. `policy` names the version that decided."""

    at: float
    request: RequestFeatures
    device: DeviceReading
    link: LinkReading
    policy: str = ""
    target: Target | None = None
    rule: str = ""
    reason: str = ""
    redact: bool = False
    escalates: bool = False
    """A cascade may have asked the cloud, too."""
    predictions: Predictions = UNMEASURED
    refused: str = ""
    shadow: Shadowed | None = None
    judged: Judged | None = None
    """What the cascade made of the edge's answer."""
    price: Price | None = None
    """What the cloud took for tokens."""
    outcome: Outcome = Outcome()

    @property
    def timed(self) -> bool:
        """Its times tell of the side that served it, and of nothing else: nothing was kept, shared or held back."""
        return self.outcome.worked and self.judged is None

    @property
    def went_well(self) -> bool:
        """Answered to its end by the side that was chosen, and timed."""
        outcome = self.outcome
        return outcome.ending == "done" and self.target is not None and outcome.served == self.target and self.timed

    @property
    def may_cost(self) -> float:
        """What is set aside for it while it is under way."""
        if self.price is None or not (self.target == "cloud" or self.escalates):
            return 0.0
        return self.price.of(self.request.prompt_tokens, self.request.answer_tokens)

    @property
    def prediction_errors(self) -> Prediction:
        """How far off the prediction for the chosen side was, in seconds, either way; None where either is unknown."""
        if self.target is None:
            return Prediction()
        said = self.predictions.edge if self.target == "edge" else self.predictions.cloud
        return Prediction(
            first_token_s=_off(said.first_token_s, self.outcome.first_token_s),
            total_s=_off(said.total_s, self.outcome.total_s),
        )


def costs(path: Path, *, since: float, by: Literal["tenant", "key"] = "tenant") -> dict[str, float]:
    """What the recorded requests have cost since then, by tenant or by the key that was shown. Raises OSError or
    sqlite3.Error where the file cannot be read."""
    if not path.is_file():
        raise FileNotFoundError(f"no journal at {path}")
    whose, cost = f"json_extract(text, '$.request.{by}')", "json_extract(text, '$.outcome.cost')"
    rows = "SELECT CAST(recorded AS TEXT) AS text FROM decisions WHERE at >= ?"
    summed = f"SELECT {whose}, total({cost}) FROM ({rows}) WHERE json_valid(text) GROUP BY 1"  # noqa: S608 - constants
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return {name or "": sum_ for name, sum_ in database.execute(summed, (since,))}


def _off(said: float | None, was: float | None) -> float | None:
    return None if said is None or was is None else abs(said - was)


def encode(record: Recorded) -> bytes:
    return msgspec.json.encode(record)


def decoded(raw: bytes) -> Recorded:
    """Raises ValueError for what `encode` never wrote."""
    return msgspec.json.decode(raw, type=Recorded)


def read(path: Path, *, limit: int = MAX_ROWS) -> Iterator[Recorded]:
    """The newest `limit` records, oldest first; raises as `newest` does."""
    return (record for _, record in newest(path, limit=limit))


def newest(path: Path, *, after: int = 0, limit: int = MAX_ROWS) -> Iterator[tuple[int, Recorded]]:
    """The newest `limit` records with a number above `after`, oldest first, each with its number; those that another
    version wrote are passed over. Raises OSError or sqlite3.Error where the file cannot be read."""
    if not path.is_file():
        raise FileNotFoundError(f"no journal at {path}")
    found = "SELECT id, recorded FROM decisions WHERE id > ? ORDER BY id DESC LIMIT ?"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        for number, raw in database.execute(f"SELECT * FROM ({found}) ORDER BY id", (after, limit)):  # noqa: S608
            with contextlib.suppress(ValueError):
                yield number, decoded(raw)
