import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from model_origin import model_bytes

from edge_agent import __main__ as command
from shared.keys import Keys


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees or touches the caller's models, keys and state, or leaves its logging behind."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    structlog.reset_defaults()


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """The exit status of `edge-agent ARGS`, in this process."""
    monkeypatch.setattr(sys, "argv", ["edge-agent", *args])
    with pytest.raises(SystemExit) as left:
        command.main()
    return int(left.value.code or 0)


def write(name: str, text: str, mode: int = 0o600) -> str:
    Path(name).write_text(text)
    Path(name).chmod(mode)
    return name


class Loading:
    """A local backend that never comes to an end with loading."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    async def start(self) -> None:
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--model", "nobody:7b"], "nobody:7b"),
        (["--model", "smollm2:135m"], "edge-agent pull smollm2:135m"),
        (["--model", "../../etc/passwd"], "neither a model"),
        (["--port", "65536"], "port"),
        (["--slots", "0"], "slots"),
        (["--policy", "bad.yaml"], "bad.yaml:2: rulez"),
        (["--policy", "gone.yaml"], "gone.yaml"),
        (["--config", "bad.toml"], "bad.toml: prot"),
        (["--config", "gone.toml"], "gone.toml"),
        (["--cloud", "http://127.0.0.1:1", "--key-file", "good.key"], "cloud"),
        (["--cloud", "wss://cloud.example"], "key_file"),
        (["--cloud", "ws://127.0.0.1:1", "--key-file", "gone.key"], "gone.key"),
        (["--cloud", "ws://127.0.0.1:1", "--key-file", "open.key"], "chmod 600"),
        (["--cloud", "ws://192.0.2.1:1", "--key-file", "good.key"], "wss://"),
        (["--cloud", "wss://c.example", "--key-file", "good.key", "--cloud-ca", "bad.yaml"], "cloud_ca"),
        (["--host", "0.0.0.0"], "not loopback"),
        (["--host", "127.0.0.1", "--keys", "gone.keys"], "gone.keys"),
        (["--tls-cert", "c.pem"], "tls_key"),
        (["--state-dir", "bad.yaml/x"], "state_dir"),
        (["--log-level", "loud"], "log_level"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    args: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2, one line on stderr that names the setting, no traceback, nothing on stdout."""
    monkeypatch.setattr("edge_agent.run.LlamaBackend", Loading)
    Path("small.gguf").write_bytes(model_bytes(100))
    write("bad.yaml", "mode: only_edge\nrulez: []\n")
    write("bad.toml", "prot = 1\n")
    write("good.key", "cw_secret\n")
    write("open.key", "cw_secret\n", 0o644)

    status = run(monkeypatch, "serve", *([] if "--model" in args else ["--model", "small.gguf"]), *args)

    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert err.startswith("edge-agent: ")
    assert err.count("\n") == 1
    assert told in err
    assert "cw_secret" not in err


@pytest.mark.parametrize("args", [["serve", "--port", "many"], ["serve", "--nonsense"], ["dance"]])
def test_wrong_usage_is_refused(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown commands and options, values of the wrong type: exit status 2 and no traceback."""
    assert run(monkeypatch, *args) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["pull", "nobody:7b"], "smollm2:135m"),
        (["pull", "../../etc/passwd.gguf"], "no such file"),
        (["pull", "http://192.0.2.1/m.gguf"], "https"),
        (["rm", "nobody:7b"], "not on this device"),
        (["rm", "../../etc/passwd"], "cannot be the name"),
    ],
)
def test_models_that_are_not_there_are_named(
    args: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown names, paths for names and addresses that are not safe: one line, exit status 2."""
    assert run(monkeypatch, *args) == 2

    err = capsys.readouterr().err
    assert err.startswith("edge-agent: ")
    assert err.count("\n") == 1
    assert told in err


def test_list_and_rm_see_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lies in the store is listed, and gone once removed."""
    store = tmp_path / ".local/share/causeway/models"
    store.mkdir(parents=True)
    (store / "tiny-1b.gguf").write_bytes(b"GGUF")
    (store / "tiny-1b.json").write_text('{"name": "tiny:1b", "size": 4000000, "sha256": "abcdef0123456789"}')

    assert run(monkeypatch, "list") == 0
    listed = capsys.readouterr().out
    assert run(monkeypatch, "rm", "tiny:1b") == 0
    assert run(monkeypatch, "list") == 0

    assert listed.split() == ["tiny:1b", "4", "MB", "0", "abcdef012345"]
    assert capsys.readouterr().out == "removed tiny:1b\n"
    assert not list(store.iterdir())


def test_a_new_key_is_printed_once_and_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed opens what the file guards."""
    assert run(monkeypatch, "keys", "new", "--keys", "client.keys") == 0
    key = capsys.readouterr().out.strip()

    Keys(Path("client.keys"), source="edge").tenant_of({"authorization": f"Bearer {key}"})


def test_help_is_light_and_names_every_command() -> None:
    """The command line imports nothing heavy before it has to."""
    heavy = ("llama_cpp", "numpy", "fastapi", "pydantic", "watchfiles", "torch")
    code = f"import sys, edge_agent.__main__\nprint([name for name in {heavy} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": str(Path(command.__file__).parents[1]), "COLUMNS": "120"}
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    shown = subprocess.run(
        [sys.executable, "-m", "edge_agent", "--help"], capture_output=True, text=True, check=True, env=env
    )

    assert imported.stdout.strip() == "[]"
    assert all(name in shown.stdout for name in ("serve", "pull", "list", "rm", "keys"))


def test_console_prints_a_link_that_signs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the token of this very state folder, in the part of the address that no server sees."""
    assert run(monkeypatch, "console", "--state-dir", str(tmp_path / "state"), "--url", "http://127.0.0.1:9/") == 0
    token = (tmp_path / "state" / "admin.token").read_text().strip()
    assert capsys.readouterr().out.strip() == f"http://127.0.0.1:9/console/#token={token}"
