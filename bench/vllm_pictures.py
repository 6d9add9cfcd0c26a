"""Pictures of the bursts: ``docs/vllm_bursts.svg`` from ``results/vllm_bursts.json``.

    python bench/vllm_pictures.py [--from FOLDER --commit C --device D]

``--from`` first makes that file of the raw figures that ``gpu_vllm.py bursts`` left in ``FOLDER``
(``burst_static.json``, ``burst_elastic.json``). Above: what each elastic engine holds while the
highest peak goes by. Below: times to first token of the same burst, static and elastic, sorted.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from common import RESULTS, commit

TARGET = RESULTS / "vllm_bursts.json"
PICTURE = RESULTS.parent.parent / "docs" / "vllm_bursts.svg"
WIDTH, HEIGHT, LEFT, RIGHT = 860, 560, 64, 16
TOPS, PANEL = (70, 340), 170
TEXT, AXIS = "#767676", "#8a8a8a"
COLOURS = (("#0072B2", "#56B4E9"), ("#D55E00", "#E69F00"), ("#009E73", "#8FD6BD"))
"""In use and cached of each engine: Okabe-Ito's, and lighter ones of the same hue."""
LINES = {"static": "#CC79A7", "elastic": "#0072B2"}
MIB = 1 << 20


def extract(folder: Path) -> dict[str, Any]:
    """What the picture needs of the raw figures: the last burst, the one with the highest peak."""
    runs = {mode: json.loads((folder / f"burst_{mode}.json").read_text("utf-8"))
            for mode in LINES}  # fmt: skip
    bursts = {mode: run["bursts"][-1] for mode, run in runs.items()}
    names = sorted(n for n in bursts["elastic"]["samples"][-1]["tenants"])
    held = [
        [s["t"], *((t["in_use_bytes"] // MIB, (t["backed_bytes"] - t["in_use_bytes"]) // MIB)
                   for t in (s["tenants"].get(n, {"in_use_bytes": 0, "backed_bytes": 0})
                             for n in names))]
        for s in bursts["elastic"]["samples"]
    ]  # fmt: skip
    ttft = {mode: sorted(round(row["ttft_s"], 4) for e in burst["engines"] for row in e["rows"])
            for mode, burst in bursts.items()}  # fmt: skip
    first = bursts["elastic"]
    return {"schema_version": 1, "shape": runs["elastic"]["shape"],
            "total_bytes": runs["elastic"]["total_bytes"], "peak_rps": first["peak_rps"],
            "slope": first["slope"], "engines": names, "held_mib": held,
            "ttft_s": ttft}  # fmt: skip


def text(x: float, y: float, words: str, size: int = 11, **more: str) -> str:
    """One label."""
    rest = "".join(f' {key.replace("_", "-")}="{value}"' for key, value in more.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{rest}>{escape(words)}</text>'


def across(part: float) -> float:
    """The place of a share of the width."""
    return LEFT + (WIDTH - LEFT - RIGHT) * part


def frame(top: float, title: str) -> str:
    """Axes and heading of a panel."""
    return (
        f'<path d="M{LEFT} {top}V{top + PANEL}H{WIDTH - RIGHT}" stroke="{AXIS}" fill="none"/>'
        + text(LEFT, top - 12, title, 13, font_weight="600")
    )


def memory(found: dict[str, Any], top: float) -> list[str]:
    """Stacked areas of what the engines hold."""
    points, most = found["held_mib"], found["total_bytes"] / MIB * 1.1
    end = points[-1][0]

    def place(t: float, value: float) -> str:
        return f"{across(max(0.0, t) / end):.1f} {top + PANEL * (1 - value / most):.1f}"

    base, parts = [0.0] * len(points), [frame(top, "what three elastic engines hold")]
    for index, name in enumerate(found["engines"]):
        for kind, colour in enumerate(COLOURS[index]):
            upper = [b + p[1 + index][kind] for b, p in zip(base, points, strict=True)]
            there = [place(p[0], u) for p, u in zip(points, upper, strict=True)]
            back = [place(p[0], b) for p, b in zip(points, base, strict=True)]
            parts.append(f'<path d="M{"L".join(there + back[::-1])}Z" fill="{colour}"/>')
            x = LEFT + 260 * index + 130 * kind
            parts.append(f'<rect x="{x}" y="12" width="12" height="12" fill="{colour}"/>')
            parts.append(text(x + 17, 22, f"{name}: {('in use', 'cached')[kind]}"))
            base = upper
    line = top + PANEL * (1 - 1 / 1.1)
    parts.append(f'<path d="M{LEFT} {line:.1f}H{WIDTH - RIGHT}" stroke="{TEXT}" '
                 'stroke-dasharray="6 4"/>')  # fmt: skip
    gib = found["total_bytes"] / (1 << 30)
    parts.append(text(LEFT - 6, line + 4, f"{gib:g} GiB", text_anchor="end"))
    parts += [
        text(across(second / end), top + PANEL + 15, f"{second} s", 10, text_anchor="middle")
        for second in range(0, int(end) + 1, 10)
    ]
    return parts


def waiting(found: dict[str, Any], top: float) -> list[str]:
    """Times to first token in order, on a logarithmic scale."""
    parts = [frame(top, "time to first token, requests in order")]
    least, most = 0.01, 1.2 * max(map(max, found["ttft_s"].values()))

    def height(seconds: float) -> float:
        share = math.log(max(seconds, least) / least) / math.log(most / least)
        return top + PANEL * (1 - share)

    for number, (mode, values) in enumerate(found["ttft_s"].items()):
        path = [f"{across(i / (len(values) - 1)):.1f} {height(v):.1f}"
                for i, v in enumerate(values)]  # fmt: skip
        parts.append(f'<path d="M{"L".join(path)}" stroke="{LINES[mode]}" fill="none" '
                     'stroke-width="2"/>')  # fmt: skip
        mean, tail = sum(values) / len(values), values[int(0.99 * (len(values) - 1))]
        words = f"{mode}: mean {1e3 * mean:,.0f} ms, p99 {1e3 * tail:,.0f} ms"
        parts.append(text(LEFT + 14, top + 20 + 18 * number, words, 12, fill=LINES[mode]))
    parts += [
        text(LEFT - 6, height(seconds) + 4, f"{seconds:g} s", text_anchor="end")
        for seconds in (0.01, 0.1, 1.0, 10.0)
        if seconds < most
    ]
    return parts


def picture(found: dict[str, Any]) -> str:
    """The SVG document."""
    caption = (
        f"Three vLLM engines ({found['shape']}) on one {found.get('device', 'GPU')}, bursts to "
        f"{found['peak_rps']:g} requests/s by {found['slope']:g} a second, "
        f"{found.get('date', '')}, commit {found.get('commit', '')}"
    )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" fill="{TEXT}">'
    )
    title = "<title>Memory and waiting of three vLLM engines in bursts</title>"
    panels = memory(found, TOPS[0]) + waiting(found, TOPS[1])
    return "\n".join([head, title, *panels, text(LEFT, HEIGHT - 8, caption), "</svg>\n"])


def main() -> None:
    """Take in new figures if asked, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="folder", type=Path)
    parser.add_argument("--commit", default=None)
    parser.add_argument("--device", default="GPU")
    options = parser.parse_args()
    if options.folder:
        about = {"commit": options.commit or commit(), "device": options.device,
                 "date": datetime.now(UTC).strftime("%Y-%m-%d")}  # fmt: skip
        TARGET.write_text(json.dumps(extract(options.folder) | about) + "\n", encoding="utf-8")
    PICTURE.write_text(picture(json.loads(TARGET.read_text("utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
