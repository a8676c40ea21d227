"""The CPU kernels in C++ beside this file: compiled once for this machine by its own compiler, called by address.

The compiled library lies in the user's cache folder under a hash of the sources, the flags, the compiler and the
processor; it gets there by a rename, so that processes that start together never load half a file. OpenMP is the
runtime that torch has loaded already: both share one pool of threads.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILE_S = 300.0
"""The longest that the compiler may take: two seconds on an idle machine."""

BFLOAT16, INT8, FLOAT32 = 1, 2, 4
"""Bits of `features`: which matrix kernels the processor has instructions for."""


class NativeUnavailable(Exception):
    """These kernels cannot be had here; the message says why."""


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled if need be, once a process. Raises NativeUnavailable. CAUSEWAY_NATIVE=0 forbids them."""
    if os.environ.get("CAUSEWAY_NATIVE") == "0":
        raise NativeUnavailable("CAUSEWAY_NATIVE is 0")
    return load(cache_folder(os.environ, Path.home()), os.environ.get("CXX", "c++"))


@functools.cache
def features() -> int:
    """Which matrix kernels there are; none without the library."""
    try:
        return int(library().features())
    except NativeUnavailable:
        return 0


def load(folder: Path, compiler: str) -> ctypes.CDLL:
    """The library from `folder`, where it is put if it is not there. Raises NativeUnavailable."""
    found = shutil.which(compiler)
    if found is None:
        raise NativeUnavailable(f"there is no compiler {compiler}")
    try:
        file = folder / f"{_key(found)}.so"
        if not file.exists():
            _compile(found, file)
        return ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{type(error).__name__}: {error}") from error


def cache_folder(env: Mapping[str, str], home: Path) -> Path:
    base = Path(env.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else home / ".cache") / "causeway" / "native"


def threads() -> int:
    return torch.get_num_threads()


def _sources() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.cpp"))


def _key(compiler: str) -> str:
    """What the machine code depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=COMPILE_S).stdout
    digest = hashlib.sha256("\0".join((compiler, *FLAGS, platform.machine(), _processor())).encode() + version)
    for source in sorted(Path(__file__).parent.glob("*.[ch]*")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _processor() -> str:
    """The instructions it has: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(compiler: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        made = Path(scratch) / file.name
        command = [compiler, *FLAGS, *map(str, _sources()), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
        if done.returncode:
            raise NativeUnavailable(f"{compiler} failed: {done.stderr.strip()[:500]}")
        made.replace(file)
