"""What a link that loses segments costs, beside what is predicted of it: a cloud that echoes, behind a proxy, where the
kernel drops a share of what either side sends.

    PYTHONPATH=tests python -m tests.benchmarks.losses

Only on Linux.
"""

import asyncio
import statistics
import time
from collections.abc import Iterator

from fakes import ScriptedAnswer
from faults import Proxy, faulty
from serving import served
from starlette.applications import Starlette

from cloud_engine.gateway.socket import SocketEndpoint
from edge_agent.backends.cloud import CloudBackend
from router.features import Trouble
from router.predict import ALL_PIECES, FIRST_PIECES, lateness_s
from shared.schemas import ChatRequest, Delta, Usage
from tests.benchmarks.ratios import Sample, show

SHARES = (0.01, 0.05, 0.1, 0.2)
REQUESTS = 150
ROUNDS = 3
PROMPT = "one two three"
PACE_S = 0.02
TOKEN = Delta(text="w ", tokens=1)
LAST = Delta(finish_reason="stop", usage=Usage(prompt_tokens=3, completion_tokens=4))
ANSWER = (TOKEN, PACE_S, TOKEN, PACE_S, TOKEN, PACE_S, TOKEN, PACE_S, LAST)


def measure(rounds: int) -> Iterator[Sample]:
    for share in SHARES:
        runs = [asyncio.run(_run(share)) for _ in range(rounds)]
        for name, at in (("first token", 1), ("whole answer", 2)):
            yield f"losses {share:.0%}: {name} later by, ms", [run[at][0] for run in runs]
            yield f"losses {share:.0%}: {name} predicted later by, ms", [run[at][1] for run in runs]
        yield f"losses {share:.0%}: seen by the edge, %", [100 * run[0] for run in runs]


async def _run(share: float) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """The loss that was seen; then of first tokens and of whole answers: how much later, and how much was predicted."""
    endpoint = SocketEndpoint(answer_for=lambda _: ScriptedAnswer(*ANSWER), authenticate=lambda _: "tenant")
    async with served(Starlette(routes=[endpoint.route()]), drain=endpoint.aclose) as port, faulty(port) as proxy:
        clean, _ = await _asked(proxy, 0.0)
        lossy, trouble = await _asked(proxy, share)
    later = [(lossy[at] - clean[at]) * 1000 for at in (0, 1)]
    pieces = zip(clean, (FIRST_PIECES, ALL_PIECES), strict=True)
    said = [lateness_s(trouble, seconds, many) * 1000 for seconds, many in pieces]
    return trouble.loss or 0.0, (later[0], said[0]), (later[1], said[1])


async def _asked(proxy: Proxy, share: float) -> tuple[tuple[float, float], Trouble]:
    """Means of the first token and of the whole answer, in seconds, over a connection of its own; what it lost."""
    firsts, totals = [], []
    backend = CloudBackend(f"ws://127.0.0.1:{proxy.port}", "k")
    try:
        await backend.reach(10.0)
        proxy.lose(share)
        for number in range(REQUESTS):
            began, first = time.perf_counter(), 0.0
            async for _ in backend.answer(ChatRequest(id=f"{share}-{number}", model="m", prompt=PROMPT)):
                first = first or time.perf_counter() - began
            firsts.append(first)
            totals.append(time.perf_counter() - began)
        return (statistics.fmean(firsts), statistics.fmean(totals)), backend.link().trouble
    finally:
        await backend.aclose()


if __name__ == "__main__":
    show(measure(ROUNDS))
