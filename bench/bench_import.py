"""What starting costs: ``import kvcached`` over bare Python, and the commands."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import row, write

REPEATS = 15


def seconds(command: Sequence[str]) -> float:
    """Wall time of a process, from start to end."""
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def imported(statement: str) -> float:
    """Seconds of one import in a fresh process."""
    code = f"import time; a = time.perf_counter(); {statement}; print(time.perf_counter() - a)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Measure and write ``import.json``."""
    kvcached = shutil.which("kvcached") or str(Path(sys.executable).parent / "kvcached")
    cases = {
        "import kvcached": lambda: imported("import kvcached"),
        "from kvcached import KVCache": lambda: imported("from kvcached import KVCache"),
        "python -c pass (whole process)": lambda: seconds([sys.executable, "-c", "pass"]),
        "kvcached --help (whole process)": lambda: seconds([kvcached, "--help"]),
        "kvcached ps (whole process)": lambda: seconds([kvcached, "ps"]),
    }
    rows = []
    for name, run in cases.items():
        run()  # caches of bytecode and of the file system
        rows.append(row(name, [run() for _ in range(REPEATS)], unit="ms"))
    write("import", "start-up", rows)


if __name__ == "__main__":
    main()
