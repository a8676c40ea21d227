"""The daemon's life: check, load, serve, drain, close. While the model loads in its own process, all else is imported
and opened here.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

from edge_agent.api.credentials import state_folder
from edge_agent.backends.llama import LlamaBackend
from edge_agent.backends.spawn import Spare
from edge_agent.instance import Held, hold
from edge_agent.models.library import Library
from edge_agent.models.memory import machine_memory
from edge_agent.models.residents import Rules
from edge_agent.reload import LiveSettings
from edge_agent.settings import EdgeSettings, check
from shared.models import default_store, resolve

Serve = Callable[[Library, asyncio.Task[None], EdgeSettings, LiveSettings, Path, Held], Awaitable[None]]


async def run(settings: EdgeSettings, live: LiveSettings | None = None, spare: Spare | None = None) -> None:
    """Serve until SIGTERM or SIGINT. Raises CausewayError, before anything listens, if it must not or cannot start.

    `live` are the same settings as they can be read again; without it there is nothing to read. The model is loaded by
    the `spare`, if there is one.
    """
    check(settings)
    state = settings.state_dir or state_folder(os.environ, Path.home())
    with hold(state) as held:
        await _serve(settings, live or LiveSettings(settings), state, held, spare)


async def _serve(settings: EdgeSettings, live: LiveSettings, state: Path, held: Held, spare: Spare | None) -> None:
    local = _local(settings, state, spare)
    async with AsyncExitStack() as closing:
        closing.push_async_callback(local.aclose)
        loading = asyncio.create_task(local.start())
        closing.push_async_callback(_ended, loading)
        await (await asyncio.to_thread(_all_else))(local, loading, settings, live, state, held)


def _all_else() -> Serve:
    """Imported in a thread, so that the loop is there for the model's process."""
    from edge_agent.service import serve_with

    return serve_with


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _local(settings: EdgeSettings, state: Path, spare: Spare | None) -> Library:
    store = default_store(os.environ, Path.home())

    def open_backend(file: Path, slots: int) -> LlamaBackend:
        return LlamaBackend(
            file,
            slots=slots,
            context=settings.context,
            threads=settings.threads,
            queue=settings.queue,
            prefix_bytes=settings.prefix_memory_mb << 20,
            saved=state / "prefixes",
            saved_bytes=settings.prefix_disk_mb << 20,
            context_shift=settings.context_shift,
            spare=spare,
        )

    return Library(
        resolve(settings.model, store=store),
        store,
        open_backend,
        memory=machine_memory(settings.memory_mb and settings.memory_mb << 20),
        rules=Rules(settings.slots, settings.context, settings.queue, settings.keep_s, settings.prefix_memory_mb << 20),
    )
