"""What drafts from the text itself are worth on the device: the same requests with a drafter and without, turn by turn.

Texts and limits are those of `drafting`. Greedy; where llama.cpp rounds a row otherwise because others are computed
beside it, a near tie may be decided otherwise: the part of the answers that stay the same is measured too.
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from edge_agent.backends.batch import Batcher
from edge_agent.backends.drafting import Drafter
from edge_agent.backends.jobs import Jobs
from edge_agent.backends.native import Native
from shared.schemas import ChatRequest, Message, Sampling
from tests.benchmarks.drafting import FREE, REPEATING, TOKENS


def measure(model: Path, rounds: int) -> Iterable[tuple[str, Sequence[float]]]:
    """Ratios of tokens/s with drafts to tokens/s without, one request at a time."""
    native = Native(model, slots=1, context=1024, threads=None)
    jobs, drafter = Jobs(native, "bench"), Drafter()
    for name, texts in (("repeating", REPEATING), ("free", FREE)):
        ratios, same, accepted = [], [], []
        for _ in range(rounds):
            before = drafter.drafted, drafter.accepted
            runs = {
                used is not None: [rate(jobs, Batcher(native, 1, drafter=used), text) for text in texts]
                for used in (drafter, None)
            }
            speeds = {
                drafting: sum(tokens for _, tokens, _ in run) / sum(seconds for _, _, seconds in run)
                for drafting, run in runs.items()
            }
            ratios.append(speeds[True] / speeds[False])
            same.append(sum(on[0] == off[0] for on, off in zip(runs[True], runs[False], strict=True)) / len(texts))
            accepted.append((drafter.accepted - before[1]) / max(1, drafter.drafted - before[0]))
        yield f"drafts / none, {name} text, one at a time", ratios
        yield f"answers that are the same, {name} text", same
        yield f"guesses that were right, {name} text", accepted
    yield "rows that cost as much as a step without guesses", [drafter.free_rows]


def rate(jobs: Jobs, batcher: Batcher, text: str) -> tuple[str, int, float]:
    """What is generated after the prompt was read, its tokens, and the seconds they take."""
    sampling = Sampling(temperature=0, max_tokens=TOKENS)
    request = ChatRequest(id="b", model="m", messages=(Message(role="user", content=text),), sampling=sampling)
    batcher.admit(jobs.job(0, request, None))
    answer, tokens, started = "", 0, 0.0
    while batcher.running:
        for _, event in batcher.step():
            answer, tokens = answer + event.text, tokens + event.tokens
        started = started or time.perf_counter() * bool(tokens)
    return answer, tokens - 1, time.perf_counter() - started
