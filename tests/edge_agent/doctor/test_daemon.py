import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import served
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from edge_agent.doctor import daemon as module
from edge_agent.doctor.daemon import files, instance, policy, settings_hold, unit
from edge_agent.doctor.findings import Finding
from edge_agent.instance import hold
from edge_agent.settings import EdgeSettings
from router.policy import InvalidPolicy
from shared.config import InvalidSettings


def by_check(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    for name in ("admin.token", "client.token", "audit.key", "journal.db"):
        (folder / name).touch(0o600)
    return folder


def test_files_that_are_ours_alone(state: Path) -> None:
    """One line says so."""
    (found,) = files(EdgeSettings(), state)
    assert found.status == "OK"


@pytest.mark.parametrize("name", ["admin.token", "client.token", "audit.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_secret_others_can_read(state: Path, name: str, mode: int) -> None:
    """S-09: FAIL, with the command that mends it."""
    (state / name).chmod(mode)
    (found,) = files(EdgeSettings(), state)

    assert found.status == "FAIL"
    assert f"chmod 600 {state / name}" in found.todo


@pytest.mark.parametrize("setting", ["key_file", "keys", "tls_key"])
def test_secrets_that_settings_name(state: Path, tmp_path: Path, setting: str) -> None:
    """S-09: missing, and readable by others: FAIL, naming the file."""
    path = tmp_path / "secret"
    settings = EdgeSettings.model_construct(**{**EdgeSettings().model_dump(), setting: path})
    (missing,) = files(settings, state)
    path.touch(0o644)
    (open_to_all,) = files(settings, state)
    path.chmod(0o600)

    assert (missing.status, open_to_all.status) == ("FAIL", "FAIL")
    assert str(path) in missing.said
    assert by_check(files(settings, state)) == {"files": "OK"}


def test_what_is_private_and_open(state: Path, tmp_path: Path) -> None:
    """A state folder and a log that others can read: WARN; what lies in a closed folder is closed."""
    log = tmp_path / "edge.log"
    log.touch(0o644)
    (state / "journal.db").chmod(0o644)
    settings = EdgeSettings(log_file=log)
    closed = [finding.said for finding in files(settings, state)]
    state.chmod(0o755)
    opened = [finding.said for finding in files(settings, state)]

    assert closed == [f"other users can read {log}"]
    assert opened == [f"other users can read {path}" for path in (state, state / "journal.db", log)]


def test_files_of_another_user(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a run with sudo: FAIL, naming them."""
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    found = list(files(EdgeSettings(), state))

    assert {finding.status for finding in found} == {"FAIL"}
    assert str(state) in found[0].said


def test_settings_and_policy_that_would_not_start(tmp_path: Path) -> None:
    """Their own errors, which name the field."""
    (tmp_path / "policy.yaml").write_text("mode: sideways\n")
    with pytest.raises(InvalidSettings):
        list(settings_hold(EdgeSettings(host="0.0.0.0")))
    with pytest.raises(InvalidPolicy):
        list(policy(EdgeSettings(policy=tmp_path / "policy.yaml")))

    assert by_check(settings_hold(EdgeSettings())) == {"settings": "OK"}
    assert by_check(policy(EdgeSettings())) == {"policy": "OK"}


def test_no_daemon_and_a_port_that_is_free_or_not(tmp_path: Path) -> None:
    """Taken: FAIL, and whose it is where the system tells."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        _, busy = instance(EdgeSettings(port=number), tmp_path)
    daemon, free = instance(EdgeSettings(port=number), tmp_path)

    assert (daemon.status, free.status, busy.status) == ("OK", "OK", "FAIL")
    assert f"process {os.getpid()}" in busy.said


@pytest.mark.parametrize(
    ("told", "status"), [("ok", "OK"), ("draining", "WARN"), ("unavailable", "WARN"), (None, "WARN")]
)
async def test_another_daemon(tmp_path: Path, told: str | None, status: str) -> None:
    """One that runs is asked how it is; its port is its own, and not in the way."""

    async def health(_: object) -> JSONResponse:
        return JSONResponse({"status": told} if told else ["nonsense"])

    with hold(tmp_path) as held:
        async with served(Starlette(routes=[Route("/health", health)])) as port:
            held.say(f"http://127.0.0.1:{port}")
            (found,) = await asyncio.to_thread(lambda: list(instance(EdgeSettings(port=port), tmp_path)))

    assert (found.check, found.status) == ("daemon", status)
    assert f"process {os.getpid()}" in found.said


@pytest.mark.parametrize("url", ["", "http://127.0.0.1:1", "nonsense"])
def test_another_daemon_that_does_not_answer(tmp_path: Path, url: str) -> None:
    """WARN, with how to end it."""
    with hold(tmp_path) as held:
        held.say(url)
        (found,) = instance(EdgeSettings(), tmp_path)

    assert found.status == "WARN"
    assert f"kill {os.getpid()}" in found.todo


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("LoadState=loaded\nActiveState=active\nResult=success", {"unit": "OK"}),
        ("LoadState=loaded\nActiveState=inactive\nResult=success", {"unit": "OK"}),
        ("LoadState=loaded\nActiveState=failed\nResult=exit-code", {"unit": "FAIL"}),
        ("LoadState=not-found\nActiveState=inactive", {}),
        ("Failed to connect to bus", {}),
    ],
)
def test_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: str, expected: dict[str, str]) -> None:
    """What systemd says of it; nothing where there is no unit, no bus."""
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\ncat <<'END'\n{shown}\nEND\n")
    systemctl.chmod(stat.S_IRWXU)
    monkeypatch.setattr(module.shutil, "which", lambda _: str(systemctl))

    assert by_check(unit()) == expected


def test_no_systemd_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on other systems."""
    monkeypatch.setattr(module.shutil, "which", lambda _: None)
    assert list(unit()) == []
