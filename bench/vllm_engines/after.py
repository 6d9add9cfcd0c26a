"""What follows a burst of elastic engines: a neighbour that wants their memory, and a death."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcached.broker.admin import list_tenants
from kvcached.broker.client import BrokerBudget
from kvcached.errors import KvcachedError
from kvcached.stats import TenantReport

if TYPE_CHECKING:
    from burst import Fleet

CLAIMS = ((8, 8), (8, 64), (24, 1024))
"""A neighbour asks for all memory: how many claims, and which part of all each is for."""
KILL_AFTER_S, LOAD_S, RATE = 4.0, 8.0, 6.0
"""When one engine is killed under a steady load of so many requests a second."""


def reports() -> dict[str, dict[str, Any]]:
    """What each engine holds, by name."""
    return {t.name: t.report.to_dict() for device in list_tenants() for t in device.tenants}


class Neighbour:
    """A tenant that only counts: its claims show when others have given way."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.budget = BrokerBudget("neighbour", device=list_tenants()[0].device, limit_bytes=None)
        self.budget.attach(self, self.lock)

    def reclaim(self, nbytes: int, *, patient: bool) -> int:  # noqa: ARG002 - the protocol's
        """It keeps what it has."""
        return 0

    def report(self) -> TenantReport:
        """All of it is in use."""
        held = self.budget.claimed_bytes
        return TenantReport(backed_bytes=held, in_use_bytes=held, split_floor_bytes=held)

    def close(self) -> None:
        """Give all back."""
        with self.lock:
            self.budget.give_back(self.budget.claimed_bytes)
        self.budget.close()


def reclaim(total: int) -> dict[str, Any]:
    """Milliseconds of a neighbour's claims while the engines are idle, until nothing more comes."""
    kept, neighbour, rows = reports(), Neighbour(), []
    try:
        for size in [total // part for count, part in CLAIMS for _ in range(count)]:
            held = sum(r["backed_bytes"] for n, r in reports().items() if n != "neighbour")
            began = time.perf_counter()
            try:
                with neighbour.lock:
                    neighbour.budget.claim(size)
            except KvcachedError as error:
                rows.append({"bytes": size, "refused": str(error)[:200]})
                continue
            rows.append({"bytes": size, "ms": round((time.perf_counter() - began) * 1e3, 3),
                         "engines_held": held})  # fmt: skip
        time.sleep(1.0)
        return {"kept": kept, "claims": rows, "left": reports()}
    finally:
        neighbour.close()


def under_load(fleet: Fleet, total: int) -> dict[str, Any]:
    """A neighbour claims an eighth of all memory again and again while the engines serve.

    How long its claims take, and what the engines' requests feel of it; the engines themselves say
    in their logs how long a step of theirs has waited (``waited``).
    """
    begin = time.time() + 0.5
    times = [n / RATE for n in range(int(LOAD_S * RATE))]
    for index in range(len(fleet.children)):
        fleet.tell(index, begin=begin, times=times)
    time.sleep(begin + LOAD_S / 2 - time.time())
    claims, at = [], time.time()
    while time.time() < begin + LOAD_S:
        neighbour = Neighbour()  # each time anew: it would keep its lease for a while
        try:
            began = time.perf_counter()
            with neighbour.lock:
                neighbour.budget.claim(total // 8, seconds=2.0)
            claims.append(round((time.perf_counter() - began) * 1e3, 3))
        except KvcachedError:
            claims.append(None)
        finally:
            neighbour.close()
        time.sleep(0.1)
    engines = [engine["rows"] for engine in fleet.answers()]
    rows = [row for some in engines for row in some]
    through = [[r for r in some if r["sent"] + r["total_s"] > at] for some in engines]
    earlier = [[r for r in some if r["sent"] + r["total_s"] < at] for some in engines]
    return {
        "claims_ms": claims, "failed": [r["failed"] for r in rows if "failed" in r],
        "longest_gap_ms": max(map(longest_gap, through)),
        "longest_gap_ms_before": max(map(longest_gap, earlier)),
        "shared_gap_ms": max(map(shared_gap, through)),
        "shared_gap_ms_before": max(map(shared_gap, earlier)),
    }  # fmt: skip


def waited(logs: list[Path]) -> list[float]:
    """Milliseconds that a step of each engine waited at most, by its log; 0.5 if it says nothing.

    Less than that is not worth a line to it; nor is what is not half as much again.
    """
    texts = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    return [max([0.5, *map(float, re.findall(r"a step waited ([0-9.]+) ms", text))])
            for text in texts]  # fmt: skip


def longest_gap(rows: list[dict[str, Any]]) -> float:
    """Milliseconds between two tokens of a request, at most."""
    return round(1e3 * max((row["gap_s"] for row in rows), default=0.0), 2)


def shared_gap(rows: list[dict[str, Any]], together: int = 3) -> float:
    """The same, of a gap that several requests of an engine had at once: a step that took long.

    What one has alone is vLLM's preemption: it waits, and is computed again.
    """
    gaps = sorted((1e3 * row["gap_s"] for row in rows), reverse=True)
    near = (a for a, b in zip(gaps, gaps[together - 1 :], strict=False) if a - b < 1)
    return round(next(near, 0.0), 2)


def kill(fleet: Fleet, victim: int) -> dict[str, Any]:
    """SIGKILL of one engine's core under load: when its bytes are back, what the others felt."""
    begin = time.time() + 0.5
    times = [n / RATE for n in range(int(LOAD_S * RATE))]
    for index in range(len(fleet.children)):
        fleet.tell(index, begin=begin, times=times)
    time.sleep(begin + KILL_AFTER_S - time.time())
    before = reports()
    name = f"engine-{victim}"
    pid = next(t.pid for device in list_tenants() for t in device.tenants if t.name == name)
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    while name in reports() and time.time() < at + 20:
        time.sleep(0.002)
    back = time.time()
    engines = fleet.answers()
    rows = [row for e in engines if e["index"] != victim for row in e["rows"]]
    through = [r for r in rows if r["sent"] < at < r["sent"] + r["total_s"]]
    earlier = [r for r in rows if r["sent"] + r["total_s"] < at]
    return {
        "killed_held": before[name], "ms": round((back - at) * 1e3, 2),
        "neighbours": {
            "requests": len(rows), "failed": [r["failed"] for r in rows if "failed" in r],
            "running_at_the_kill": len(through),
            "longest_gap_ms": longest_gap(through),
            "longest_gap_ms_before": longest_gap(earlier),
            "ttft_max_s_after": max((r["ttft_s"] for r in rows if r["sent"] > at), default=0.0),
        },
        "victim_failed": sum("failed" in r for e in engines if e["index"] == victim
                             for r in e["rows"]),
        "left": reports(),
    }  # fmt: skip
