"""What the cascade's probability is worth: 400 questions with known answers, asked of the local model twice, greedily
and sampled; half of them to calibrate by and half to see what a threshold does. `FILE` gets what `router calibrate`
reads.

    PYTHONPATH=deploy python -m tests.benchmarks.confidence FILE
"""

import asyncio
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from edge_agent.backends.llama import LlamaBackend
from router.calibrate import Answered, Rival, Token, calibrate, heard
from router.cascade_rules import CascadeRules, Hold
from router.confidence import probability
from shared.models import default_store, digest_of, resolve
from shared.schemas import ChatRequest, Delta, Message, Sampling

QUESTIONS = 400
OUT_TOKENS = 32
TEMPERATURE = 0.7
"""Of the second sample."""
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8)
SINGLES = {
    "What is the capital of {}?": "France Paris,Italy Rome,Spain Madrid,Germany Berlin,Japan Tokyo,Egypt Cairo,"
    "Cuba Havana,Russia Moscow,China Beijing,Greece Athens,Norway Oslo,Peru Lima,Kenya Nairobi,Austria Vienna,"
    "Poland Warsaw,Turkey Ankara,Iran Tehran,Iraq Baghdad,Canada Ottawa,Australia Canberra",
    "What is the opposite of {}?": "hot cold,big small,up down,day night,old young,fast slow,wet dry,rich poor,"
    "full empty,left right,open closed,early late,strong weak,happy sad,light dark,hard soft,near far,thick thin,"
    "high low",
    "What is the plural of {}?": "child children,mouse mice,foot feet,tooth teeth,goose geese,man men,woman women,"
    "ox oxen,knife knives,leaf leaves,city cities,box boxes,person people,wolf wolves,cactus cacti,sheep sheep",
}


def questions(rng: random.Random) -> list[tuple[str, str]]:
    """(question, the word that a right answer has), in random order; none twice."""
    asked = {
        form.format(pair.split()[0]): pair.split()[1] for form, pairs in SINGLES.items() for pair in pairs.split(",")
    }
    while len(asked) < QUESTIONS:
        a, b = rng.randrange(1, 20), rng.randrange(1, 20)
        question, right = rng.choice(
            [
                (f"What is {a} + {b}?", a + b),
                (f"What is {a} * {b}?", a * b),
                (f"What number comes after {a * b}?", a * b + 1),
                (f"What is {a + b} - {b}?", a),
            ]
        )
        asked[question] = str(right)
    pairs = list(asked.items())
    rng.shuffle(pairs)
    return pairs


async def answered(backend: LlamaBackend, model: str, digest: str, number: int, question: str, right: str) -> Answered:
    request = ChatRequest(
        id=str(number),
        model=model,
        messages=(Message(role="user", content=question),),
        sampling=Sampling(temperature=0, max_tokens=OUT_TOKENS, logprobs=5),
    )
    sampling = Sampling(temperature=TEMPERATURE, seed=1, max_tokens=OUT_TOKENS, logprobs=0)
    deltas, second = await asyncio.gather(
        _all(backend, request),
        _all(backend, msgspec.structs.replace(request, id=f"{number}.second", sampling=sampling)),
    )
    said = re.findall(r"\w+", "".join(delta.text for delta in deltas).lower())
    numbers = [word for word in said if word.isdigit()]
    found = numbers[-1:] == [right] if right.isdigit() else right.lower() in said
    return Answered(model, found, _tokens(deltas), digest[:12], _tokens(second))


async def _all(backend: LlamaBackend, request: ChatRequest) -> list[Delta]:
    return [delta async for delta in backend.answer(request)]


def _tokens(deltas: Sequence[Delta]) -> tuple[Token, ...]:
    return tuple(
        Token(token.token, token.logprob, tuple(Rival(rival.token, rival.logprob) for rival in token.top))
        for delta in deltas
        for token in delta.logprobs
    )


async def ask_all(model: Path) -> list[Answered]:
    backend = LlamaBackend(model, slots=4)
    await backend.start()
    try:
        name, digest = backend.model_card().id, digest_of(model)
        room = asyncio.Semaphore(2)

        async def one(number: int, question: str, right: str) -> Answered:
            async with room:
                return await answered(backend, name, digest, number, question, right)

        asked = questions(random.Random(7))
        return await asyncio.gather(*(one(at, *pair) for at, pair in enumerate(asked)))
    finally:
        await backend.aclose()


def report(rows: Sequence[Answered], rules: CascadeRules) -> Iterator[str]:
    (fitted,) = calibrate(rows, rules)
    yield f"{fitted.answers} answers, {fitted.right:.0%} right; by five folds:"
    for name, curve in (("alone", fitted.alone), ("with a second sample", fitted.agreed)):
        if curve is not None:
            yield f"  {name}: AUROC {curve.ranked:.3f}, calibration error {curve.error:.3f}"
    half = len(rows) // 2
    (fitted,) = calibrate(rows[:half], rules)
    for name, tried in (
        ("alone", [msgspec.structs.replace(row, second=None) for row in rows[half:]]),
        ("with a second sample", rows[half:]),
    ):
        for kind, calibration in (("uncalibrated", None), (f"calibrated by the other {half}", fitted.calibration)):
            yield f"{name}, {kind}:"
            yield from thresholds([(probability(heard(row, rules), calibration), row.right) for row in tried])


def thresholds(said: Sequence[tuple[float, bool]]) -> Iterator[str]:
    """What each threshold sends and keeps of answers with their probability and whether they were right."""
    off = sum(p for p, _ in said) / len(said) - sum(right for _, right in said) / len(said)
    yield f"  mean p less share right {off:+.2f}"
    for threshold in THRESHOLDS:
        kept = [right for p, right in said if p >= threshold]
        share = f"{sum(kept) / len(kept):.0%} right" if kept else ""
        sent = 1 - len(kept) / len(said)
        yield f"  threshold {threshold:.1f}: {sent:4.0%} to the cloud, kept {len(kept):3d} {share}"


def main(file: str) -> None:
    rows = asyncio.run(ask_all(resolve("smollm2:135m", store=default_store(os.environ, Path.home()))))
    Path(file).write_text("".join(json.dumps(msgspec.to_builtins(row)) + "\n" for row in rows), "utf-8")
    holds: tuple[Hold, ...] = ("sentence", "answer")
    for hold in holds:
        print(f"judged by its {hold}")
        for line in report(rows, CascadeRules(threshold=0.5, hold=hold)):
            print(line)


if __name__ == "__main__":
    main(sys.argv[1])
