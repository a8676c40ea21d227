"""What the scheduler counts."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_host_hit_tokens: int = 0
    """Of the hits, those that were in host memory."""
    preemptions: int = 0
    chunks: int = 0
    """Steps of a sequence that computed a part of what it lacked."""
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    """Of the drafted ones, those that were right."""
    expired: int = 0
    """Requests refused or ended because of their deadline."""
