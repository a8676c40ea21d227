"""Our server beside vLLM's under the same open load: first-token time, gaps and goodput, over streaming HTTP.

    python -m tests.benchmarks.rival_serving --model FOLDER --vllm PYTHON --rate 0.5 1 2 --requests 48 --rounds 2

Both are started once; each round puts the same requests at the same times to one after the other, in turning order,
and the one that is not asked is stopped. `--ours dtype=bfloat16,max_num_seqs=64` are settings of `cloud-engine serve`.
"""

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import httpx

from cloud_engine.bench.figures import Report, Row
from cloud_engine.bench.load import Objective, Target, closed_loop, open_loop, poisson, summary
from cloud_engine.bench.serving import Plan
from cloud_engine.bench.workload import SHAREGPT, longest
from tests.benchmarks.ratios import by_pairs, show

ROOT = Path(__file__).parents[2]
READY_S, STOP_S = 400.0, 30.0
HIGHER, LOWER = ("out_tok_s", "goodput_req_s"), ("ttft_ms_p50", "ttft_ms_p99", "itl_ms_p50", "itl_ms_p99")


Found = dict[tuple[float, str], list[Row]]
"""Rows of each rate and server, round by round."""


class Server:
    """A server in a session of its own, stopped (SIGSTOP) whenever it is not measured."""

    def __init__(self, name: str, model: str, process: subprocess.Popen[bytes], url: str) -> None:
        self.name, self.process, self.target = name, process, Target(url, model)

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        with suppress(ProcessLookupError):
            self.resume()
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(name: str, model: str, command: list[str], env: dict[str, str], log: Path) -> Iterator[Server]:
    """Started on a free port, paused once it answers. Raises RuntimeError with the end of its log if it does not."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env={**os.environ, **env}, cwd=log.parent,
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip
    server = Server(name, model, process, f"http://127.0.0.1:{port}/v1")
    try:
        _await_ready(server, log)
        server.pause()
        yield server
    finally:
        server.close()


def _await_ready(server: Server, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and server.process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{server.target.base_url}/models", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{server.name} did not start:\n{log.read_text('utf-8', 'replace')[-2000:]}")


def ours(args: argparse.Namespace, folder: Path, given: str, number: int) -> AbstractContextManager[Server]:
    settings = {"log_level": "warning", "concurrent": "0", "prefix_caching": "false"}
    settings |= dict(pair.split("=", 1) for pair in given.split(","))
    env = {f"CAUSEWAY_{name.upper()}": value for name, value in settings.items()} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cloud_engine", "serve", "--model", args.model]
    return serving(f"ours {given}", "cloud", command, env, folder / f"ours-{number}")


def vllm(args: argparse.Namespace, folder: Path, length: int) -> AbstractContextManager[Server]:
    command = [args.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model]
    command += ["--host", "127.0.0.1", "--served-model-name", "m"]
    command += [
        "--dtype",
        args.vllm_dtype,
        "--max-model-len",
        str(length),
        "--max-num-seqs",
        "64",
        "--no-enable-prefix-caching",
    ]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | {"VLLM_CPU_KVCACHE_SPACE": "2"}
    return serving(f"vllm {args.vllm_dtype}", "m", command, env, folder / "vllm")


async def compare(servers: list[Server], plan: Plan, report: Report) -> Found:
    found: Found = {}
    for seed in range(plan.seed, plan.seed + plan.repeats):
        turn = seed % len(servers)
        for at, rate in enumerate(plan.rates):
            for server in servers[turn:] + servers[:turn]:
                server.resume()
                await closed_loop(server.target, plan.asks(server.target, -1)[: plan.warm_up], max(1, plan.warm_up))
                asks = plan.asks(server.target, len(plan.rates) * seed + at)
                replies, wall = await open_loop(server.target, asks, poisson(rate, len(asks), seed))
                server.pause()
                row = summary(replies, [ask.output for ask in asks], wall, plan.objective)
                report.add({"server": server.name, "rate": rate, "round": seed} | row)
                found.setdefault((rate, server.name), []).append(row)
    return found


def ratios(found: Found) -> Iterator[tuple[str, list[float]]]:
    """Rates: ours / theirs; times: theirs / ours. Above 1 is better, always."""
    mine = [key for key in found if key[1].startswith("ours")]
    for rate, name in mine:
        for other in (key[1] for key in found if key[0] == rate and not key[1].startswith("ours")):
            for figure in (*HIGHER, *LOWER):
                pair = [[row[figure] for row in found[rate, which]] for which in (name, other)]
                if all(value for values in pair for value in values):  # goodput may be 0, and then there is no ratio
                    better = by_pairs(*pair) if figure in HIGHER else by_pairs(*pair[::-1])
                    yield f"{rate}/s {figure}: {name} better than {other} by", better


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--vllm", default="", metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--vllm-dtype", default="bfloat16")
    parser.add_argument("--ours", action="append", metavar="NAME=VALUE,...", help="settings; may be repeated")
    parser.add_argument("--rate", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--in", dest="prompt", type=int, default=128)
    parser.add_argument("--out", dest="output", type=int, default=128)
    parser.add_argument("--mixed", action="store_true", help=f"lengths with these means; ShareGPT's are {SHAREGPT}")
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--slo-itl-ms", type=float, default=100.0)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    args.model = str(Path(args.model).resolve())
    lengths = "mixed" if args.mixed else "fixed"
    objective = Objective(args.slo_ttft_ms / 1e3, args.slo_itl_ms / 1e3)
    plan = Plan(args.rate, (), args.requests, args.prompt, args.output, lengths, args.rounds, objective=objective)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        starts = [ours(args, folder, given, at) for at, given in enumerate(args.ours or ["dtype=bfloat16"])]
        # A word is now and then two tokens.
        starts += [vllm(args, folder, 2 * longest(lengths, args.prompt, args.output))] if args.vllm else []
        with ExitStack() as stack:
            servers = [stack.enter_context(start) for start in starts]
            show(ratios(asyncio.run(compare(servers, plan, Report(args.csv)))))


if __name__ == "__main__":
    main()
