"""What a check found, and the run of them all: one that breaks is a finding too, and keeps no other from its own."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from shared.errors import CausewayError

Status = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`todo` says what to do about it; empty where there is nothing to do."""

    check: str
    status: Status
    said: str
    todo: str = ""


Check = Callable[[], Iterator[Finding]]


def ok(check: str, said: str) -> Finding:
    return Finding(check, "OK", said)


def warn(check: str, said: str, todo: str) -> Finding:
    return Finding(check, "WARN", said, todo)


def fail(check: str, said: str, todo: str) -> Finding:
    return Finding(check, "FAIL", said, todo)


def examine(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """All findings, each as soon as it is made."""
    for name, check in checks:
        try:
            yield from check()
        except CausewayError as error:
            yield fail(name, error.message, "correct it as the message says")
        except Exception as error:
            yield fail(name, f"the check itself broke: {type(error).__name__}: {error}", "report this as a bug")
