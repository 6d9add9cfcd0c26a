"""An engine process of the demo, seen from the demo: send commands, receive events, end it."""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from kvcached.demo.workload import Request
from kvcached.errors import EngineUnsupported

Event = dict[str, Any]
_EXIT_SECONDS = 10.0
_TAIL_LINES = 15


class EngineProcess:
    """A ``kvcached.demo.worker`` and its two pipes.

    Parameters
    ----------
    name:
        Of the engine; also of its tenant.
    model:
        The Hugging Face directory it loads.
    device:
        Where its model and its cache lie.
    environ:
        Its environment.
    events:
        Where its events go, each with the engine's name under ``"engine"``. When the process ends
        an ``"exit"`` event comes last.
    """

    def __init__(
        self, name: str, model: Path, device: str, environ: Mapping[str, str],
        events: queue.Queue[Event],
    ) -> None:  # fmt: skip
        self.name = name
        self._events = events
        self._stderr = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed in close()
        # A session of its own: Ctrl-C reaches the demo only, which then ends its engines.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvcached.demo.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr,
            env=dict(environ), start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._send({"name": name, "model": str(model), "device": device})

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def send(self, op: str, **fields: Any) -> None:
        """Send a command (a method of ``Worker``). A process that is gone says so by its exit."""
        self._send({"op": op, **fields})

    def request(self, request: Request) -> None:
        """Send one request of the workload."""
        self.send(
            "request", number=request.id, tokens=request.tokens,
            max_new_tokens=request.max_new_tokens,
        )  # fmt: skip

    def _send(self, message: Event) -> None:
        assert self._process.stdin is not None, "stdin is a pipe"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None, "stdout is a pipe"
        for line in self._process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # a line cut off by SIGKILL
                self._events.put({**json.loads(line), "engine": self.name})
        self._events.put({"event": "exit", "engine": self.name, "code": self._process.wait()})

    def kill(self) -> float:
        """SIGKILL; returns the monotonic time just before it."""
        at = time.monotonic()
        self._process.send_signal(signal.SIGKILL)
        return at

    def stderr_tail(self) -> str:
        """The last lines that it wrote to stderr."""
        self._stderr.seek(0)
        text = self._stderr.read().decode(errors="replace")
        return "\n".join("    " + line for line in text.strip().splitlines()[-_TAIL_LINES:])

    def close(self) -> None:
        """End it: by asking, then by force. Idempotent."""
        if self._process.poll() is None:
            self.send("exit")
            try:
                self._process.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
                self._process.wait()
        self._reader.join(_EXIT_SECONDS)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._stderr.close()


class Fleet:
    """The engine processes of a demo, and one queue of their events.

    ``wait`` hands every event to ``listener`` first, so that samples are seen while one waits.
    """

    def __init__(
        self, names: tuple[str, ...], model: Path, device: str, environ: Mapping[str, str],
        listener: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self._queue: queue.Queue[Event] = queue.Queue()
        self._listener = listener
        self._expected_to_die: set[str] = set()
        self.processes: dict[str, EngineProcess] = {}
        try:
            for name in names:
                self.processes[name] = EngineProcess(name, model, device, environ, self._queue)
        except BaseException:  # also Ctrl-C: the first must not outlive the second's failure
            self.close()
            raise

    def __getitem__(self, name: str) -> EngineProcess:
        return self.processes[name]

    def kill(self, name: str) -> float:
        """SIGKILL one engine on purpose; returns the monotonic time just before."""
        self._expected_to_die.add(name)
        return self.processes[name].kill()

    def send_all(self, op: str, **fields: Any) -> None:
        """Send one command to all that live."""
        for name, process in self.processes.items():
            if name not in self._expected_to_die:
                process.send(op, **fields)

    def poll(self, seconds: float) -> Event | None:
        """The next event within ``seconds``, if any.

        Raises ``EngineUnsupported`` with the end of its stderr if an engine died on its own.
        """
        try:
            event = self._queue.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None
        if event["event"] == "exit" and event["engine"] not in self._expected_to_die:
            process = self.processes[event["engine"]]
            raise EngineUnsupported(
                f"engine {event['engine']!r} ended with code {event['code']}; its last words:\n"
                f"{process.stderr_tail()}"
            )
        self._listener(event)
        return event

    def wait_all(self, kind: str, *, seconds: float) -> dict[str, Event]:
        """One event of ``kind`` from each engine that lives; ``EngineUnsupported`` if late."""
        found: dict[str, Event] = {}
        missing = set(self.processes) - self._expected_to_die
        deadline = time.monotonic() + seconds
        while missing:
            event = self.poll(deadline - time.monotonic())
            if event is None and time.monotonic() >= deadline:
                names = ", ".join(sorted(missing))
                raise EngineUnsupported(f"no {kind!r} from {names} within {seconds:.0f} s")
            if event is not None and event["event"] == kind and event["engine"] in missing:
                found[event["engine"]] = event
                missing.discard(event["engine"])
        return found

    def wait_for(self, name: str, kind: str, *, seconds: float) -> Event:
        """The next event of ``kind`` from one engine. Raises ``EngineUnsupported`` if late."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            event = self.poll(deadline - time.monotonic())
            if event is not None and (event["engine"], event["event"]) == (name, kind):
                return event
        raise EngineUnsupported(f"no {kind!r} from {name} within {seconds:.0f} s")

    def watch(self, seconds: float) -> None:
        """Take in events for a while."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.poll(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all of them. Idempotent."""
        for process in self.processes.values():
            if process.alive:
                process.send("exit")
        for process in self.processes.values():
            process.close()
