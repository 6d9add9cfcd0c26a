"""Engines that are sent requests one by one, fixed and elastic in turns: of ``gpu_vllm.py``."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

from vllm_run import GIB, HERE, LOGS, OUT, Recorded, add, read_recorded

PEAKS, SLOPE = os.environ.get("PEAKS", "12@2,12@2,24,28"), os.environ.get("SLOPE", "4")
TOTAL = int(float(os.environ.get("TOTAL_GIB", "3")) * GIB)
"""Of the bursts: requests a second at the peak, their rise a second, memory for all caches."""
FLEET = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 256,
         "gpu_memory_utilization": 0.2, "enable_prefix_caching": True,
         "compilation_config": {"cudagraph_capture_sizes": [1, 8, 16, 32, 64, 128, 256, 320, 512]},
         }  # fmt: skip
"""Arguments of their engines. As by vLLM's own choice, graphs reach to 512 tokens, so that passes
with prompts have one too, and the host's hundreds of launches are not what is measured."""


def ttft(burst: Any) -> list[float]:
    """All times to first token of one burst, sorted."""
    return sorted(row["ttft_s"] for e in burst["engines"] for row in e["rows"])


def bursts() -> None:
    """Three 3B-shaped engines in bursts, elastic against a static split, and what follows."""
    found = fleets()
    shown: list[dict[str, Any]] = []
    peaks: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for pair in zip(found["static"]["bursts"], found["elastic"]["bursts"], strict=True):
        row: dict[str, Any] = {"peak_rps": pair[0]["peak_rps"], "slope": pair[0]["slope"]}
        for mode, burst in zip(("static", "elastic"), pair, strict=True):
            values = ttft(burst)
            row[mode] = {"requests": len(values), "mean_s": round(statistics.mean(values), 4),
                         "p99_s": round(values[int(0.99 * (len(values) - 1))], 4),
                         "failed": sum("failed" in r for e in burst["engines"] for r in e["rows"]),
                         "peak_gib": max(s["used_gib"] for s in burst["samples"])}  # fmt: skip
        for name in ("mean", "p99"):
            row[f"{name}_ratio"] = round(ratio([row], f"{name}_s"), 2)
        shown.append(row)
        peaks.setdefault((row["peak_rps"], row["slope"]), []).append(row)
    means = [ratio(rows, "mean_s") for rows in peaks.values()]  # of a peak that came several times
    add("ttft_mean_ratio_min", min(means), "x", 1.0, repeats=len(shown), runs=shown,
        total_bytes=TOTAL)  # fmt: skip
    add("ttft_mean_ratio_max", max(means), "x", 7.0)
    add("ttft_p99_ratio_max", max(ratio(rows, "p99_s") for rows in peaks.values()), "x", 28.0)
    aftermath(found["elastic"])


def ratio(rows: list[dict[str, Any]], name: str) -> float:
    """Static over elastic, of all rows of one peak."""
    return sum(r["static"][name] for r in rows) / sum(r["elastic"][name] for r in rows)


def fleets() -> dict[str, Any]:
    """The raw figures of both modes."""
    names = {mode: f"burst_{mode}.json" for mode in ("static", "elastic")}
    if Recorded.folder:
        return {mode: read_recorded(name) for mode, name in names.items()}
    send("burst.py", "run", "--peaks", PEAKS, "--slope", SLOPE, "--out", str(LOGS / "burst.json"))
    return {mode: kept(name) for mode, name in names.items()}


def send(script: str, *arguments: str, total: int = TOTAL) -> None:
    """Run ``script``: engines, each a process of its own, that are sent requests."""
    subprocess.run(
        [sys.executable, str(HERE / script), *arguments, "--shape",
         os.environ.get("SHAPE", "llama-3.2-3b"), "--total", str(total), "--engine",
         json.dumps(FLEET)],
        check=True, timeout=580,
    )  # fmt: skip


def kept(name: str) -> Any:
    """What a script left of this name, which is kept."""
    out = OUT / "vllm" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes((LOGS / name).read_bytes())
    return json.loads(out.read_text(encoding="utf-8"))


def light() -> None:
    """Time to first token of one engine under a light load, fixed and elastic, in turns."""
    if Recorded.folder:
        run = read_recorded("light.json")
    else:
        send("light.py", "--rounds", os.environ.get("ROUNDS", "3"), "--out",
             str(LOGS / "light.json"))  # fmt: skip
        run = kept("light.json")
    rounds = run["rounds"]
    means = {mode: [statistics.mean(row["ttft_s"] for row in one[mode]) * 1e3 for one in rounds]
             for mode in ("static", "elastic")}  # fmt: skip
    add("ttft_light_ratio", sum(means["static"]) / sum(means["elastic"]), "x", 1.0,
        repeats=len(rounds), mean_ms={m: [round(x, 2) for x in v] for m, v in means.items()},
        peers={f"{m}, ms": statistics.mean(v) for m, v in means.items()})  # fmt: skip


def core_speed() -> None:
    """What elastic adds to a time to first token if the launching core is as fast for both.

    The measure is a line through the loads of the fixed engine: time over a fixed loop of Python.
    """
    if Recorded.folder:
        loads = read_recorded("core_speed.json")["loads"]
    else:
        send("core_speed.py", "--rounds", os.environ.get("ROUNDS", "3"), "--out",
             str(LOGS / "core_speed.json"), total=GIB)  # fmt: skip
        loads = kept("core_speed.json")["loads"]
    static, elastic = ([load for load in loads if load["mode"] == mode]
                       for mode in ("static", "elastic"))  # fmt: skip
    line = statistics.linear_regression([load["loop_us"] for load in static],
                                        [load["ttft_ms"] for load in static])  # fmt: skip
    above = [load["ttft_ms"] - line.intercept - line.slope * load["loop_us"] for load in elastic]
    add("ttft_above_line_ms", statistics.mean(above), "ms", None, repeats=len(above),
        above_ms=[round(value, 2) for value in above], loads=loads,
        peers={"static at 0 us, ms": line.intercept, "ms per us": line.slope})  # fmt: skip


def given_up(claims: list[Any], left: int) -> list[Any]:
    """Of a neighbour's claims those for which engines gave memory up; ``left``: what they kept."""
    granted = [claim for claim in claims if "ms" in claim]
    after = [*(claim["engines_held"] for claim in granted[1:]), left]
    return [claim for claim, held in zip(granted, after, strict=True)
            if held < claim["engines_held"]]  # fmt: skip


def reclaim_row(given: list[Any]) -> dict[str, Any]:
    """Median and longest of such claims, and each of the largest."""
    times, most = sorted(claim["ms"] for claim in given), max(claim["bytes"] for claim in given)
    return {"value": statistics.median(times), "unit": "ms", "target": 30, "repeats": len(times),
            "max": times[-1], "largest_bytes": most,
            "largest_ms": [claim["ms"] for claim in given if claim["bytes"] == most]}  # fmt: skip


def aftermath(run: Any) -> None:
    """Rows of a neighbour's claims and of a kill."""
    reclaim, kill = run["reclaim"], run["kill"]
    left = [r for name, r in reclaim["left"].items() if name != "neighbour"]
    given = given_up(reclaim["claims"], sum(r["backed_bytes"] for r in left))
    if given:
        add("reclaim_ms", **reclaim_row(given), claims=reclaim["claims"])
        add("idle_over_floor_reclaimed",
            sum(r["backed_bytes"] for r in left) / sum(r["split_floor_bytes"] for r in left), "x",
            1.02, left=reclaim["left"], kept=reclaim["kept"])  # fmt: skip
    if loaded := run.get("under_load"):
        waits = run["step_waited_ms"]
        add("step_wait_ms_max", max(waits, default=float("nan")), "ms", 2, repeats=len(waits),
            waits=waits, **loaded)  # fmt: skip
    add("kill_ms", kill["ms"], "ms", 500, **{k: v for k, v in kill.items() if k != "ms"})
