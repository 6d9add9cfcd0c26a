"""Whether both runs gave the same tokens, and if not, whether that was a tie.

Greedy decoding in batches of other sizes rounds differently. Where two candidates' logits nearly
tie, that may pick the other one, and all tokens after it differ. Such a pair is excused if a stock
run of that request alone has the two logits within ``TIE`` of each other.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvcached.demo.figures import Outcome, Recording
from kvcached.errors import EngineUnsupported

TIE = 1e-3
_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Difference:
    """Two runs agree on ``context`` (prompt included), then one gave ``a``, the other ``b``."""

    request: int
    context: tuple[int, ...]
    a: int
    b: int


def differences(static: Recording, elastic: Recording) -> list[Difference]:
    """The first place of each request where the runs differ. All requests must be done."""
    found = []
    for number, one in static.outcomes.items():
        other = elastic.outcomes[number]
        if one.tokens != other.tokens:
            found.append(_first_difference(one, other))
    return found


def _first_difference(one: Outcome, other: Outcome) -> Difference:
    a, b = one.tokens, other.tokens
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
    if at < 0:  # one is the other's beginning: no tie explains that
        return Difference(one.request.id, (), -1, -1)
    context = (*one.request.tokens, *a[:at])
    return Difference(one.request.id, context, a[at], b[at])


def compare(
    static: Recording, elastic: Recording, model: Path, device: str, environ: Mapping[str, str]
) -> dict[str, Any]:
    """``tokens_identical`` and what backs it: requests compared, and each difference's gap."""
    found = differences(static, elastic)
    gaps = _stock_gaps(found, model, device, environ) if found else []
    ties = [
        {"request": d.request, "logit_gap": gap, "tie": 0 <= gap <= TIE}
        for d, gap in zip(found, gaps, strict=True)
    ]
    return {
        "tokens_identical": all(t["tie"] for t in ties),
        "tokens_compared": {
            "requests": len(static.outcomes),
            "equal": len(static.outcomes) - len(found),
            "differences": ties,
        },
    }


def _stock_gaps(
    found: list[Difference], model: Path, device: str, environ: Mapping[str, str]
) -> list[float]:
    """``|logit(a) - logit(b)|`` in a stock run of each request alone; -1 where nothing compares."""
    asked = [{"context": d.context, "a": d.a, "b": d.b} for d in found]
    done = subprocess.run(  # noqa: S603 - our own module
        [sys.executable, "-m", "kvcached.demo.verify", str(model), device],
        input=json.dumps(asked), capture_output=True, text=True, timeout=_SECONDS,
        env=dict(environ), check=False,
    )  # fmt: skip
    if done.returncode:
        raise EngineUnsupported(
            f"the stock run that compares tokens ended with code {done.returncode}; its last "
            f"words:\n{done.stderr[-2000:]}"
        )
    gaps: list[float] = json.loads(done.stdout.splitlines()[-1])
    return gaps


def main() -> None:
    """Read differences as JSON on stdin, write their gaps; stock attention, stock cache."""
    import torch

    from kvcached.demo.model import load_model

    torch.set_num_threads(1)
    model = load_model(Path(sys.argv[1]), attention="sdpa", device=sys.argv[2])
    gaps = []
    for item in json.load(sys.stdin):
        if not item["context"]:
            gaps.append(-1.0)
            continue
        with torch.inference_mode():
            context = torch.tensor([item["context"]], device=model.device)
            logits = model(input_ids=context, logits_to_keep=1).logits
        gaps.append(abs(float(logits[0, -1, item["a"]] - logits[0, -1, item["b"]])))
    sys.stdout.write(json.dumps(gaps) + "\n")


if __name__ == "__main__":
    main()
