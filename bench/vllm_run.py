"""One vLLM engine at a time, for ``gpu_vllm.py``: a process each, its raw figures, its row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
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


def engine(
    name: str, *, elastic: bool, env: dict[str, str] | None = None, seconds: float = 300,
    **options: Any,
) -> Any:  # fmt: skip
    """Run one engine; its result."""
    if Recorded.folder:
        return read_recorded(f"{name}.json")
    out = OUT / "vllm" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "engine.py"), "--out", str(out)]
    for key, value in options.items():
        command += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    more = {"KVCACHED": "strict" if elastic else "0"} | (env or {})
    log = LOGS / f"{name}.log"
    with log.open("w", encoding="utf-8") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | more,
                                 start_new_session=True)  # fmt: skip
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # its engine core too: it would keep the memory
            status = f"no result within {seconds:.0f} s; killed"
    if status:
        raise RuntimeError(f"{name}: {status}: {log.read_text(encoding='utf-8')[-2000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


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
