"""A fleet of real processes: policies signed on the command line, offered by a cloud, taken by an edge, rolled back."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from clients import until
from processes import edge_agent, environment
from waiting import HANG_S

pytestmark = [pytest.mark.system, pytest.mark.model]


def cloud(*args: str) -> list[str]:
    return [sys.executable, "-m", "cloud_engine", *args]


def done(folder: Path, *args: str) -> "subprocess.CompletedProcess[str]":
    env = environment(folder)
    return subprocess.run(cloud(*args), capture_output=True, text=True, env=env, timeout=120, check=False)


@contextmanager
def serving(folder: Path, *args: str) -> Iterator[str]:
    """`cloud-engine serve`, whose engine would be a server that is away: only its fleet is looked at."""
    out = folder / "cloud.out"
    upstream = ("--model", "any", "--backend", "openai", "--upstream", "http://127.0.0.1:9/v1", "--port", "0")
    with out.open("wb") as stream:
        process = subprocess.Popen(
            cloud("serve", *upstream, *args), stdout=stream, stderr=subprocess.STDOUT,
            env=environment(folder, CAUSEWAY_MODEL_LEN="2048"),
        )  # fmt: skip
    try:
        assert until(lambda: "listening on " in out.read_text() or process.poll() is not None)
        yield out.read_text().partition("listening on ")[2].split()[0]
    finally:
        process.terminate()
        process.wait(HANG_S)


def test_a_fleet_from_the_first_key_to_the_rollback(tmp_path: Path, model_path: Path) -> None:
    """Key, signature, cloud, edge: taken without a restart, seen by the cloud, rolled back by the device's own
    administrator, not taken again after both have restarted; a forged one never."""
    fleet, key, state = tmp_path / "fleet", tmp_path / "fleet.key", tmp_path / "edge-state"
    fleet.mkdir()
    (tmp_path / "edge").mkdir()
    assert done(tmp_path, "fleet", "keys", str(key)).returncode == 0
    new_key = ("keys", "new", "--keys", str(tmp_path / "admins"), "--tenant", "activate.anna")
    admin = done(tmp_path, *new_key).stdout.strip()

    def signed(version: int, text: str) -> Path:
        (tmp_path / "policy.yaml").write_text(text)
        args = ("--key", str(key), "--version", str(version), "--why", "a try")
        out = ("--out", str(tmp_path / f"v{version}"))
        made = done(tmp_path, "fleet", "sign", str(tmp_path / "policy.yaml"), *args, *out)
        assert made.returncode == 0, made.stderr
        return Path(made.stdout.strip())

    settings = ("--fleet-policies", str(fleet), "--fleet-key", f"{key}.pub", "--fleet-admins", str(tmp_path / "admins"))
    first = signed(1, "mode: prefer_edge\nrules: [{name: of_the_fleet, when: {code: true}, target: edge}]\n")
    assert "of_the_fleet" in done(tmp_path, "fleet", "show", str(first), "--key", f"{key}.pub").stdout
    edge_args = ("--model", str(model_path), "--state-dir", str(state))
    edge_env = {"CAUSEWAY_FLEET_KEY": f"{key}.pub"}

    def in_force(edge: str) -> dict[str, Any]:
        token = (state / "admin.token").read_text().strip()
        reply = httpx.get(f"{edge}/admin/policy", headers={"authorization": f"Bearer {token}"}, timeout=60)
        return reply.json()

    def at_cloud(url: str, **body: Any) -> httpx.Response:
        method = "POST" if body else "GET"
        path = "/admin/fleet/policies" if body else "/admin/fleet"
        return httpx.request(method, url + path, headers={"authorization": f"Bearer {admin}"}, timeout=60, **body)

    with serving(tmp_path, *settings) as there:
        where = ("--cloud", there.replace("http:", "ws:"))
        with edge_agent(tmp_path / "edge", *edge_args, *where, **edge_env) as edge:
            before = in_force(edge.url)["fleet"]
            assert (before["seen"], before["using"]) == (0, 0)
            assert at_cloud(there, json={"signed": first.read_text()}).status_code == 200
            assert until(lambda: in_force(edge.url)["fleet"]["using"] == 1)
            assert until(lambda: at_cloud(there).json()["edges"][0]["using"] == 1)
            answer = {"model": "auto", "messages": [{"role": "user", "content": "def f(x): return x"}], "max_tokens": 2}
            reply = httpx.post(f"{edge.url}/v1/chat/completions", json=answer, timeout=120)
            assert "of_the_fleet" in reply.headers["x-causeway-reason"]

            (fleet / "2.policy").write_bytes(first.read_bytes().replace(b"prefer_edge", b"prefer_cloud"))
            token = (state / "admin.token").read_text().strip()
            back = httpx.post(
                f"{edge.url}/admin/policy/rollback", json={"why": "not here"}, timeout=60,
                headers={"authorization": f"Bearer {token}"},
            )  # fmt: skip
            assert back.status_code == 200
            assert until(lambda: at_cloud(there).json()["edges"][0]["code"] == "replaced")
            assert until(lambda: bool(at_cloud(there).json()["problems"]))

    with serving(tmp_path, *settings) as there:
        where = ("--cloud", there.replace("http:", "ws:"))
        with edge_agent(tmp_path / "edge", *edge_args, *where, **edge_env) as edge:
            assert until(lambda: at_cloud(there).json()["connected"] == 1)
            found = in_force(edge.url)
            assert (found["current"]["version"], found["fleet"]["seen"], found["fleet"]["using"]) == (0, 1, 0)
            assert [act["who"] for act in found["acts"]] == ["admin", "fleet", "fleet"]
            assert found["broken_at"] is None
            second = signed(2, "mode: prefer_edge\n")
            assert at_cloud(there, json={"signed": second.read_text()}).status_code == 200
            assert until(lambda: in_force(edge.url)["fleet"]["using"] == 2)


def test_the_commands_say_what_is_wrong(tmp_path: Path) -> None:
    """One line and status 2: no key, a policy with a mistake at its line, a signature by somebody else, halves of the
    settings."""
    (tmp_path / "policy.yaml").write_text("mode: prefer_edge\nmod: x\n")
    for name in ("a", "b"):
        done(tmp_path, "fleet", "keys", str(tmp_path / name))
    terms = ("--version", "1", "--why", "x", "--out", str(tmp_path / "s"))
    sign = ("fleet", "sign", str(tmp_path / "policy.yaml"), *terms)

    wrong = done(tmp_path, *sign, "--key", str(tmp_path / "a"))
    assert (wrong.returncode, wrong.stderr.startswith("cloud-engine: policy.yaml:2: mod: unknown field")) == (2, True)
    assert "no such file" in done(tmp_path, *sign, "--key", str(tmp_path / "none")).stderr.lower()
    (tmp_path / "policy.yaml").write_text("mode: prefer_edge\n")
    assert done(tmp_path, *sign, "--key", str(tmp_path / "a")).returncode == 0
    foreign = done(tmp_path, "fleet", "show", str(tmp_path / "s"), "--key", str(tmp_path / "b.pub"))
    assert (foreign.returncode, "not signed by the fleet's key" in foreign.stderr) == (2, True)
    half = done(tmp_path, "serve", "--model", "m", "--fleet-policies", str(tmp_path))
    assert (half.returncode, "belong together" in half.stderr) == (2, True)
