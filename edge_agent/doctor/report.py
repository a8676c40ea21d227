"""All checks in order, and how they are shown."""

import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from edge_agent.api.credentials import state_folder
from edge_agent.doctor.cloud import cloud
from edge_agent.doctor.daemon import files, instance, policy, settings_hold, unit
from edge_agent.doctor.findings import Check, Finding, examine, fail
from edge_agent.doctor.machine import disk, model, network, runtime
from edge_agent.service import cloud_backend
from edge_agent.settings import EdgeSettings
from shared.config import InvalidSettings
from shared.models import default_store

NAME_WIDTH, STATUS_WIDTH = 9, 5


def diagnose(load: Callable[[], EdgeSettings], env: Mapping[str, str], home: Path) -> Iterator[Finding]:
    """Looks and tries; changes nothing, and asks nobody but the configured cloud. Settings that cannot be loaded are a
    finding, after which only what needs none is looked at."""
    try:
        settings = load()
    except InvalidSettings as error:
        yield fail("settings", error.message, "correct it as the message says")
        yield from examine([("runtime", runtime), ("unit", unit)])
        return
    state, store = settings.state_dir or state_folder(env, home), default_store(env, home)
    checks: list[tuple[str, Check]] = [
        ("settings", partial(settings_hold, settings)),
        ("runtime", runtime),
        ("model", partial(model, settings, store)),
        ("disk", partial(disk, (state, store))),
        ("files", partial(files, settings, state)),
        ("policy", partial(policy, settings)),
        ("daemon", partial(instance, settings, state)),
        ("unit", unit),
        ("network", partial(network, settings)),
        ("cloud", partial(cloud, settings, cloud_backend)),
    ]
    yield from examine(checks)


def shown(finding: Finding) -> str:
    """Lines for a terminal: status, check, what was found, and what to do about it."""
    indent = " " * (STATUS_WIDTH + NAME_WIDTH)
    width = max(40, shutil.get_terminal_size().columns)
    fill = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)
    head = f"{finding.status:<{STATUS_WIDTH}}{finding.check:<{NAME_WIDTH}}"
    lines = [fill(finding.said, initial_indent=head)]
    if finding.todo:
        lines.append(fill(f"-> {finding.todo}", initial_indent=indent))
    return "\n".join(lines)
