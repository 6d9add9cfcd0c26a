"""The demo from start to end: static split, elastic, a lowered limit, a kill; then the figures."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kvcached.broker.admin import list_tenants
from kvcached.config import Config, format_size
from kvcached.demo import verify
from kvcached.demo.aftershow import Stage
from kvcached.demo.device import find_device
from kvcached.demo.engine import shared_page
from kvcached.demo.figures import Event, Recording
from kvcached.demo.live import View
from kvcached.demo.model import DTYPE, MODEL_NAME, load_tokenizer, model_directory
from kvcached.demo.process import Fleet
from kvcached.demo.workload import (
    ENGINES,
    Scale,
    Workload,
    extra_burst,
    make_workload,
    scale_of,
)
from kvcached.errors import EngineUnsupported, InvalidInput
from kvcached.layout import cdiv

SCHEMA_VERSION = 1
_OVERHEAD_SECONDS = 30.0  # loading, the limit, the kill, the card
_LOAD_SECONDS = 300.0
_STEP_SECONDS = 60.0
_BUDGET_OVER_BURST = 1.25
"""The budget over what the largest burst holds: one engine's burst fits, but not into half."""
_LONGEST_TEMPORARY_DIR = 36
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """What ``kvcached demo`` was asked for. ``budget`` in bytes; ``None``: fits the workload."""

    device: str = "cpu"
    seconds: float = 90.0
    budget: int | None = None
    seed: int = 0
    model: Path | None = None
    cache_home: Path = field(default_factory=Path)
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """The JSON document, and the two recordings for the picture."""

    document: dict[str, Any]
    static: Recording
    elastic: Recording


def run(options: Options, view: View) -> Result:
    """Run the demo. Leaves no process, socket or directory behind, however it ends.

    Raises errors of ``kvcached.errors``; ``KeyboardInterrupt`` passes through after cleaning up.
    """
    device = find_device(options.device)
    view.say("looking for the model (the first time it is converted: half a minute)")
    model = model_directory(options.model, options.cache_home)
    runtime_dir = _make_runtime_dir()
    environ = {
        **options.environ,
        "KVCACHED_RUNTIME_DIR": str(runtime_dir),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    demo = _Demo(options, device, view, model, Config(runtime_dir=str(runtime_dir)))
    try:
        view.say(f"loading {_model_name(options)} twice on {device}, in two processes")
        with Fleet(ENGINES, model, device, environ, demo.on_event) as fleet:
            static, elastic, after = demo.run(fleet)
        view.say("comparing the tokens of both runs")
        after |= verify.compare(static, elastic, model, device, environ)
        return Result(demo.document(static, elastic, after), static, elastic)
    finally:
        _end_broker(demo.config)
        shutil.rmtree(runtime_dir, ignore_errors=True)


class _Demo:
    """The phases of one demo. ``run`` (above) owns and ends the processes."""

    def __init__(
        self, options: Options, device: str, view: View, model: Path, config: Config
    ) -> None:
        self.options, self.device, self.view = options, device, view
        self.model, self.config, self.scale = model, config, scale_of(device)
        self.recording: Recording | None = None
        self.budget = 0
        self.sizes: dict[str, int] = {}
        self.machine: dict[str, Any] = {}

    def on_event(self, event: Event) -> None:
        if self.recording is not None:
            self.recording.on_event(event)
        self.view.update(self.recording)

    def run(self, fleet: Fleet) -> tuple[Recording, Recording, dict[str, Any]]:
        seed = self.options.seed
        tokenizer = load_tokenizer(self.model)  # while the engines load
        ready = fleet.wait_all("ready", seconds=_LOAD_SECONDS)
        self.sizes, self.machine = ready[ENGINES[0]]["sizes"], ready[ENGINES[0]]["machine"]
        workload = self._workload(tokenizer, [event["speed"] for event in ready.values()])
        self.budget = self.options.budget or _fitting_budget(workload, self.sizes)
        _check_budget(workload, self.budget, self.sizes)
        count, token = len(workload.requests), format_size(self.sizes["token"])
        self.view.say(
            f"budget {format_size(self.budget)} of KV memory for two engines, {token} a token; "
            f"{count} requests a run"
        )
        static = self._measure(fleet, "static", workload)
        fleet.send_all("close")
        fleet.wait_all("closed", seconds=_STEP_SECONDS)
        elastic = self._measure(fleet, "elastic", workload)
        burst = extra_burst(
            tokenizer, seed=seed, engine=ENGINES[0], first_id=count, scale=self.scale
        )
        stage = Stage(fleet, elastic, self.view, self.config, self.budget)
        return static, elastic, stage.run(burst)

    def _workload(self, tokenizer: Any, speeds: list[dict[str, float]]) -> Workload:
        """Bursts that come in turn, also where a burst takes long."""
        seconds = max(2.0, (self.options.seconds - _OVERHEAD_SECONDS) / 2)
        make = partial(make_workload, tokenizer, seed=self.options.seed, seconds=seconds,
                       scale=self.scale)  # fmt: skip
        slowest = max(_burst_seconds(make(), speed, self.scale) for speed in speeds)
        return make(burst_seconds=slowest)

    def _measure(self, fleet: Fleet, name: str, workload: Workload) -> Recording:
        """Open the caches, send the requests when they are due, wait for the last, settle."""
        static = name == "static"
        limit = self.budget // 2 if static else self.budget
        fleet.send_all(
            "open", runtime_dir=self.config.runtime_dir, budget=self.budget, limit=limit,
            floor=limit if static else 0, resident=static,
        )  # fmt: skip
        fleet.wait_all("opened", seconds=_STEP_SECONDS)
        recording = self.recording = Recording(name, workload.requests, time.monotonic())
        self.view.start(recording, self.budget)
        _send_when_due(fleet, recording, workload)
        now = time.monotonic()
        recording.measured_until = now - recording.start
        recording.mark(now, "idle")
        fleet.watch(1.5)
        fleet.send_all("stay" if static else "settle")
        fleet.wait_all("settled", seconds=_STEP_SECONDS)
        fleet.watch(0.5)
        return recording

    def document(
        self, static: Recording, elastic: Recording, after: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "backend": "host" if self.device == "cpu" else "cuda",
            "model": _model_name(self.options),
            "budget_bytes": self.budget,
            "static": static.figures(),
            "elastic": elastic.figures(),
            **after,
            "seed": self.options.seed,
            "seconds": self.options.seconds,
            "dtype": DTYPE,
            "token_bytes": self.sizes["token"],
            "block_bytes": self.sizes["block"],
            "page_bytes": self.sizes["page"],
            "machine": {**_machine(), **self.machine},
        }


def _send_when_due(fleet: Fleet, recording: Recording, workload: Workload) -> None:
    """Send each request at its time by the clock, until all are done."""
    due = list(workload.requests)
    deadline = recording.start + 10 * workload.seconds + _STEP_SECONDS
    marked = -1.0
    while recording.done < len(recording.outcomes):
        now = time.monotonic()
        while due and recording.start + due[0].at_s <= now:
            request = due.pop(0)
            if request.at_s > marked:
                marked = request.at_s
                names = {r.engine for r in workload.requests if r.at_s == marked}
                recording.mark(now, f"burst {', '.join(sorted(names))}")
            fleet[request.engine].request(request)
        if now > deadline:
            raise EngineUnsupported(
                f"{recording.done} of {len(recording.outcomes)} requests done after "
                f"{now - recording.start:.0f} s",
                hint="The machine is very slow or busy: try --seconds 300.",
            )
        fleet.poll(min(0.5, recording.start + due[0].at_s - now) if due else 0.5)


def _make_runtime_dir() -> Path:
    """A private directory for the run's broker; short, as a socket's path has 107 bytes at most."""
    place = tempfile.gettempdir()
    short = len(os.fsencode(place)) <= _LONGEST_TEMPORARY_DIR
    return Path(tempfile.mkdtemp(prefix="kvcached-demo-", dir=place if short else "/tmp"))  # noqa: S108 - mkdtemp


def _fitting_budget(workload: Workload, sizes: dict[str, int]) -> int:
    """A little more than the largest burst needs; its halves are whole pages."""
    blocks = _BUDGET_OVER_BURST * workload.burst_blocks(sizes["block_size"]) + 2
    needed = int(blocks * sizes["block"]) + 2 * _rounding(sizes)
    step = 2 * _MIB if blocks * sizes["block"] > 16 * _MIB else 2 * sizes["block"]
    step = max(step, 2 * sizes["page"])
    return cdiv(needed, step) * step


def _rounding(sizes: dict[str, int]) -> int:
    """What an engine may hold beyond its blocks, because others could share their pages.

    The page of the null block, and one at each end of its extents.
    """
    return 3 * shared_page(sizes["block"], sizes["page"])


def _check_budget(workload: Workload, budget: int, sizes: dict[str, int]) -> None:
    """Raise ``InvalidInput`` unless every request fits into half of the budget."""
    longest = max(len(r.tokens) + r.max_new_tokens for r in workload.requests)
    blocks = cdiv(longest, sizes["block_size"]) + 2
    needed = 2 * (blocks * sizes["block"] + _rounding(sizes))
    if budget < needed:
        raise InvalidInput(
            f"a budget of {format_size(budget)} is too small: half of it must hold a request of "
            f"{longest} tokens",
            hint=f"Use --budget {cdiv(needed, _MIB)}MiB or more.",
        )


def _burst_seconds(workload: Workload, speed: dict[str, float], scale: Scale) -> float:
    """About how long an engine with room for it computes a burst."""
    burst = workload.requests[: scale.burst]
    prompts = sum(len(request.tokens) for request in burst)
    steps = max(request.max_new_tokens for request in burst)
    return 1.1 * (prompts * speed["prompt_token"] + steps * speed["step"])


def _model_name(options: Options) -> str:
    return MODEL_NAME if options.model is None else options.model.resolve().name


def _machine() -> dict[str, Any]:
    return {
        "system": platform.system(),
        "release": platform.release(),
        "arch": platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
    }


def _end_broker(config: Config) -> None:
    """Wait until the run's own broker has left, as it does when its last engine has gone."""
    asked_to_leave = time.monotonic() + 5
    while devices := list_tenants(config=config):
        if time.monotonic() > asked_to_leave:
            with contextlib.suppress(ProcessLookupError):
                os.kill(devices[0].broker_pid, signal.SIGTERM)
            return
        time.sleep(0.02)
