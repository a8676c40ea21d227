"""What this device must have: the native runtime, a whole model, memory, disk, a network where a cloud is wanted."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from edge_agent.backends.base import DEFAULT_CONTEXT
from edge_agent.doctor.findings import Finding, fail, ok, warn
from edge_agent.facts import facts_of
from edge_agent.models.memory import slots_for
from edge_agent.network import online
from edge_agent.settings import EdgeSettings
from shared.models import manifest_of, resolve, verify

IMPORT_S = 60.0
OVERHEAD = 300_000_000
"""What the daemon takes beside the model and its cache of keys and values, at most."""
LITTLE_DISK, NO_DISK = 2_000_000_000, 200_000_000
COMPILERS = ("c++", "g++", "clang++", "cl")
PROBE = "import llama_cpp, sys; sys.stdout.write(llama_cpp.__version__)"


def runtime() -> Iterator[Finding]:
    """Imported by another process: native code that does not fit this processor takes its process with it."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=IMPORT_S, check=False)
    if done.returncode == 0:
        yield ok("runtime", f"llama.cpp loads (llama-cpp-python {done.stdout.strip()})")
        return
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    why = f"killed by signal {-done.returncode}" if done.returncode < 0 else _last_line(done.stderr)
    if compiler is None:
        install = "install a C++ compiler (g++ or clang) and cmake, then `pip install 'causeway[edge]'`"
        yield fail(
            "runtime", f"llama.cpp does not load ({why}), and there is no C++ compiler to build it with", install
        )
    else:
        rebuild = "build it here: `pip install --force-reinstall --no-binary llama-cpp-python 'causeway[edge]'`"
        yield fail("runtime", f"llama.cpp does not load ({why}); there is a compiler, {compiler}", rebuild)


def model(settings: EdgeSettings, store: Path) -> Iterator[Finding]:
    """There, whole by its header and its SHA-256, small enough for this memory. Raises UnknownModel, ModelInvalid."""
    path = resolve(settings.model, store=store)
    facts = facts_of(path)
    verify(path)
    size = path.stat().st_size
    pulled = "SHA-256 as pulled" if manifest_of(path) else "header sound; no manifest to hold its bytes against"
    yield ok("model", f"{settings.model}: {facts.architecture}, {_mb(size)}, {pulled}")
    context = min(settings.context or DEFAULT_CONTEXT, facts.context_length or DEFAULT_CONTEXT)
    slots = settings.slots or slots_for(facts, context, psutil.virtual_memory().total)
    yield from memory(size, facts.kv_bytes * context * slots)


def memory(model_bytes: int, cache_bytes: int, available: Callable[[], int] | None = None) -> Iterator[Finding]:
    """Available memory against what a daemon takes."""
    free = available() if available else psutil.virtual_memory().available
    need = model_bytes + cache_bytes + OVERHEAD
    said = f"{_mb(free)} can be had, {_mb(need)} are needed ({_mb(model_bytes)} model, {_mb(cache_bytes)} slots)"
    smaller = "close other programs, take a smaller model, or set fewer slots or less context"
    if free < model_bytes:
        yield fail("memory", said, smaller)
    else:
        yield ok("memory", said) if free >= need else warn("memory", said, smaller)


def disk(folders: tuple[Path, ...], free_of: Callable[[Path], int] | None = None) -> Iterator[Finding]:
    """Where state and models lie; each file system once."""
    seen: set[int] = set()
    for folder in folders:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        if (device := there.stat().st_dev) in seen:
            continue
        seen.add(device)
        free = free_of(there) if free_of else shutil.disk_usage(there).free
        said = f"{_mb(free)} free at {there}"
        if not os.access(there, os.W_OK):
            yield fail("disk", f"{there} cannot be written", "give yourself the right to, or set another state_dir")
        elif free < NO_DISK:
            yield fail("disk", said, "make room: journal, cache and models cannot be written")
        else:
            yield ok("disk", said) if free >= LITTLE_DISK else warn("disk", said, "make room before pulling a model")


def network(settings: EdgeSettings, sensor: Callable[[], bool | None] = online) -> Iterator[Finding]:
    """Only where a cloud is wanted: the edge needs none."""
    if settings.cloud_in_use is None:
        return
    match sensor():
        case None:
            yield ok("network", "this system does not tell")
        case True:
            yield ok("network", "there is a route out")
        case False:
            yield warn("network", "no route out of this device", "connect it; until then only a cloud on it is reached")


def _mb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10_000_000_000 else f"{size / 1e6:.0f} MB"


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2] or "no reason given"
