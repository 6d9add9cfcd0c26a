"""The demo's figures and its picture: ``results/demo.json`` and ``docs/demo.svg``.

Other work on the machine shows in them. Run it alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime

from common import RESULTS, commit, machine

PICTURE = RESULTS.parent.parent / "docs" / "demo.svg"


def main() -> None:
    """Run ``kvcached demo`` with its defaults and say what was measured, and where."""
    target = RESULTS / "demo.json"
    RESULTS.mkdir(exist_ok=True)
    arguments = ["demo", "--plain", "--json", str(target), "--svg", str(PICTURE)]
    subprocess.run([sys.executable, "-m", "kvcached", *arguments, *sys.argv[1:]], check=True)
    document = json.loads(target.read_text("utf-8"))
    about = {
        "bench": "demo",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
    }
    target.write_text(json.dumps({**document, **about}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
