"""What the demo shows while it runs: a live table, or plain lines."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from kvcached.config import format_size
from kvcached.demo.figures import Recording, Stats
from kvcached.demo.workload import ENGINES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BAR = 22
"""Characters of a bar: the table fits 80 columns."""
_PARTS = (("in_use", "█", "blue"), ("cached", "▓", "yellow"), ("spare", "░", "green"))
_LIVE_SECONDS, _PLAIN_SECONDS = 0.1, 2.0


class View(Protocol):
    """Where the demo says what happens."""

    def say(self, text: str) -> None:
        """One line of news."""
        ...

    def start(self, recording: Recording, budget: int) -> None:
        """A run begins."""
        ...

    def update(self, recording: Recording | None) -> None:
        """Something may have changed; called often."""
        ...


def bar_cells(stats: Stats, budget: int, width: int = BAR) -> list[tuple[str, str]]:
    """The bar of one engine: ``(text, colour)`` pieces, ``width`` characters in all.

    In use, cached and spare by character and colour; ``·`` is room up to the limit, ``|`` the
    limit itself.
    """
    pieces: list[tuple[str, str]] = []
    used = total = 0
    for key, character, colour in _PARTS:
        total += stats.get(key, 0)
        end = min(width, round(width * total / max(budget, 1)))
        pieces.append((character * (end - used), colour))
        used = end
    limit = min(width, round(width * stats.get("limit", 0) / max(budget, 1)))
    room = max(0, limit - used)
    mark = "|" if used + room < width else ""
    pieces.append(("·" * room + mark, "bright_black"))
    pieces.append((" " * (width - used - room - len(mark)), ""))
    return pieces


def progress(recording: Recording) -> str:
    """How far the requests are."""
    return f"{recording.name}: {recording.done} of {len(recording.outcomes)} requests done"


class PlainView:
    """Lines of text, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._budget = 0
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        """See ``View.say``."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, recording: Recording, budget: int) -> None:
        """See ``View.start``."""
        self._budget = budget
        self.say(f"--- {recording.name} ---")

    def update(self, recording: Recording | None) -> None:
        """See ``View.update``. A line every two seconds."""
        now = time.monotonic()
        if recording is None or now < self._next:
            return
        self._next = now + _PLAIN_SECONDS
        held = ", ".join(
            f"{name} {format_size(recording.latest(name).get('in_use', 0))} in use of "
            f"{format_size(recording.latest(name).get('backed', 0))} backed"
            for name in ENGINES
        )
        self.say(f"{now - recording.start:5.1f} s  {progress(recording)}; {held}")


class LiveView:
    """A table that redraws itself, with a bar for each engine."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._budget = 0
        self._next = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._live.stop()

    def say(self, text: str) -> None:
        """See ``View.say``. Printed above the table."""
        self._console.print(text, markup=False, highlight=False)

    def start(self, recording: Recording, budget: int) -> None:
        """See ``View.start``."""
        self._budget = budget
        self.say("static split in two" if recording.name == "static" else "elastic")

    def update(self, recording: Recording | None) -> None:
        """See ``View.update``. Ten times a second."""
        now = time.monotonic()
        if recording is None or now < self._next:
            return
        self._next = now + _LIVE_SECONDS
        self._live.update(table(recording, self._budget, now - recording.start), refresh=True)


def table(recording: Recording, budget: int, seconds: float) -> Table:
    """The live table of one moment."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    title = f"{progress(recording)}, {seconds:.0f} s"
    made = Table(
        title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left"
    )
    headings = ("engine", f"of {format_size(budget)}", "in use", "cached", "spare", "lease",
                "limit", "run", "wait")  # fmt: skip
    for index, heading in enumerate(headings):
        made.add_column(heading, justify="left" if index < 2 else "right", no_wrap=True)
    for name in ENGINES:
        stats = recording.latest(name)
        bar = Text.assemble(*bar_cells(stats, budget))
        sizes = [_mib(stats.get(k, 0)) for k in ("in_use", "cached", "spare", "lease", "limit")]
        counts = [str(stats.get(k, 0)) for k in ("running", "waiting")]
        made.add_row(name, bar, *sizes, *counts)
    made.caption = "MiB.  █ in use  ▓ cached  ░ spare  · room up to the limit |"
    return made


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f}"
