"""How far the chain of acts has come, kept beside it and signed: without it, nobody could tell a history that was
deleted, or put back from an old copy, from one that never was more.

It is written after each act, so it may be behind the chain (the power went in between) but never ahead of it.
"""

import os
from pathlib import Path
from typing import Final

import msgspec
import structlog

from edge_agent.policies.signer import Signer

MAX_BYTES: Final = 4096


class Head(msgspec.Struct, frozen=True):
    """The last act's number and hash, and the newest of the fleet's policies that were taken: its version there and the
    SHA-256 of what was signed."""

    number: int
    digest: bytes
    fleet: int = 0
    fleet_digest: str = ""


class _Signed(msgspec.Struct, frozen=True):
    head: msgspec.Raw
    signature: bytes


class Anchor:
    def __init__(self, path: Path, signer: Signer) -> None:
        self._path, self._signer = path, signer

    def read(self) -> Head | None:
        """None if there is none, or none that this device has signed."""
        try:
            with self._path.open("rb") as stream:
                found = msgspec.json.decode(stream.read(MAX_BYTES), type=_Signed)
            if self._signer.signed(bytes(found.head), found.signature):
                return msgspec.json.decode(found.head, type=Head)
            why = "not signed by this device"
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeError) as error:
            why = str(error)
        structlog.get_logger("causeway.policy").error("anchor of the history unreadable", file=self._path.name, why=why)
        return None

    def write(self, head: Head) -> None:
        """Whole or not at all. What cannot be written is logged: the acts themselves are kept."""
        content = msgspec.json.encode(head)
        signed = msgspec.json.encode(_Signed(msgspec.Raw(content), self._signer.sign(content)))
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
                stream.write(signed)
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(self._path)
        except OSError as error:
            structlog.get_logger("causeway.policy").error("anchor of the history not written", why=str(error))
