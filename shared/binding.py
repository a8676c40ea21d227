"""Where a daemon may listen: what its settings say of that, checked before anything heavy is imported."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from shared.config import InvalidSettings


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM: the certificate chain and its private key."""

    cert: Path
    key: Path


def is_loopback(host: str) -> bool:
    """A name other than localhost may resolve to anything, so it is not loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def check_bind(host: str, *, tls: bool, keys: bool) -> None:
    """Beyond loopback only with keys and TLS. Raises InvalidSettings: the daemon must not start."""
    if is_loopback(host):
        return
    missing = [name for name, given in (("keys", keys), ("TLS", tls)) if not given]
    if missing:
        raise InvalidSettings(f"host {host} is not loopback: {' and '.join(missing)} must be given", param="host")
