"""Both sides of Causeway on this machine, over loopback: `demo`, `serve`, `stop`.

`demo` picks free ports, sends a scripted handful of prompts through the edge's HTTP API, shows each answer as it
streams, then stops the cloud under the edge's feet and asks once more. It leaves nothing running.
`serve` leaves both sides running in the background on 8484 (edge) and 8585 (cloud); `stop` ends them.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

HERE = Path(__file__).resolve().parent
RUN = HERE.parent / ".run"
BIN = Path(sys.executable).parent
EDGE_PORT, CLOUD_PORT = 8484, 8585
SIDES = ("edge", "cloud")
READY_S, STOP_S, ANSWER_S = 300.0, 20.0, 120.0

Model = Annotated[str, typer.Option(help="a name from the model store, or a GGUF file")]
DEFAULT_MODEL = "smollm2:135m"

console = Console(highlight=False)
app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@dataclass(frozen=True, slots=True)
class Daemon:
    name: str
    process: psutil.Popen
    log: Path
    url: str


class NotReady(RuntimeError):
    """A daemon ended or kept silent before it was listening; the message holds the end of its log."""


def start(name: str, log: Path, *args: str) -> Daemon:
    """Run one of our commands in a session of its own and wait for its `listening on` line. Its state lies beside the
    log: it meets no daemon of the user's."""
    with log.open("wb") as out:
        process = psutil.Popen(
            [str(BIN / name), *args],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"XDG_STATE_HOME": str(log.parent / "state")},
            start_new_session=True,
        )
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text("utf-8", "replace").splitlines():
            if line.startswith("listening on "):
                return Daemon(name, process, log, line.removeprefix("listening on ").strip())
        time.sleep(0.05)
    end(process)
    tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-15:])
    raise NotReady(f"{name} did not start:\n{tail}")


def end(process: psutil.Process) -> None:
    """SIGTERM, a while to drain, then SIGKILL."""
    try:
        process.terminate()
        process.wait(STOP_S)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(STOP_S)
    except psutil.NoSuchProcess:
        return


def start_both(folder: Path, model: str, edge_port: int, cloud_port: int) -> tuple[Daemon, Daemon]:
    """A fresh key, the cloud, then the edge that offloads to it."""
    keys, key_file = folder / "keys", folder / "edge.key"
    keys.unlink(missing_ok=True)
    made = subprocess.run(
        [str(BIN / "cloud-engine"), "keys", "new", "--keys", str(keys)], check=True, capture_output=True, text=True
    )
    key_file.touch(0o600)
    key_file.write_text(made.stdout.split()[-1])
    cloud = start(
        "cloud-engine", folder / "cloud.log", "serve", "--model", model, "--port", str(cloud_port), "--keys", str(keys)
    )
    try:
        link = ("--cloud", cloud.url.replace("http://", "ws://"), "--key-file", str(key_file))
        policy = ("--policy", str(HERE / "policy.yaml"))
        edge = start(
            "edge-agent", folder / "edge.log", "serve", "--model", model, "--port", str(edge_port), *link, *policy
        )
    except NotReady:
        end(cloud.process)
        raise
    return cloud, edge


# --- demo ---------------------------------------------------------------------------------------------------------

CODE = "Write a Python function that returns the n-th Fibonacci number, with a docstring."
PROMPTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("a short question", {"messages": [{"role": "user", "content": "Name three colors of the rainbow."}]}),
    ("code", {"messages": [{"role": "user", "content": CODE}]}),
    (
        "a private note: it must not leave the device",
        {
            "messages": [{"role": "user", "content": "Write code that stores my diary entry: I felt calm today."}],
            "causeway": {"label": "edge_only"},
        },
    ),
    (
        "asked of the cloud by name",
        {"model": "cloud", "messages": [{"role": "user", "content": "Say hello to the world."}]},
    ),
    ("a small talk", {"messages": [{"role": "user", "content": "Tell me a short story about a bridge."}]}),
)


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    route: str
    reason: str
    first_s: float
    tokens: int
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        after_first = self.total_s - self.first_s
        return (self.tokens - 1) / after_first if self.tokens > 1 and after_first > 0 else 0.0


def ask(client: httpx.Client, title: str, body: dict[str, Any]) -> Row:
    """Stream one answer to the terminal."""
    console.print(f"\n[bold]> {title}[/]")
    console.print(f"[dim]{body['messages'][-1]['content']}[/]")
    wanted = {
        "model": "auto",
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, tokens = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/v1/chat/completions", json=wanted | body) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"the edge answered {reply.status_code}: {reply.read().decode()}")
        for event in events(reply):
            if "error" in event:
                raise RuntimeError(f"the stream failed: {event['error']}")
            text = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if text:
                first = first or time.perf_counter() - started
                console.out(text, end="")
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
        route, reason = reply.headers["x-causeway-route"], reply.headers["x-causeway-reason"]
    row = Row(title, route, reason, first, tokens, time.perf_counter() - started)
    console.print(
        f"\n[green]{route}[/] ({reason}); first token {first * 1e3:.0f} ms, {row.tokens_per_s:.0f} tokens/s",
        soft_wrap=True,
    )
    return row


def events(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in reply.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def summary(rows: list[Row]) -> Table:
    """The numbers in columns; the reason, which is long, wrapped under the prompt."""
    table = Table(title="Who answered", box=box.SIMPLE_HEAD, show_lines=False)
    table.add_column("prompt, and why")
    for heading in ("route", "first token", "tokens", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        asked = Group(Text(row.title), Padding(Text(row.reason, style="dim"), (0, 0, 1, 2)))
        table.add_row(asked, row.route, f"{row.first_s * 1e3:.0f} ms", str(row.tokens), f"{row.tokens_per_s:.0f}")
    return table


@contextmanager
def running(model: str) -> Iterator[tuple[Daemon, Daemon]]:
    with tempfile.TemporaryDirectory(prefix="causeway-demo-") as folder, ExitStack() as stack:
        with console.status("starting the cloud engine and the edge agent"):
            cloud, edge = start_both(Path(folder), model, 0, 0)
        stack.callback(end, cloud.process)
        stack.callback(end, edge.process)
        yield cloud, edge


@app.command()
def demo(model: Model = DEFAULT_MODEL) -> None:
    """Watch real prompts go through one endpoint, answered on the device or offloaded."""
    with running(model) as (cloud, edge), httpx.Client(base_url=edge.url, timeout=ANSWER_S) as client:
        console.print(f"edge  {edge.url}\ncloud {cloud.url}")
        rows = [ask(client, title, body) for title, body in PROMPTS]
        console.print("\n[bold]Now the cloud goes away.[/]")
        end(cloud.process)
        rows.append(ask(client, "code, with the cloud gone", {"messages": [{"role": "user", "content": CODE}]}))
        console.print()
        console.print(summary(rows))
    console.print("Both sides are stopped. Next: make serve")


# --- serve and stop ------------------------------------------------------------------------------------------------


def left_running() -> list[psutil.Process]:
    """Of the processes `serve` wrote down, those that are still ours: a number may have passed to another program."""
    pids = [int(file.read_text()) for file in (RUN / f"{side}.pid" for side in SIDES) if file.exists()]
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [process for process in processes if str(BIN) in " ".join(process.cmdline())]


@app.command()
def serve(
    model: Model = DEFAULT_MODEL,
    edge_port: int = EDGE_PORT,
    cloud_port: int = CLOUD_PORT,
) -> None:
    """Leave both sides running in the background. If only one of them still is, both are started anew."""
    left = left_running()
    if len(left) == len(SIDES):
        console.print("already running; `make stop` ends it")
    else:
        for process in left:
            end(process)
        RUN.mkdir(mode=0o700, exist_ok=True)
        cloud, edge = start_both(RUN, model, edge_port, cloud_port)
        for side, daemon in (("cloud", cloud), ("edge", edge)):
            (RUN / f"{side}.pid").write_text(str(daemon.process.pid))
        (RUN / "edge.url").write_text(edge.url)
    console.print(f"export OPENAI_BASE_URL={(RUN / 'edge.url').read_text()}/v1", soft_wrap=True)
    console.print("export OPENAI_API_KEY=any-key-will-do", soft_wrap=True)


@app.command()
def stop() -> None:
    """End what `serve` started."""
    for process in left_running():
        end(process)
    for side in SIDES:
        (RUN / f"{side}.pid").unlink(missing_ok=True)
    console.print("stopped")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, and so ends what was started
    try:
        app()
    except (NotReady, RuntimeError, httpx.HTTPError) as error:
        console.print(f"[red]{error}[/]", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
