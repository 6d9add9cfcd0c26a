"""What the commands print: tables that fit the terminal, errors in one form, JSON."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from kvcached.errors import (
    BrokerUnavailable,
    BudgetExceeded,
    InvalidInput,
    KvcachedError,
    NotAllowed,
    OutOfPages,
    UnknownName,
    UnsafeRuntimeDir,
)
from kvcached.stats import SCHEMA_VERSION

_EXIT_CODES: tuple[tuple[type[KvcachedError], int], ...] = (
    (InvalidInput, 2),
    (UnknownName, 3),
    (NotAllowed, 4),
    (UnsafeRuntimeDir, 4),
    (BrokerUnavailable, 5),
    (BudgetExceeded, 6),
    (OutOfPages, 6),
)


def exit_code(error: KvcachedError) -> int:
    """The exit status that tells a script what kind of error it was."""
    return next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), 1)


def format_error(error: KvcachedError) -> str:
    """``error[KV410]: no tenant named 'qwen'`` and, below, what to try."""
    lines = [f"error[{error.code}]: {error.message}"]
    lines += [f"  try     {line}" for line in error.hint.splitlines()]
    return "\n".join(lines)


def print_json(data: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write one JSON object to stdout; its first field is the version of the schema."""
    print(json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=indent), flush=True)


def note(text: str) -> None:
    """Say something to the person at the terminal, and not to the pipe."""
    print(text, file=sys.stderr)


def terminal_width() -> int | None:
    """Columns of the terminal on stdout; ``None`` if it is a file or a pipe, which fit any line."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    width: int | None,
    left: Collection[int] = (0,),
) -> str:
    """Columns of text, those with an index in ``left`` flush left, the others right.

    With a ``width``, the first column is shortened until the lines fit.
    """
    lines = [list(headers), *map(list, rows)]
    widths = _widths(lines)
    if width is not None:
        widths[0] = max(4, widths[0] - max(0, _across(widths) - width))
    return "\n".join(_line(line, widths, left) for line in lines)


def fits(headers: Sequence[str], rows: Iterable[Sequence[str]], width: int | None) -> bool:
    """Whether a table has room for all that is in it."""
    return width is None or _across(_widths([headers, *rows])) <= width


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _across(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _line(cells: Sequence[str], widths: Sequence[int], left: Collection[int]) -> str:
    cells = [shorten(cells[0], widths[0]), *cells[1:]]
    padded = [
        cell.ljust(width) if i in left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns; the middle goes, as names differ at their ends."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}~{text[len(text) - tail :]}"


def format_age(seconds: float) -> str:
    """A duration in one unit: ``"12 s"``, ``"5 min"``, ``"3 h"``, ``"2 d"``."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"
