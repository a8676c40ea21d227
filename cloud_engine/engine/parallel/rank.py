"""A rank other than 0, a process of its own: `python -m cloud_engine.engine.parallel.rank FD`.

FD is its end of a socket pair. It does what it is told there until rank 0 is gone, however that ends: standard input is
a pipe whose other end rank 0 alone holds, and its end is this process's end, whatever it may be waiting for.
"""

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TypeVar

import torch

from cloud_engine.engine.parallel.messages import Begin, Channel, Failed, Load, Reached, Step, ToRank
from cloud_engine.engine.parallel.part import Part

M = TypeVar("M", Load, Begin, Step)


def serve(channel: Channel[ToRank]) -> None:
    """Until the other end is closed (EOFError)."""
    channel.send(Reached("awake"))
    load = _expect(channel.receive(), Load)
    torch.set_num_threads(load.threads)
    if load.config.device == "cuda":
        torch.cuda.set_device(load.rank)
    part = Part(Path(load.path), load.config, load.rank, Path(load.meeting))
    channel.send(Reached("loaded", part.room(load.config)))
    begin = _expect(channel.receive(), Begin)
    runner = part.runner(begin.config, begin.text)
    channel.send(Reached("ready"))
    while True:
        step = _expect(channel.receive(), Step)
        runner.run(step.chunks, torch.tensor(step.last, device=runner.device) if step.last else None)


def _expect(message: ToRank, kind: type[M]) -> M:
    if not isinstance(message, kind):
        raise TypeError(f"{type(message).__name__} came where {kind.__name__} belongs")
    return message


def _end_with_rank_0() -> None:
    while os.read(0, 1024):
        pass
    os._exit(0)


def main() -> None:
    # Rank 0 has requests to finish before it stops, but a terminal or systemd tells every process at once.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    channel = Channel[ToRank](socket.socket(fileno=int(sys.argv[1])), ToRank)
    try:
        serve(channel)
    except EOFError:
        return
    except Exception as error:  # whatever it was, rank 0 shall know it
        channel.send(Failed(f"{type(error).__name__}: {error}"))
        sys.exit(1)


if __name__ == "__main__":
    main()
