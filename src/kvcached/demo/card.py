"""The result card: static against elastic, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvcached.config import format_size

if TYPE_CHECKING:
    from rich.table import Table

_Row = tuple[str, Callable[[dict[str, Any]], str]]


def _ms(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda run: f"{run['ttft_ms'][key]:,.0f} ms"


def _size(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda run: format_size(run[key])


def _count(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda run: f"{run[key]}"


ROWS: tuple[_Row, ...] = (
    ("requests done", _count("requests_done")),
    ("requests that waited for memory", _count("requests_queued")),
    ("preemptions", _count("preemptions")),
    ("time to first token, mean", _ms("mean")),
    ("time to first token, p50", _ms("p50")),
    ("time to first token, p99", _ms("p99")),
    ("tokens/s", lambda run: f"{run['tokens_per_s']:.1f}"),
    ("memory, peak", _size("peak_backed_bytes")),
    ("memory, mean", _size("mean_backed_bytes")),
    ("memory, idle", _size("idle_backed_bytes")),
)


def card(document: dict[str, Any]) -> Table:
    """The table; ``notes`` has the sentences below it."""
    from rich.table import Table

    title = f"{document['model']}, two engines, one budget of "
    made = Table(title=title + format_size(document["budget_bytes"]))
    made.add_column("")
    for heading in ("static split", "elastic"):
        made.add_column(heading, justify="right", no_wrap=True)
    for label, read in ROWS:
        made.add_row(label, read(document["static"]), read(document["elastic"]))
    return made


def notes(document: dict[str, Any]) -> list[str]:
    """What the table does not say, one sentence each."""
    limit, kill = document["limit"], document["kill"]
    lowered = (
        f"limit lowered to {format_size(limit['requested_bytes'])} on a busy engine that held "
        f"{format_size(limit['before_bytes'])}: holds {format_size(limit['held_bytes'])} after "
        f"{limit['ms']:.0f} ms"
    )
    killed = (
        f"kill -9 of an engine: {format_size(kill['bytes_returned'])} came back and were in use "
        f"by the other one after {kill['ms']:.0f} ms"
    )
    return [lowered, killed, _tokens(document)]


def _tokens(document: dict[str, Any]) -> str:
    compared = document["tokens_compared"]
    count, equal = compared["requests"], compared["equal"]
    ties = sum(item["tie"] for item in compared["differences"])
    wrong = count - equal - ties
    if wrong:
        return f"TOKENS DIFFER in {wrong} of {count} requests"
    tied = f" ({ties} of them but for a tie of two logits)" if ties else ""
    return f"tokens identical in both runs for all {count} requests{tied}"
