"""The cloud engine beside its rivals in one run: output tokens per second, greedy, end of text ignored.

    python -m tests.benchmarks.rivals --model FOLDER --vllm PYTHON --ours dtype=float32 --ours dtype=bfloat16 \\
        --rows 1:128/128 8:128/128 32:128/128 64:128/128 64:512/64 64:mix --rounds 3 --csv rivals.csv

Every engine is loaded once, in a process of its own. Each round gives each row's prompts to one engine after the other,
in turning order, and only the one that is measured runs: the others are stopped. A row is N:IN/OUT, N:mix (lengths like
ShareGPT's, see `cloud_engine/bench/workload.py`) or N:mixIN/OUT with other means. PYTHON is that of an environment with
vLLM.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cloud_engine.bench.workload import SHAREGPT, Job, Lengths, jobs, longest
from tests.benchmarks.ratios import Sample, by_pairs, show

ROOT = Path(__file__).parents[2]
NO_SPECIAL = 100
"""Prompts hold no tokens before this one, where the special ones are."""
VOCABULARY = 40_000
ROWS = ("1:128/128", "8:128/128", "32:128/128", "64:128/128")
CLOSE_S = 30.0
GUARD = "import os, signal, sys; sys.stdin.read(); os.killpg(int(sys.argv[1]), signal.SIGKILL)"
"""A program that ends a group of processes once whoever holds its input is gone: those who are stopped cannot."""


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    n: int
    lengths: Lengths
    prompt: int
    output: int

    @classmethod
    def parse(cls, name: str) -> "Row":
        match = re.fullmatch(r"(\d+):(mix)?(?:(\d+)/(\d+))?", name)
        if not match or not (match[2] or match[3]):
            raise argparse.ArgumentTypeError(f"{name} is not N:IN/OUT, N:mix or N:mixIN/OUT")
        sizes = (int(match[3]), int(match[4])) if match[3] else SHAREGPT
        return cls(name, int(match[1]), "mixed" if match[2] else "fixed", *sizes)

    def jobs(self, tokens: range, seed: int) -> list[Job]:
        return jobs(self.lengths, self.n, self.prompt, self.output, tokens=tokens, seed=seed)


@dataclass(frozen=True, slots=True)
class Engine:
    """Which worker, under which Python, with which options (see `rival_worker.py`)."""

    name: str
    worker: str
    python: str
    options: dict[str, object]


@dataclass(frozen=True, slots=True)
class Measured:
    round: int
    row: str
    engine: str
    tokens: int
    wall_s: float
    out_tok_s: float


class Worker:
    """The process of one engine, stopped whenever it is not asked anything."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine = engine
        script = str(Path(__file__).with_name("rival_worker.py"))
        self.process = subprocess.Popen(
            [engine.python, script, engine.worker, model, json.dumps(engine.options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        guard = [sys.executable, "-c", GUARD, str(self.process.pid)]
        self.guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)

    def warm_up(self, tokens: range) -> None:
        """Wait until it is loaded; its first batches set up kernels and threads."""
        self._reply()
        for n in (1, int(str(self.engine.options["slots"]))):
            self.run(jobs("fixed", n, 16, 4, tokens=tokens, seed=n))

    def run(self, work: Sequence[Job]) -> tuple[int, float]:
        """Tokens and seconds. Raises RuntimeError if the engine made another number of tokens, or died."""
        os.killpg(self.process.pid, signal.SIGCONT)
        asked = {"prompts": [job.prompt for job in work], "outputs": [job.output for job in work]}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        reply = self._reply()
        if reply["tokens"] != sum(job.output for job in work):
            raise RuntimeError(f"{self.engine.name} generated {reply['tokens']} tokens")
        return int(reply["tokens"]), reply["wall_s"]

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGCONT)
            self.process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(CLOSE_S)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.guard.kill()
        self.guard.wait()
        self.process.wait()

    def _reply(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.engine.name} ended; its own words are above")
        os.killpg(self.process.pid, signal.SIGSTOP)
        return json.loads(line)


@contextmanager
def workers(engines: Sequence[Engine], model: str) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        started = []
        for engine in engines:
            started.append(Worker(engine, model))
            stack.callback(started[-1].close)
            started[-1].warm_up(tokens_of(model))
        yield started


def tokens_of(model: str) -> range:
    """What prompts are drawn from."""
    config = Path(model) / "config.json"
    return range(NO_SPECIAL, json.loads(config.read_text())["vocab_size"] if config.is_file() else VOCABULARY)


def engines(
    rows: Sequence[Row], ours: Sequence[str], vllm: str, vllm_dtypes: Sequence[str], slots: int
) -> list[Engine]:
    """Ours in each configuration (`dtype=bfloat16,block_size=32`), and the rivals."""
    limits = {
        "slots": slots or max(row.n for row in rows),
        "length": max(longest(row.lengths, row.prompt, row.output) for row in rows),
    }
    mine = [Engine(f"ours {given}", "ours", sys.executable, limits | {"set": given.split(",")}) for given in ours]
    theirs = [Engine(f"vllm {dtype}", "vllm", vllm, limits | {"dtype": dtype}) for dtype in vllm_dtypes if vllm]
    return [
        *mine,
        *theirs,
        Engine("transformers float32", "transformers", sys.executable, limits | {"dtype": "float32"}),
    ]


def compare(model: str, rows: Sequence[Row], these: Sequence[Engine], rounds: int, file: Path | None) -> list[Measured]:
    """All that was measured; written to `file` as it comes, so that a run may be broken off."""
    found: list[Measured] = []
    with workers(these, model) as started:
        for number in range(rounds):
            order = started[number % len(started) :] + started[: number % len(started)]
            for row in rows:
                work = row.jobs(tokens_of(model), seed=number)
                for worker in order:
                    tokens, wall = worker.run(work)
                    rate = round(tokens / wall, 2)
                    found.append(Measured(number, row.name, worker.engine.name, tokens, round(wall, 3), rate))
                    print(json.dumps(asdict(found[-1])), flush=True)
                    if file:
                        _write(file, found)
    return found


def samples(found: Sequence[Measured]) -> Iterator[Sample]:
    """For each row: every engine's rate, and the ratio of each of ours to each rival, round by round."""
    for row in dict.fromkeys(one.row for one in found):
        rates: dict[str, list[float]] = {}
        for one in found:
            if one.row == row:
                rates.setdefault(one.engine, []).append(one.out_tok_s)
        for name, values in rates.items():
            yield f"{row} {name}, tokens/s", values
        for name in (name for name in rates if name.startswith("ours")):
            for rival in (name for name in rates if not name.startswith("ours")):
                yield f"{row} {name} / {rival}", by_pairs(rates[name], rates[rival])


def measure(model: Path, rounds: int) -> Iterator[Sample]:
    """What `python -m tests.benchmarks engine` shows: ours beside transformers, which needs no other environment."""
    rows = [Row.parse(name) for name in ROWS]
    return samples(compare(str(model), rows, engines(rows, ["dtype=float32"], "", (), 0), rounds, None))


def _write(file: Path, found: Sequence[Measured]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(asdict(found[0])))
        writer.writeheader()
        writer.writerows(map(asdict, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder, or a GGUF file where vLLM is left out")
    parser.add_argument("--vllm", default="", metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--vllm-dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--ours", action="append", metavar="NAME=VALUE,...", help="a configuration; may be repeated")
    parser.add_argument("--rows", nargs="+", type=Row.parse, default=[Row.parse(name) for name in ROWS])
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--slots", type=int, default=0, help="sequences at once; 0: the largest N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # workers are closed on the way out
    these = engines(args.rows, args.ours or ["dtype=float32"], args.vllm, args.vllm_dtype, args.slots)
    these = [one for one in these if one.worker != "transformers" or not args.no_transformers]
    show(samples(compare(args.model, args.rows, these, args.rounds, args.csv)))


if __name__ == "__main__":
    main()
