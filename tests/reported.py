"""Recorded decisions and outcome tables for the report, made from a seed; some of their names are hostile."""

import random
from pathlib import Path

import numpy as np

from router.assess import Scored
from router.classes import KNOWN, Class
from router.features import DeviceReading, LinkReading, RequestFeatures
from router.money import Price
from router.predict import Prediction, Predictions
from router.records import INSERT, SCHEMA, Outcome, Recorded, encode
from shared.schemas import Target

HOSTILE = "<script>alert(1)</script>\"'&" + "wide" * 20
PRICE = Price(input_per_million=1, output_per_million=2, currency="EUR")


def records(count: int = 300, *, days: float = 6, seed: int = 1) -> list[Recorded]:
    chance = random.Random(seed)
    return [_record(chance, 1_790_000_000 + days * 86_400 * number / count) for number in range(count)]


def _record(chance: random.Random, at: float) -> Recorded:
    hard, tokens = chance.random(), int(chance.lognormvariate(4, 1)) + 4
    target: Target = "cloud" if hard > 0.68 else "edge"
    took = chance.lognormvariate(-1.2 if target == "cloud" else -2, 0.5) + tokens / 4000
    answer, ending = chance.randint(5, 300), "unreachable" if chance.random() < 0.02 else "done"
    outcome = Outcome(
        served=target,
        ending=ending,
        first_token_s=took,
        total_s=took + answer / 40,
        completion_tokens=answer,
        cache="hit" if chance.random() < 0.1 else "miss",
        cost=PRICE.of(tokens, answer) if target == "cloud" else 0.0,
    )
    edge, cloud = (Prediction(first_token_s=scale + tokens / 4000, total_s=scale + 4) for scale in (0.14, 0.3))
    return Recorded(
        at=at,
        request=RequestFeatures(
            prompt_tokens=tokens,
            difficulty=hard,
            difficult_from=0.68,
            tenant=chance.choice(["", "lab", "shop", HOSTILE]),
            scenario=Class(chance.choice(list(KNOWN)), guessed=False),
        ),
        device=DeviceReading(model="small", context_length=2048),
        link=LinkReading(model="large", context_length=8192),
        policy="0123456789ab",
        target=target,
        rule=chance.choice(["goal", "goal", "goal", "rule long-prompts"]),
        reason=f"goal: difficulty {hard:.2f}",
        predictions=Predictions(edge=edge, cloud=cloud),
        price=PRICE,
        outcome=outcome,
    )


def journal(path: Path, kept: list[Recorded]) -> Path:
    import sqlite3

    with sqlite3.connect(path) as database:
        database.execute(SCHEMA)
        database.executemany(INSERT, [(one.at, encode(one)) for one in kept])
    database.close()
    return path


def tables(rows: int = 600, seed: int = 3) -> list[Scored]:
    rng = np.random.default_rng(seed)
    score = rng.beta(2, 4, rows)
    edge = (rng.random(rows) < 0.8 - score / 2).astype(float)
    cloud = np.maximum(edge, rng.random(rows) < score).astype(float)
    domain = [("law", "art", HOSTILE)[number % 3] for number in range(rows)]
    return [Scored("ours", edge, cloud, score, domain), Scored(HOSTILE, edge, cloud, score[::-1].copy(), [""] * rows)]
