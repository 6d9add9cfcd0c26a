"""The demo's figures and its picture: ``results/demo.json`` and ``docs/demo.svg``.

With ``--device cuda`` (or ``cuda:1``) those of a GPU: ``demo_cuda.json`` and ``demo_cuda.svg``.
Other arguments go to ``kvcached demo``. Other work on the machine shows in the figures: run it
alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from common import RESULTS, commit, machine

DOCS = RESULTS.parent.parent / "docs"


def main() -> None:
    """Run ``kvcached demo`` with its defaults and say what was measured, and where."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--device", default="cpu")
    given, others = parser.parse_known_args()
    name = "demo" if given.device == "cpu" else "demo_cuda"
    target = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    files = ["--json", str(target), "--svg", str(DOCS / f"{name}.svg")]
    command = ["-m", "kvcached", "demo", "--plain", "--device", given.device, *files, *others]
    subprocess.run([sys.executable, *command], check=True)
    _sign(target)


def _sign(target: Path) -> None:
    """Add what every result file says of itself; what the demo knows of a GPU stays."""
    document = json.loads(target.read_text("utf-8"))
    about = {
        "bench": target.stem,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": {**document["machine"], **machine()},
    }
    target.write_text(json.dumps({**document, **about}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
