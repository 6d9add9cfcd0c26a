"""Every shipped configuration of the kernels as the compiler makes it: ``kernels_compiled.json``.

``python bench/kernels_compiled.py [--arch 90 80 89 100 120]`` compiles what the ahead-of-time
tests list (``tests/unit/aot_*.py``) without a GPU, with the sizes that each architecture is given,
and writes registers, stack and shared memory. What one refuses is listed with the reason.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import triton
from common import RESULTS, SCHEMA_VERSION, commit

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # what the programs share lies there
ARCHS = [90, 80, 89, 100, 120]


def programs() -> list[Any]:
    """The programs of the tests."""
    found = []
    for path in sorted((ROOT / "tests" / "unit").glob("aot_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    return found


def reason(error: BaseException) -> str:
    """The line that says what is wrong, without the program or the command around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    wrong = [line for line in lines if "error" in line.lower() and "/" not in line]
    said = (wrong or [line for line in lines if "/" not in line] or [""])[-1]
    return f"{type(error).__name__}: {said[:160]}"


def compiled(arch: int, only: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(rows, refusals) of one architecture."""
    rows, refused = [], []
    for module in programs():
        if arch not in getattr(module, "ARCHS", [arch]):
            continue  # written for the instructions of others
        for name, one in module.configurations(arch).items():
            if only and not any(word in name for word in only):
                continue
            head = {"kernel": name, "arch": f"sm_{arch}"}
            try:
                rows.append(head | module.report(*one, arch=arch))
            except Exception as error:  # noqa: BLE001 - a refusal is a result
                refused.append(head | {"why": reason(error)})
            print({**head, **(rows[-1] if rows else {})}, file=sys.stderr, flush=True)
    return rows, refused


def main() -> int:
    """Compile, write, say what was refused."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHS)
    parser.add_argument("--only", nargs="*", default=[], help="names that hold one of these words")
    options = parser.parse_args()
    rows, refused = [], []
    for arch in options.arch:
        more, not_here = compiled(arch, options.only)
        rows += more
        refused += not_here
    path = Path(os.environ.get("OUT") or RESULTS) / "kernels_compiled.json"
    if (options.only or options.arch != ARCHS) and path.exists():  # the others stay as they were
        before = json.loads(path.read_text(encoding="utf-8"))
        done = {(row["kernel"], row["arch"]) for row in [*rows, *refused]}
        for new, old in ((rows, before["rows"]), (refused, before["refused"])):
            new += [row for row in old if (row["kernel"], row["arch"]) not in done]
    document = {
        "schema_version": SCHEMA_VERSION, "bench": "kernels_compiled", "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "triton": triton.__version__,
        "rows": rows, "refused": refused,
    }  # fmt: skip
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for row in refused:
        print(f"{row['arch']} {row['kernel']}: {row['why']}")
    print(f"{path}: {len(rows)} rows, {len(refused)} refused")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
