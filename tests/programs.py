"""Programs that some tests need besides Python: found, or installed where that is possible."""

import os
import shutil
import subprocess

import pytest

INSTALL_S = 600


def program(*names: str, package: str) -> str:
    """The path of the first of these programs that is there, after installing Debian's `package` if none is."""
    if found := _first(names):
        return found
    if os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", package]):
            subprocess.run(command, env=quiet, check=False, capture_output=True, timeout=INSTALL_S)
    if found := _first(names):
        return found
    pytest.fail(f"this test needs {names[0]}: install the package {package}")


def _first(names: tuple[str, ...]) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)
