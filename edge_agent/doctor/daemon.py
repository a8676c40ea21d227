"""What the daemon needs: settings and policy that hold, files of its user alone, a free port, no other in its place."""

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from edge_agent.doctor.findings import Finding, fail, ok, warn
from edge_agent.instance import Instance, running
from edge_agent.policy_file import PolicyFile
from edge_agent.settings import EdgeSettings, check
from shared.config import InvalidSettings
from shared.serving import bind

ASK_S = 5.0
UNIT = "edge-agent.service"
SECRETS = frozenset({"admin.token", "client.token", "audit.key"})
"""Of the state folder: what others must not read. The rest tells them what was asked when, and is only warned of."""


def settings_hold(settings: EdgeSettings) -> Iterator[Finding]:
    """Raises InvalidSettings for what would be unsafe."""
    check(settings)
    yield ok("settings", f"can be started with: {settings.host}, port {settings.port}")


def policy(settings: EdgeSettings) -> Iterator[Finding]:
    """Raises InvalidPolicy naming line and field."""
    policy = PolicyFile(settings.policy).policy
    name = settings.policy or "the built-in one"
    yield ok("policy", f"{name}: valid, mode {policy.mode}, {len(policy.rules)} rules")


def files(settings: EdgeSettings, state: Path) -> Iterator[Finding]:
    """Whose they are and who else reads them."""
    found = [*_secrets(settings, state), *_private(settings, state)]
    yield from found
    if not found:
        yield ok("files", f"{state} and all secrets are yours alone")


def _secrets(settings: EdgeSettings, state: Path) -> Iterator[Finding]:
    given = (settings.key_file, settings.keys, settings.tls_key)
    for path in (*filter(None, given), *(state / name for name in sorted(SECRETS))):
        if not path.exists():
            if path in given:
                yield fail("files", f"{path} is not there", "make it, or correct the setting that names it")
            continue
        if not os.access(path, os.R_OK):
            yield fail("files", f"{path} cannot be read", f"give it to this user: `chown $USER {path}`")
        elif _others(path):
            yield fail(
                "files", f"other users can read the secret in {path}", f"`chmod 600 {path}`, then make a new one"
            )


def _private(settings: EdgeSettings, state: Path) -> Iterator[Finding]:
    """What lies in a folder that nobody else can enter is read by nobody else."""
    inside = [path for path in sorted(state.iterdir()) if path.name not in SECRETS] if state.is_dir() else []
    reachable = inside if state.is_dir() and _others(state) else []
    log = [settings.log_file] if settings.log_file else []
    for path in (state, *inside, *log):
        if path.exists() and hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            yield fail("files", f"{path} belongs to another user", f"`chown -R $USER {path}`, or set another state_dir")
    for path in (state, *reachable, *log):
        if path.exists() and _others(path):
            mode = 700 if path.is_dir() else 600
            yield warn("files", f"other users can read {path}", f"`chmod {mode} {path}`")


def _others(path: Path) -> int:
    return 0 if sys.platform == "win32" else stat.S_IMODE(path.stat().st_mode) & 0o077


def instance(settings: EdgeSettings, state: Path) -> Iterator[Finding]:
    """Who runs here, and whose the port is."""
    there = running(state)
    if there is None:
        yield ok("daemon", "none runs: `edge-agent serve` starts it")
        yield from port(settings)
        return
    try:
        reply = httpx.get(f"{there.url}/health", timeout=ASK_S, trust_env=False, verify=False)  # noqa: S501 - ourselves
        told = reply.json()["status"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        yield warn("daemon", f"it runs ({there}) and does not answer", _restart(there))
        return
    if told == "ok":
        yield ok("daemon", f"it runs ({there}) and can answer")
    else:
        yield warn("daemon", f"it runs ({there}) and says: {told}", f"look at its log; {_restart(there)}")


def port(settings: EdgeSettings) -> Iterator[Finding]:
    """Free, or whose it is as far as this system tells."""
    try:
        bind(settings.host, settings.port).close()
    except InvalidSettings as error:
        owner = _listener(settings.port)
        yield fail("port", f"{error.message}{owner}", "stop that program, or set another port")
    else:
        yield ok("port", f"{settings.port} is free at {settings.host}")


def _listener(number: int) -> str:
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == number and one.pid:
                return f": process {one.pid}, {psutil.Process(one.pid).name()}, listens there"
    except psutil.Error:  # other users' sockets are not ours to see
        pass
    return ""


def unit() -> Iterator[Finding]:
    """The systemd user unit, where there is systemd and the unit is installed."""
    if (systemctl := shutil.which("systemctl")) is None:
        return
    asked = [systemctl, "--user", "show", UNIT, "--property=LoadState,ActiveState,Result"]
    try:
        shown = subprocess.run(asked, capture_output=True, text=True, timeout=ASK_S, check=False)
    except subprocess.TimeoutExpired:
        return
    state = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    if shown.returncode or state.get("LoadState") in (None, "not-found"):
        return
    active = state.get("ActiveState", "unknown")
    if active == "failed":
        look = f"`journalctl --user -u {UNIT} -n 50`, then `systemctl --user restart {UNIT}`"
        yield fail("unit", f"{UNIT} failed: {state.get('Result', 'unknown')}", look)
    else:
        yield ok("unit", f"{UNIT} is {active}")


def _restart(there: Instance) -> str:
    return f"end it with `kill {there.pid}` and start it again" if there.pid else "end it and start it again"
