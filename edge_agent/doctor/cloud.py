"""Whether the cloud can be reached as the daemon would: its certificate, its clock, our key. No model is asked."""

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx

from edge_agent.backends.cloud import NO_CLOUD, CloudBackend, switched_off
from edge_agent.doctor.findings import Finding, fail, ok, warn
from edge_agent.settings import EdgeSettings
from shared.errors import CausewayError, Forbidden, Unauthorized

REACH_S = 8.0
SKEW_S = 30.0
"""Clocks further apart confuse logs, and soon certificates."""
EXPIRY_DAYS = 14


def cloud(
    settings: EdgeSettings, backend: Callable[[EdgeSettings], CloudBackend | None], now: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """`backend` makes what the daemon would connect with. Raises InvalidSettings."""
    if settings.cloud is None:
        yield ok("cloud", "none is configured: everything is answered here")
        return
    if switched_off(os.environ) or settings.no_cloud:
        yield ok("cloud", f"switched off ({NO_CLOUD if switched_off(os.environ) else 'no_cloud'}): not tried")
        return
    connection = backend(settings)
    if connection is None:
        return
    yield asyncio.run(_reached(connection))
    yield from _looked_at(settings, now)


async def _reached(connection: CloudBackend) -> Finding:
    try:
        link = await connection.reach(REACH_S)
    except (Unauthorized, Forbidden) as error:
        return fail("cloud", error.message, "get a key from its administrator (`cloud-engine keys new`) into key_file")
    except CausewayError as error:
        return fail("cloud", error.message, _todo(error.message))
    finally:
        await connection.aclose()
    trip = "" if link.round_trip_s is None else f", round trip {link.round_trip_s * 1000:.0f} ms"
    return ok("cloud", f"connected, key accepted: serves {link.model or 'no named model'}{trip}")


def _todo(message: str) -> str:
    if "certificate" in message:
        return "name its authority's certificate in cloud_ca; if you know none, ask who runs it: do not go on without"
    return "check the address, and that it runs; local answers need none"


def _looked_at(settings: EdgeSettings, now: Callable[[], float]) -> Iterator[Finding]:
    """By plain HTTP(S): the Date header and the certificate's end."""
    parts = urlsplit(settings.cloud or "")
    scheme, trust = (
        ("https", ssl.create_default_context(cafile=settings.cloud_ca)) if parts.scheme == "wss" else ("http", True)
    )
    try:
        with (
            httpx.Client(timeout=REACH_S, verify=trust, trust_env=False) as client,
            client.stream("GET", f"{scheme}://{parts.netloc}/health") as reply,
        ):
            date = reply.headers.get("date", "")
            tls = reply.extensions["network_stream"].get_extra_info("ssl_object")
            certificate = tls.getpeercert() if tls else None
    except httpx.HTTPError:
        return  # whether it can be reached at all has been said
    if (skew := _skew(date, now())) is not None:
        said = f"the cloud's clock and this one are {abs(skew):.0f} s apart"
        yield ok("clock", said) if abs(skew) <= SKEW_S else warn("clock", said, "set this device's clock (NTP)")
    if certificate and "notAfter" in certificate:
        days = (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - now()) / 86_400
        said = f"the cloud's certificate holds for {days:.0f} days more"
        yield ok("tls", said) if days > EXPIRY_DAYS else warn("tls", said, "tell who runs it")


def _skew(date: str, now: float) -> float | None:
    """Seconds that our clock is ahead. A second of rounding and the way there are in it."""
    try:
        there = parsedate_to_datetime(date)
    except ValueError:
        return None
    return (datetime.fromtimestamp(now, UTC) - there).total_seconds() if there.tzinfo else None
