"""The edge daemon beside llama-server and llama_cpp.server: the same model file, the same requests, in one run.

    PYTHONPATH=deploy python -m tests.benchmarks.edge_rivals --model FILE.gguf --llama-server PATH \
        [--llama-cpp-python PYTHON] --clients 1 8 20 --requests 40 --tokens 64 --rounds 3 [--csv FILE]

All are started once, with slots of 1,024 tokens: the others with 8, ours with as many as it gives itself. Who is not
asked is stopped (SIGSTOP). Each round puts the same new prompts to each in turning order, greedy, end of text ignored,
the daemon's cache of answers off. Bars, beside llama-server: tokens/s at least 0.95, median first-token time at 8 and
20 clients at most 0.8, memory (PSS) at most 1.3, no broken stream. llama_cpp.server takes one request at a time and is
expected to break.
"""

import argparse
import asyncio
import csv
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from cloud_engine.bench.load import Reply, Target, closed_loop, read
from tests.benchmarks.edge_bars import pss
from tests.benchmarks.ratios import by_pairs, show

ROOT = Path(__file__).parents[2]
READY_S, STOP_S = 120.0, 20.0
SLOTS, CONTEXT, WORDS = 8, 1024, 40
OURS, LLAMA_SERVER, LLAMA_CPP = "edge", "llama-server", "llama_cpp.server"

Figures = dict[str, float]


class Server:
    """A server in a session of its own, which runs only while it is asked."""

    def __init__(self, name: str, process: psutil.Popen, target: Target) -> None:
        self.name, self.process, self.target = name, process, target

    @contextmanager
    def awake(self) -> Iterator[None]:
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)


@contextmanager
def served(name: str, command: Sequence[str], port: int, folder: Path) -> Iterator[Server]:
    """Started, ready and stopped; ended with the block."""
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "XDG_STATE_HOME": str(folder),
        "CAUSEWAY_CACHE": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with (folder / f"{name}.log").open("wb") as log:
        process = psutil.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_S
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {(folder / f'{name}.log').read_text()[-2000:]}")
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGSTOP)
        yield Server(name, process, Target(f"{url}/v1", "edge", path="chat/completions"))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
            process.terminate()
            with suppress(psutil.TimeoutExpired):
                process.wait(STOP_S)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_ready(url: str) -> bool:
    """llama_cpp.server has no /health: its list of models will do."""
    try:
        return any(httpx.get(url + path, timeout=5).status_code == 200 for path in ("/health", "/v1/models"))
    except httpx.HTTPError:
        return False


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Without the port."""
    model, size = str(args.model), ["--host", "127.0.0.1"]
    ours = [sys.executable, "-m", "edge_agent", "serve", "--model", model]
    found = {OURS: [*ours, "--context", str(CONTEXT)]}
    if args.llama_server:
        slots = ["-c", str(SLOTS * CONTEXT), "-np", str(SLOTS), "-t", str(args.threads)]
        found[LLAMA_SERVER] = [str(args.llama_server), "-m", model, *slots, *size]
    if args.llama_cpp_python:
        one = ["--n_ctx", str(CONTEXT), "--n_threads", str(args.threads), *size]
        found[LLAMA_CPP] = [str(args.llama_cpp_python), "-m", "llama_cpp.server", "--model", model, *one]
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def one_row(server: Server, clients: int, requests: int, tokens: int, seed: int) -> Figures:
    """The same prompts for the same seed."""
    rng = random.Random(seed)
    asks = [server.target.ask(WORDS, tokens, rng) for _ in range(requests)]
    with server.awake():
        before = cpu_s(server.process)
        replies, wall_s = asyncio.run(closed_loop(server.target, asks, clients))
        spent = cpu_s(server.process) - before
        memory = pss(psutil.Process(server.process.pid)) / 2**20
    found = figures(replies, tokens, wall_s)
    told = max(1.0, found["tokens/s"] * wall_s)
    return {**found, "CPU of a token, prompts included, ms": spent * 1e3 / told, "memory, MiB": memory}


def cpu_s(process: psutil.Process) -> float:
    """Of a process and its children, so far: what else runs on the machine changes it less than it does the clock."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return float(sum(time.user + time.system for time in times))


def figures(replies: Sequence[Reply], tokens: int, wall_s: float) -> Figures:
    """A server that counts no tokens is believed its pieces."""
    answers = [read(reply, tokens) for reply in replies]
    whole = [answer for answer in answers if answer.error in (None, "other_length")]
    firsts = sorted(answer.texts[0] for answer in whole)
    return {
        "tokens/s": sum(answer.output_tokens or len(answer.texts) for answer in whole) / wall_s,
        "first token p50, ms": firsts[len(firsts) // 2] * 1e3 if firsts else float("nan"),
        "broken": len(answers) - len(whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--llama-cpp-python", type=Path, help="a Python that has llama_cpp.server")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 20])
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of the others; the daemon chooses its own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows: dict[tuple[int, str], list[Figures]] = defaultdict(list)
    with ExitStack() as running, tempfile.TemporaryDirectory() as folder:
        servers = []
        for name, command in commands(args).items():
            port = free_port()
            servers.append(running.enter_context(served(name, [*command, "--port", str(port)], port, Path(folder))))
        for seed in range(args.rounds):
            for clients in args.clients:
                for server in [*servers[seed % len(servers) :], *servers[: seed % len(servers)]]:
                    requests = max(clients, args.requests if clients > 1 else args.requests // 8)
                    row = one_row(server, clients, requests, args.tokens, 1000 * seed + clients)
                    rows[clients, server.name].append(row)
                    write(args.csv, {"round": seed, "clients": clients, "server": server.name, **row})
    for (clients, name), found in rows.items():
        for figure in found[0]:
            ours = [row[figure] for row in rows[clients, OURS]]
            theirs = [row[figure] for row in found]
            show([(f"{clients} clients, {name}: {figure}", theirs)])
            if name != OURS and figure != "broken":
                show([(f"{clients} clients, {OURS} / {name}: {figure}", by_pairs(ours, theirs))])


def write(path: Path | None, row: dict[str, object]) -> None:
    if path is not None:
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
