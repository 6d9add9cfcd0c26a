"""One vLLM engine at a time, for ``gpu_vllm.py``: a process each, its raw figures, its row."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS

GIB = 1 << 30
HERE = Path(__file__).resolve().parent / "vllm_engines"
OUT = Path(os.environ.get("OUT") or RESULTS)
LOGS = Path(tempfile.mkdtemp(prefix="vllm-logs-"))
ROWS: list[dict[str, Any]] = []
SMALL = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 64,
         "kv_cache_memory_bytes": 4 * GIB, "gpu_memory_utilization": 0.1}  # fmt: skip
"""Arguments of an engine with a small model."""


class Recorded:
    """A folder of raw figures to make the rows of, in place of running engines."""

    folder: Path | None = None


def read_recorded(name: str) -> Any:
    """Raw figures of an earlier run; ``None``: engines are to be run."""
    if Recorded.folder is None:
        return None
    try:
        return json.loads((Recorded.folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:  # as an engine that failed
        raise RuntimeError(f"{name}: nothing was recorded") from None


def add(ident: str, value: float, unit: str, target: float | None, **more: Any) -> None:
    """One row."""
    ROWS.append({"id": ident, "value": round(value, 4), "unit": unit, "target": target,
                 "repeats": more.pop("repeats", 1)} | more)  # fmt: skip


class Run:
    """One engine: a process of its own, and what it leaves."""

    def __init__(
        self, name: str, *, elastic: bool, env: dict[str, str] | None = None, **options: Any
    ) -> None:
        self.name, self._out = name, OUT / "vllm" / f"{name}.json"
        self._out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / "engine.py"), "--out", str(self._out)]
        for key, value in options.items():
            command += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
        more = {"KVCACHED": "strict" if elastic else "0"} | (env or {})
        self._log = LOGS / f"{name}.log"
        with self._log.open("w", encoding="utf-8") as file:
            self.child = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | more,
                                          start_new_session=True)  # fmt: skip

    def result(self, seconds: float) -> Any:
        """Its figures, once it has ended. Raises ``RuntimeError``."""
        try:
            status: Any = self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            status = f"no result within {seconds:.0f} s; killed"
        if status:
            raise RuntimeError(
                f"{self.name}: {status}: {self._log.read_text(encoding='utf-8')[-2000:]}"
            )
        return json.loads(self._out.read_text(encoding="utf-8"))

    def wait_for(self, file: Path, end: float) -> None:
        """Until it has made ``file``. Raises ``RuntimeError`` if it ends before, or at ``end``."""
        while not file.exists():
            if self.child.poll() is not None or time.monotonic() > end:
                self.kill()
                self.result(10)
                raise RuntimeError(f"{self.name}: ended before {file.name}")
            time.sleep(0.01)

    def kill(self) -> None:
        """Its engine core too: that would keep the memory."""
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)


def engine(
    name: str, *, elastic: bool, env: dict[str, str] | None = None, seconds: float = 300,
    **options: Any,
) -> Any:  # fmt: skip
    """Run one engine; its result."""
    if Recorded.folder:
        return read_recorded(f"{name}.json")
    return Run(name, elastic=elastic, env=env, **options).result(seconds)


def in_turns(
    runs: dict[str, dict[str, Any]], seconds: float, phases: str, patience: float = math.inf,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Engines that start side by side on one device, and then run a phase each, one at a time.

    ``phases`` and ``options`` are common to all. Times are then of one engine alone, within seconds
    of the others' of the same phase; those of starts are not. Of an engine that fails comes the
    error; one that takes longer than ``patience`` seconds for a phase has failed.
    """
    if Recorded.folder:
        return {name: read_recorded(f"{name}.json") for name in runs}
    found: dict[str, Any] = {}
    names = [*map(str, range(phases.count(",") + 1)), "end"]
    options, end = options | {"phases": phases}, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        engines = [Run(name, turns=folder, **options | more) for name, more in runs.items()]

        def each(told: str | None, until: str | None) -> None:
            for one in engines:
                if one.name in found:
                    continue
                try:
                    if told is not None:
                        Path(folder, f"{one.name}.{told}.go").touch()
                    if until is None:
                        found[one.name] = one.result(60)
                    else:
                        soon = end if told is None else min(end, time.monotonic() + patience)
                        one.wait_for(Path(folder, f"{one.name}.{until}.ready"), soon)
                except RuntimeError as error:
                    found[one.name] = str(error)

        try:
            for told, until in itertools.pairwise([None, *names, None]):
                each(told, until)
        finally:
            for one in engines:
                one.kill()
    return found


def require(run: Any) -> Any:
    """A run of ``in_turns``; raises ``RuntimeError`` if it failed."""
    if isinstance(run, str):
        raise RuntimeError(run)  # noqa: TRY004 - as ``engine`` does
    return run


def hashes(run: Any) -> list[str]:
    """One for each request's tokens."""
    return [h for phase in run["phases"] for h in phase["hashes"]]


def same(a: Any, b: Any) -> str:
    """How many requests of two runs got the same tokens: ``"200 of 200"``."""
    pairs = list(zip(hashes(a), hashes(b), strict=True))
    return f"{sum(x == y for x, y in pairs)} of {len(pairs)}"


def share(text: str) -> float:
    """Of ``same``."""
    equal, _, total = text.split()
    return int(equal) / int(total)


def compared(name: str, **options: Any) -> tuple[str, str | None]:
    """How many requests get the same tokens from stock and elastic, and from stock run twice.

    The latter only if the former are not all, for what that means.
    """
    stock = engine(f"{name}_False", elastic=False, **options)
    shown = same(stock, engine(f"{name}_True", elastic=True, **options))
    if share(shown) == 1:
        return shown, None
    return shown, same(stock, engine(f"{name}_again", elastic=False, **options))


def compared_at_once(name: str, *, seconds: float, **options: Any) -> tuple[str, str | None]:
    """As ``compared``, of engines that start side by side."""
    if Recorded.folder:
        return compared(name, **options)
    modes = ("False", "True", "again")
    runs = in_turns({f"{name}_{mode}": {"elastic": mode == "True"} for mode in modes},
                    seconds, **options)  # fmt: skip
    stock, elastic, again = (runs[f"{name}_{mode}"] for mode in modes)
    shown = same(require(stock), require(elastic))
    return shown, None if share(shown) == 1 or isinstance(again, str) else same(stock, again)
