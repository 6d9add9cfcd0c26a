"""After the measured workload: a limit is lowered under load, then an engine is killed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from kvcached.broker.admin import list_tenants, set_tenant_limit
from kvcached.config import Config, format_size
from kvcached.demo.figures import Event, Recording
from kvcached.demo.live import View
from kvcached.demo.process import Fleet
from kvcached.demo.workload import ENGINES, Request
from kvcached.errors import BrokerUnavailable, EngineUnsupported

_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.002
_BURST_SECONDS = 3.0
"""How long the victim may hold too little before it gets another burst."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What the last two phases act on: the first engine is the victim of both."""

    fleet: Fleet
    recording: Recording
    view: View
    config: Config
    budget: int

    def run(self, burst: list[Request]) -> dict[str, Any]:
        """The ``limit`` and ``kill`` of the JSON document. ``burst`` keeps the victim busy."""
        victim, survivor = ENGINES
        self.recording.mark(time.monotonic(), f"burst {victim}")
        load = self._bursts(victim, burst)
        next(load)
        self._wait_until_in_use(victim, 2 * self.budget // 5, load)
        limit = self._lower_limit(victim)
        set_tenant_limit(victim, self.budget, config=self.config)
        self._wait_until_in_use(victim, self.budget // 3, load)
        next(load)  # the one that runs may end before the kill, where the machine is fast
        return {"limit": limit, "kill": self._kill(victim, survivor)}

    def _bursts(self, engine: str, burst: list[Request]) -> Iterator[None]:
        """Send the burst at each step, each time under new numbers."""
        for turn in count():
            for request in burst:
                number = request.id + turn * len(burst)
                self.fleet[engine].request(replace(request, id=number))
            yield

    def _wait_until_in_use(self, engine: str, nbytes: int, load: Iterator[None]) -> None:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        again = time.monotonic() + _BURST_SECONDS
        while (used := self.recording.latest(engine).get("in_use", 0)) < nbytes:
            if time.monotonic() > again:  # the last one has ended, or is about to
                again = time.monotonic() + _BURST_SECONDS
                next(load)
            if time.monotonic() > deadline:
                raise EngineUnsupported(
                    f"{engine!r} uses {format_size(used)} after {_PATIENCE_SECONDS:.0f} s, and "
                    f"should use {format_size(nbytes)}",
                    hint="The machine is very busy, or the model ends its answers at once.",
                )
            self.fleet.poll(0.05)

    def _lower_limit(self, victim: str) -> dict[str, Any]:
        wanted, before = self.budget // 4 >> 10 << 10, self._tenant(victim).lease_bytes
        self.view.say(
            f"kvcached limit {victim} {wanted >> 10}KiB    (it holds {format_size(before)})"
        )
        started = time.monotonic()
        self.recording.mark(started, f"limit {victim} {format_size(wanted)}")
        record = set_tenant_limit(victim, wanted, config=self.config)
        while not record.applied and time.monotonic() < started + _PATIENCE_SECONDS:
            self.fleet.poll(_POLL_SECONDS)
            record = self._tenant(victim).limit
        took = time.monotonic() - started
        self.fleet.watch(0.5)
        return {
            "requested_bytes": wanted,
            "before_bytes": before,
            "held_bytes": self._tenant(victim).limit.held_bytes,
            "ms": round(1e3 * took, 2),
        }

    def _kill(self, victim: str, survivor: str) -> dict[str, Any]:
        """Let the survivor ask for nearly everything, then kill the one that holds it."""
        self.fleet[survivor].send("claim", nbytes=self.budget * 9 // 10)
        self.fleet.wait_for(survivor, "claiming", seconds=_PATIENCE_SECONDS)
        # It cannot have it and keeps asking; it would, were the victim given time to run dry.
        held = self._tenant(victim).lease_bytes
        self.view.say(
            f"kill -9 {self.fleet[victim].pid}    ({victim}, which holds {format_size(held)})"
        )
        killed = self.fleet.kill(victim)
        self.recording.mark(killed, f"kill -9 {victim}")
        credited, claimed = self._wait_for_bytes(victim, survivor, killed)
        self.fleet.watch(1.0)
        return {
            "bytes_returned": held,
            "ms": round(1e3 * (claimed["t"] - killed), 2),
            "credited_ms": round(1e3 * (credited - killed), 2),
            "survivor_bytes": claimed["stats"]["backed"],
        }

    def _wait_for_bytes(self, victim: str, survivor: str, killed: float) -> tuple[float, Event]:
        """When the broker had credited the victim's bytes, and the survivor's claim of them."""
        credited = claimed = None
        while claimed is None:
            if credited is None and self._find(victim) is None:
                credited = time.monotonic()
            event = self.fleet.poll(_POLL_SECONDS)
            if event is not None and (event["event"], event["engine"]) == ("claimed", survivor):
                claimed = event
            elif time.monotonic() > killed + _PATIENCE_SECONDS:
                raise EngineUnsupported(
                    f"{survivor!r} could not claim the bytes of {victim!r} within "
                    f"{_PATIENCE_SECONDS:.0f} s of its kill -9"
                )
        # Between two looks the survivor may have claimed already: then they were credited before.
        return min(credited or claimed["t"], claimed["t"]), claimed

    def _find(self, name: str) -> Any:
        for device in list_tenants(config=self.config):
            for tenant in device.tenants:
                if tenant.name == name:
                    return tenant
        return None

    def _tenant(self, name: str) -> Any:
        tenant = self._find(name)
        if tenant is None:
            raise BrokerUnavailable(f"the broker does not know the engine {name!r}")
        return tenant
