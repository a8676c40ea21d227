"""The policy in force when the administrator has written none. The one module here that reads a file: its own."""

from importlib import resources

from router.policy import Policy, parse

NAME = "default_policy.yaml"


def default_policy() -> Policy:
    return parse(default_source(), name=NAME)


def default_source() -> bytes:
    """As it is written."""
    return (resources.files("router") / NAME).read_bytes()
