"""What `edge-agent ps` shows of `/admin/models`: two tables, and a dash for whatever nothing was measured of yet.

NAME  SIZE  PROCESSOR  CONTEXT  RUNNING  QUEUED  UNTIL         what is in memory, and when it goes
NAME  PROMPT  WRITING  FIRST TOKEN  WHOLE ANSWER  …            how fast it was, and would be: here and in the cloud
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from router.money import spelled

NOTHING: Final = "-"
SHORTEST_NAME: Final = 12

Row = tuple[str, ...]


def shown(found: dict[str, Any], *, now: datetime, width: int | None = None) -> str:
    """`width` in characters, where a terminal has one: names are cut to fit it, and nothing else is."""
    asked, free = found["asked"], found["memory_available"]
    lines = _table(_in_memory(found["loaded"], now), width)
    if free is not None:
        lines += [f"{_bytes(free)} of memory can still be had"]
    prompt = f"a prompt of {asked['prompt_tokens']} tokens, an answer of {asked['answer_tokens']}"
    lines += ["", f"Tokens/s as measured; predicted for {prompt}:", *_table(_speeds(found), width)]
    return "\n".join(lines)


def _in_memory(loaded: Sequence[dict[str, Any]], now: datetime) -> list[Row]:
    titles = ("NAME", "SIZE", "PROCESSOR", "CONTEXT", "RUNNING", "QUEUED", "UNTIL")
    return [titles] + [
        (
            model["name"],
            _bytes(model["size"]) if model["state"] == "loaded" else "loading",
            model["processor"],
            str(model["context_length"]),
            str(max(0, model["running"] - model["queued"])),
            str(model["queued"]),
            _until(model, now),
        )
        for model in loaded
    ]


def _speeds(found: dict[str, Any]) -> list[Row]:
    rows: list[Row] = [("NAME", "PROMPT", "WRITING", "FIRST TOKEN", "WHOLE ANSWER", "BATTERY", "COST")]
    for model in found["loaded"]:
        rates = (_rate(model["prompt_tokens_per_s"]), _rate(model["answer_tokens_per_s"]))
        rows.append((model["name"], *rates, *_predicted(model["predicted"]), NOTHING))
    if (cloud := found["cloud"]) is not None:
        said, currency = cloud["predicted"], cloud["currency"]
        cost = NOTHING if said["cost"] is None else f"{spelled(said['cost'])} {currency}"
        name = f"cloud{'' if cloud['connected'] else ' (away)'}"
        rows.append((name, NOTHING, NOTHING, *_predicted(said), cost))
    return rows


def _predicted(said: dict[str, Any]) -> Row:
    drain = said["battery_percent"]
    battery = NOTHING if drain is None else f"{drain:.2g} %"
    return _seconds(said["first_token_s"]), _seconds(said["total_s"]), battery


def _table(rows: Sequence[Row], width: int | None) -> list[str]:
    """The first column, of names, gives way where it must."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        over = sum(widths) + 2 * (len(widths) - 1) - width
        widths[0] = max(min(widths[0], SHORTEST_NAME), widths[0] - max(0, over))
    cut = [(_cut(row[0], widths[0]), *row[1:]) for row in rows]
    return ["  ".join(cell.ljust(to) for cell, to in zip(row, widths, strict=True)).rstrip() for row in cut]


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _until(model: dict[str, Any], now: datetime) -> str:
    if model["stays"]:
        return "it is stopped"
    if model["expires_at"] is None:
        return "its last answer"
    left = max(0.0, (datetime.fromisoformat(model["expires_at"]) - now).total_seconds())
    return f"{left / 60:.0f} min idle" if left >= 90 else f"{left:.0f} s idle"


def _bytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size < 10e9 else f"{size / 1e9:.1f} GB"


def _rate(per_s: float | None) -> str:
    return NOTHING if per_s is None else f"{per_s:.0f}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
