import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from fakes import EchoAnswer
from prometheus_client import CollectorRegistry
from serving import served

from cloud_engine.__main__ import _backend, main
from cloud_engine.bench.commands import repeated
from cloud_engine.engine.serving import EngineAnswer
from cloud_engine.gateway.pool import Pool
from cloud_engine.gateway.upstream import Upstream
from cloud_engine.model.config import UnsupportedModel
from cloud_engine.settings import CloudSettings
from shared.config import load
from shared.errors import Unauthorized
from shared.gguf import ModelInvalid
from shared.guard import Guard
from shared.http import create_app
from shared.keys import Keys
from shared.schemas import Answer, ModelCard

COMMAND = [sys.executable, "-m", "cloud_engine"]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *args], capture_output=True, text=True, check=False, timeout=60, env={**os.environ, **env}
    )


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--n", "1", "8", "32"], ["--n", "1", "--n", "8", "--n", "32"]),
        (["--n", "1", "8", "--in", "5"], ["--n", "1", "--n", "8", "--in", "5"]),
        (["--in", "5", "--n", "1"], ["--in", "5", "--n", "1"]),
        (["--n=4", "--n", "2"], ["--n=4", "--n", "2"]),
        (["--n", "-3"], ["--n", "-3"]),
        (["--model", "m", "x"], ["--model", "m", "x"]),
        ([], []),
    ],
)
def test_an_option_takes_several_values(args: list[str], expected: list[str]) -> None:
    """`--n 1 8 32` is `--n 1 --n 8 --n 32`; other options are left alone."""
    assert repeated(args, {"--n"}) == expected


def test_help_does_not_load_torch() -> None:
    """Building the command line imports neither torch nor transformers."""
    code = "import sys, cloud_engine.__main__; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_new_key_is_shown_once(tmp_path: Path) -> None:
    """The key is the only thing on stdout; it opens the file it was put in."""
    file = tmp_path / "k"
    done = run("keys", "new", "--tenant", "edge-1", "--keys", str(file))

    assert done.returncode == 0
    token = done.stdout.strip()
    assert Keys(file, source="cloud").tenant_of({"authorization": f"Bearer {token}"}) == "edge-1"
    assert token not in done.stderr


def test_keys_have_a_default_place(tmp_path: Path) -> None:
    """Without --keys the file is under XDG_CONFIG_HOME."""
    assert run("keys", "new", XDG_CONFIG_HOME=str(tmp_path)).returncode == 0
    assert len(Keys(tmp_path / "causeway" / "cloud-keys", source="cloud")) == 1


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["serve"], "model"),
        (["serve", "--model", "no/such/model"], "no/such/model"),
        (["serve", "--model", "m", "--host", "0.0.0.0"], "keys and TLS"),
        (["serve", "--model", "m", "--host", "192.168.0.1", "--keys", "k"], "TLS"),
        (["serve", "--model", "m", "--keys", "no-such-file"], "no-such-file"),
        (["serve", "--model", "m", "--port", "70000"], "port"),
        (["serve", "--model", "m", "--dtype", "int4"], "dtype"),
        (["serve", "--model", "m", "--config", "no.toml"], "no.toml"),
        (["serve", "--model", "m", "--tls-cert", "c.pem"], "tls_key"),
        (
            ["bench", "--model", "no/such/model", "--n", "1", "8", "32", "64", "--in", "8", "--out", "8"],
            "no/such/model",
        ),
        (["bench", "--model", "m", "--n", "0", "8"], "--n"),
        (["bench-serve", "--model", "m", "--rate", "1", "0"], "--rate"),
        (["bench-serve", "--model", "no/such/model", "--set", "dtype=float32"], "no/such/model"),
        (["bench-serve", "--model", "m", "--set", "num_blocks=3"], "num_blocks"),
        (["keys", "new", "--tenant", "a b", "--keys", "k"], "tenant"),
        (["serve", "--model", "m", "--backend", "openai"], "upstream"),
        (["serve", "--model", "m", "--upstream", "http://localhost:1", "--port", "0"], "cannot be reached"),
        (["serve", "--model", "m", "--upstream", "http://localhost:1", "--upstream-key-file", "none"], "none"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    args: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No traceback; the message names what is wrong. In this process, since starting one takes a second."""
    monkeypatch.setattr(sys, "argv", ["cloud-engine", *args])
    monkeypatch.setenv("GOMP_SPINCOUNT", "1")
    before = structlog.get_config()
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        structlog.configure(**before)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert text in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_a_mistake_ends_the_process() -> None:
    """The same from outside."""
    done = run("serve", "--model", "no/such/model")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no/such/model" in done.stderr
    assert "Traceback" not in done.stderr


def test_auto_takes_our_own_engine_where_it_can(tiny_model: Path) -> None:
    """The model that is here; the upstream for one that is not, or of another kind. Several upstreams are a pool."""
    upstream = ["http://localhost:1", "http://localhost:2"]

    def chosen(model: str, **flags: Any) -> type:
        return type(_backend(load(CloudSettings, None, {}, {"model": model, "kv_blocks": 20, **flags})))

    assert chosen(str(tiny_model)) is EngineAnswer
    assert chosen(str(tiny_model), upstream=upstream) is EngineAnswer
    assert chosen(str(tiny_model), upstream=upstream, backend="openai") is Pool
    assert chosen("org/model", upstream=upstream) is Pool
    assert chosen("org/model", upstream=upstream[:1]) is Upstream
    other = tiny_model.parent / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "rwkv"}')
    assert chosen(str(other), upstream=upstream) is Pool
    with pytest.raises(UnsupportedModel):
        chosen(str(other))
    (other / "config.json").write_text("{not json")
    with pytest.raises(ModelInvalid):
        chosen(str(other), upstream=upstream)


def test_a_taken_port_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    """Starting a second one by mistake costs no time and no memory."""
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("serve", "--model", str(model), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 2
    assert "cannot listen" in done.stderr


@pytest.mark.model
def test_serve_says_where_it_listens_answers_and_ends(model_path: Path, tmp_path: Path) -> None:
    """The real thing: the line on stdout, an answer with a key, 401 without, exit 0 on SIGTERM."""
    file = tmp_path / "keys"
    token = run("keys", "new", "--keys", str(file)).stdout.strip()
    process = subprocess.Popen(
        [*COMMAND, "serve", "--model", str(model_path), "--port", "0", "--keys", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on http://127.0.0.1:")
        body = {"model": "cloud", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        url = f"{line.split()[-1]}/v1/chat/completions"
        assert httpx.post(url, json=body, timeout=60).status_code == 401
        reply = httpx.post(url, json=body, headers={"authorization": f"Bearer {token}"}, timeout=60)
        assert reply.json()["usage"]["completion_tokens"] == 2
        process.terminate()
        rest, log = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert rest == ""
    assert "Hi" not in log
    assert token.rsplit("_", 1)[1] not in log


WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "safetensors", "gguf", "numpy")))
from cloud_engine.__main__ import main
main()
"""


async def test_an_upstream_is_served_without_torch(tmp_path: Path) -> None:
    """With --upstream the process runs where torch is not installed; the key comes from the file and is never shown."""

    def answer_for(headers: Any) -> Answer:
        if headers.get("authorization") != "Bearer sk-canary":
            raise Unauthorized("no key")
        return EchoAnswer("cloud")

    app = create_app(answer_for=answer_for, models=lambda: [ModelCard(id="m", context_length=99)],
                     health=lambda: {"status": "ok"}, registry=CollectorRegistry(), source="cloud",
                     guard=Guard())  # fmt: skip
    key = tmp_path / "upstream.key"
    key.write_text("sk-canary\n")
    key.chmod(0o600)
    async with served(app) as port:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WITHOUT_TORCH, "serve", "--model", "m", "--port", "0", "--upstream",
            f"http://127.0.0.1:{port}", "--upstream-key-file", str(key),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            async with asyncio.timeout(30):
                line = (await process.stdout.readline()).decode()
            assert line.startswith("listening on http://127.0.0.1:")
            async with httpx.AsyncClient(base_url=line.split()[-1], timeout=60) as http:
                body = {"model": "cloud", "messages": [{"role": "user", "content": "quiet words"}]}
                reply = await http.post("/v1/chat/completions", json=body)
                models = (await http.get("/v1/models")).json()["data"]
            process.terminate()
            async with asyncio.timeout(30):
                _, log = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    assert process.returncode == 0
    assert reply.json()["choices"][0]["message"]["content"] == "quiet words "
    assert models[0]["context_length"] == 99
    assert b"quiet" not in log
    assert b"sk-canary" not in log
