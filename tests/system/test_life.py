"""The daemon as a process: started twice, told to reload, stopped with answers under way, watched for what it sends."""

import json
import signal
import socket
import stat
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from clients import HELLO, stream, text_of, until
from processes import command, edge_agent, environment

pytestmark = [pytest.mark.system, pytest.mark.model]

RECORDER = """
import os, sys
def heard(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.gethostbyname"):
        line = f"{os.getpid()} {event} {args[1:]}"
    elif event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "::1"):
        line = f"{os.getpid()} {event} {args}"
    else:
        return
    with open(os.environ["RECORD"], "a") as out:
        out.write(line + "\\n")
with open(os.environ["RECORD"], "a") as out:
    out.write(f"{os.getpid()} started\\n")
sys.addaudithook(heard)
"""


JSON = {"content-type": "application/json"}


class Listening:
    """A server that counts who connects, and what they send."""

    def __init__(self) -> None:
        self.server = socket.create_server(("127.0.0.1", 0))
        self.url = f"ws://127.0.0.1:{self.server.getsockname()[1]}"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def __enter__(self) -> "Listening":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


def recorder(folder: Path) -> dict[str, str]:
    """An environment in which every Python process writes down what it connects to."""
    hooks = folder / "hooks"
    hooks.mkdir()
    (hooks / "sitecustomize.py").write_text(RECORDER)
    return {"PYTHONPATH": str(hooks), "RECORD": str(folder / "record")}


def outgoing(folder: Path) -> list[str]:
    lines = (folder / "record").read_text().splitlines()
    assert any(line.endswith("started") for line in lines), "the recorder was not there"
    return [line for line in lines if not line.endswith("started")]


def settings_file(folder: Path, model: Path, cloud: str) -> Path:
    path = folder / "edge.toml"
    (folder / "policy.yaml").write_text("mode: prefer_cloud\n")
    path.write_text(f'model = "{model}"\ncloud = "{cloud}"\npolicy = "{folder / "policy.yaml"}"\nno_cloud = false\n')
    return path


def test_switched_off_nothing_leaves_whatever_is_set(model_path: Path, tmp_path: Path) -> None:
    """CAUSEWAY_NO_CLOUD=1 beside a settings file with a cloud and a policy that prefers it: over requests to both
    sides, reloads by signal, by file and by the administration, no connection, no name looked up, nothing sent."""
    with Listening() as cloud:
        file = settings_file(tmp_path, model_path, cloud.url)
        hooks = recorder(tmp_path)
        with (
            edge_agent(tmp_path, "--config", str(file), CAUSEWAY_NO_CLOUD="1", **hooks) as edge,
            httpx.Client(base_url=edge.url, timeout=120) as client,
        ):
            first, headers = stream(client, model="auto", max_tokens=4)
            file.write_text(file.read_text() + 'log_level = "debug"\n')
            edge.process.send_signal(signal.SIGHUP)
            assert until(lambda: "settings read again" in edge.out.read_text())
            token = (tmp_path / "state" / "causeway" / "admin.token").read_text().strip()
            reloaded = client.post("/admin/reload", headers=JSON | {"authorization": f"Bearer {token}"})
            refused = client.post("/v1/chat/completions", json={"model": "cloud", "messages": HELLO, "max_tokens": 4})
            second, _ = stream(client, model="auto", max_tokens=4)

    assert text_of(first)
    assert text_of(second)
    assert headers["x-causeway-route"] == "edge"
    assert reloaded.status_code == 200
    assert refused.status_code == 403
    assert cloud.connections == 0
    assert outgoing(tmp_path) == []


def test_the_recorder_sees_the_cloud_where_there_is_one(model_path: Path, tmp_path: Path) -> None:
    """The proof of the test above: without the switch the same daemon connects, and both witnesses say so."""
    with Listening() as cloud:
        file = settings_file(tmp_path, model_path, cloud.url)
        with edge_agent(tmp_path, "--config", str(file), **recorder(tmp_path)):
            assert until(lambda: cloud.connections > 0)

    port = cloud.url.rpartition(":")[2]
    assert any("socket.connect" in line and port in line for line in outgoing(tmp_path))


def test_without_a_cloud_the_daemon_sends_nothing_anywhere(model_path: Path, tmp_path: Path) -> None:
    """No telemetry, no update check: over a run of requests good and bad no process of it opens an outgoing socket.
    S-21: none listens but on the one port. S-09: nothing in its state folder can be read by others. A second
    daemon there is refused by name, with exit status 2."""
    with (
        edge_agent(tmp_path, "--model", str(model_path), **recorder(tmp_path)) as edge,
        httpx.Client(base_url=edge.url, timeout=120) as client,
    ):
        answers = [stream(client, max_tokens=4, model=model)[0] for model in ("auto", "edge", "smollm2:135m")]
        statuses = [
            client.post("/v1/chat/completions", json={"model": "nobody", "messages": HELLO}).status_code,
            client.post("/v1/chat/completions", content=b"{", headers=JSON).status_code,
            client.get("/v1/models").status_code,
            client.get("/health").status_code,
            client.get("/metrics").status_code,
        ]
        tree = [psutil.Process(edge.process.pid), *psutil.Process(edge.process.pid).children(recursive=True)]
        listening = [
            connection.laddr.port
            for process in tree
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        second = subprocess.run(
            command("serve", "--port", "0", "--model", str(model_path)),
            capture_output=True,
            text=True,
            env=environment(tmp_path),
            timeout=60,
        )

    assert all(text_of(events) for events in answers)
    assert statuses == [404, 400, 200, 200, 200]
    assert outgoing(tmp_path) == []
    assert listening == [edge.port]
    state = tmp_path / "state" / "causeway"
    made = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (state, *state.rglob("*"))}
    assert {"admin.token", "journal.db", "daemon.lock"} <= set(made)
    assert [name for name, mode in made.items() if mode & 0o077] == []
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert f"process {edge.process.pid}, {edge.url}" in second.stderr


def test_sigterm_lets_answers_end_and_takes_no_more(model_path: Path, tmp_path: Path) -> None:
    """Streams in flight come whole, each with its finish reason and [DONE]; what is asked after the signal is refused
    with 503 or not let in; then the process ends by itself, and its log is in the file asked for, 0600."""
    log = tmp_path / "logs" / "edge.log"
    with edge_agent(tmp_path, "--model", str(model_path), "--log-file", str(log)) as edge:
        begun = threading.Barrier(5, timeout=60)

        def ask(number: int) -> list[str]:
            body = {"model": "auto", "messages": HELLO, "max_tokens": 96, "stream": True, "seed": number}
            lines: list[str] = []
            with (
                httpx.Client(base_url=edge.url, timeout=120) as client,
                client.stream("POST", "/v1/chat/completions", json=body) as reply,
            ):
                for line in reply.iter_lines():
                    if line.startswith("data: ") and not lines:
                        begun.wait()
                    lines += [line] if line.startswith("data: ") else []
            return lines

        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(ask, number) for number in range(4)]
            begun.wait()
            edge.process.send_signal(signal.SIGTERM)
            try:
                late = httpx.post(
                    f"{edge.url}/v1/chat/completions", json={"model": "auto", "messages": HELLO}, timeout=60
                ).status_code
            except httpx.TransportError:
                late = 503
            streams = [future.result() for future in asked]
        assert edge.process.wait(60) == 0

    assert late == 503
    for lines in streams:
        assert lines[-1] == "data: [DONE]"
        reasons = [choice["finish_reason"] for line in lines[:-1] for choice in json.loads(line[6:]).get("choices", [])]
        assert reasons[-1] in ("stop", "length")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(entry["event"] == "request" and entry["outcome"] == "done" for entry in entries) == 4
    assert log.stat().st_mode & 0o777 == 0o600
