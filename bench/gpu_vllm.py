"""Real vLLM, stock beside elastic, in one run: ``bench/results/vllm.json``, the table last.

    python bench/gpu_vllm.py [tokens attention backends sleep layouts throughput starts bursts ...]

Needs a GPU and vLLM in the environment, and this package installed beside it (vLLM finds its
plug-in by entry point). Models are real shapes with dummy weights, and SmolLM2 where tokens are
compared (``vllm_engines/models.py`` says where it comes from). Each engine is a process of its own
(``vllm_engines/``); raw figures lie under ``$OUT/vllm``, logs in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import commit
from vllm_bursts import bursts, core_speed, light
from vllm_layouts import layouts, order
from vllm_run import (
    GIB,
    OUT,
    ROWS,
    SMALL,
    Recorded,
    add,
    compared,
    engine,
    in_turns,
    require,
    same,
    share,
)

BACKENDS = os.environ.get("BACKENDS", "FLASH_ATTN,TRITON_ATTN,CUSTOM").split(",")
"""Attention backends. CUSTOM is ours: it needs the plug-in, and its results depend on the batch."""
RUNNERS = [(backend, runner) for backend in BACKENDS if backend != "CUSTOM"
           for runner in os.environ.get("RUNNERS", "1,0").split(",")]  # fmt: skip
"""Attention backend, and whether it is the V2 model runner."""
TOKENS = {"shape": "smollm2", "phases": "100,100", "prompt": 400, "output": 128, "settle": 0}
"""200 requests of a model that has learnt something, greedy."""
BACKEND_ENGINE = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 64,
                  "gpu_memory_utilization": 0.25, "enable_prefix_caching": False,
                  "compilation_config": {"cudagraph_capture_sizes": [1, 8, 16, 32, 48, 64]},
                  }  # fmt: skip


def tokens() -> None:
    """Greedy tokens of both, with kernels whose result does not depend on the batch.

    Where they differ, stock runs once more: how far it agrees with itself says what that means.
    """
    shown: dict[str, str] = {}
    again: dict[str, str | None] = {}
    for backend, runner in RUNNERS:
        env = {"VLLM_BATCH_INVARIANT": "1", "VLLM_USE_V2_MODEL_RUNNER": runner}
        label = f"{backend} V{1 + int(runner)}"
        shown[label], again[label] = compared(
            f"tokens_{backend}_{runner}", env=env,
            engine=SMALL | {"attention_backend": backend}, **TOKENS,
        )  # fmt: skip
    add("tokens_identical", min(map(share, shown.values())), "share", 1.0, repeats=200,
        requests=shown, stock_again=again)  # fmt: skip


def attention() -> None:
    """Each attention backend on elastic memory beside stock FLASH_ATTN.

    Results depend on the batch, so the stock one runs twice to show its own spread. Engines wait
    beside each other, and one at a time runs.
    """
    kinds = {"stock_1": ("FLASH_ATTN", False), "stock_2": ("FLASH_ATTN", False)}
    kinds |= {backend: (backend, True) for backend in BACKENDS}
    runs = in_turns(
        {f"attention_{name}": {"elastic": elastic, "engine": SMALL | {"attention_backend": backend}}
         for name, (backend, elastic) in kinds.items()}, 300,
        env={"VLLM_BATCH_INVARIANT": "0"}, **TOKENS,
    )  # fmt: skip
    stock, again, *ours = (require(runs[f"attention_{name}"]) for name in kinds)
    spread = same(stock, again)
    for backend, run in zip(BACKENDS, ours, strict=True):
        shown = same(stock, run)
        rates = [phase["requests_per_s"] for phase in run["phases"]]
        add(f"attention_{backend.lower()}", share(shown), "share", None, repeats=200,
            requests=shown, requests_per_s={backend: rates, "stock": [
                phase["requests_per_s"] for phase in stock["phases"]]},
            peers={"stock again": share(spread)})  # fmt: skip


def backends() -> None:
    """Throughput of each attention backend on elastic memory; FLASH_ATTN is the measure.

    Their engines wait beside each other, and one at a time runs.
    """
    runs = in_turns(
        {f"backend_{name}": {"engine": BACKEND_ENGINE | {"attention_backend": name}}
         for name in BACKENDS}, float(os.environ.get("BACKEND_SECONDS", "300")),
        os.environ.get("PHASES", "64,64,64,64,64"), elastic=True, settle=0, shape="llama-3.2-3b",
    )  # fmt: skip
    keys = ("requests", "requests_per_s", "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50",
            "tpot_ms_p99")  # fmt: skip
    ended = {name: run["phases"][1:] for name in BACKENDS  # the first compiles what is left
             if isinstance(run := runs[f"backend_{name}"], dict)}  # fmt: skip
    most = max(phase["requests"] for run in ended.values() for phase in run)
    rates = {name: statistics.median(phase["requests_per_s"] for phase in run
                                     if phase["requests"] == most)
             for name, run in ended.items()}  # fmt: skip
    shown = {name: [{key: phase.get(key) for key in keys} for phase in run]
             for name, run in ended.items()}  # fmt: skip
    errors = {name: run for name, run in runs.items() if isinstance(run, str)}
    for name in BACKENDS[1:]:
        add(f"backend_throughput_{name.lower()}", rates.get(name, 0.0) / rates[BACKENDS[0]], "x",
            None, repeats=len(ended[BACKENDS[0]]), phases=shown, errors=errors,
            peers={f"{other} requests/s": rate for other, rate in rates.items()})  # fmt: skip


NAP: dict[str, Any] = {
       "shape": "small", "phases": "24,24", "prompt": 400, "output": 96, "settle": 0,
       "env": {"VLLM_BATCH_INVARIANT": "1"},
       "engine": SMALL | {"enable_sleep_mode": True, "attention_backend": "TRITON_ATTN"},
       }  # fmt: skip
"""Seeded weights, and kernels whose results do not depend on the batch: prefixes that were dropped
are computed again in another one."""


def sleep() -> None:
    """Memory while an engine sleeps, and its tokens after; prefixes dropped and kept."""
    shown: dict[str, Any] = {}
    for choice in ("drop", "keep"):
        env = NAP["env"] | {"KVCACHED_SLEEP": choice}
        run = engine(f"sleep_{choice}", elastic=True, sleep=1, **NAP | {"env": env})
        shown[choice] = nap = run["nap"]
        report = nap["tenants"][0]["report"]
        least = report["split_floor_bytes"] + report["cached_bytes"]
        add(f"sleep_over_floor_{choice}", report["backed_bytes"] / least, "x", 1.02, report=report,
            nap={k: v for k, v in nap.items() if k not in {"tenants", "hashes"}},
            peers={"GiB of the device, before": run["phases"][-1]["used_gib_idle"],
                   "asleep": nap["used_gib"], "ms to sleep": nap["sleep_ms"],
                   "ms to wake": nap["wake_ms"]})  # fmt: skip
    pairs = [pair for nap in shown.values() for pair in nap["hashes"]]
    add("sleep_tokens_identical", sum(a == b for a, b in pairs) / len(pairs), "share", 1.0,
        repeats=len(pairs))  # fmt: skip


def throughput() -> None:
    """One 8B-shaped model at 64 and 512 requests, twice each; equal capacity.

    Stock runs a second time, after elastic: its spread.
    """
    kv = 40 * GIB
    options = {
        "shape": "llama-3.1-8b", "phases": os.environ.get("PHASES", "64,512,64,512"), "settle": 1.5,
        "engine": {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 256,
                   "kv_cache_memory_bytes": kv,
                   "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 64, 128, 256]}},
    }  # fmt: skip
    stock = engine("throughput_stock", elastic=False, **options)
    ours = engine("throughput_elastic", elastic=True, **options)
    again = engine("throughput_stock_again", elastic=False, **options)
    pairs = [(a, b) for s, o in zip(stock["phases"], ours["phases"], strict=True)
             for a, b in zip(s["hashes"], o["hashes"], strict=True)]  # fmt: skip
    add("throughput_tokens_identical", sum(a == b for a, b in pairs) / len(pairs), "share", 1.0,
        repeats=len(pairs))  # fmt: skip
    for count in (64, 512):
        rates = [[p["requests_per_s"] for p in run["phases"] if p["requests"] == count]
                 for run in (stock, ours, again)]  # fmt: skip
        medians = [statistics.median(r) for r in (rates[0] + rates[2], rates[1])]
        last = [[p for p in run["phases"] if p["requests"] == count][-1] for run in (stock, ours)]
        latency = {
            key: {"stock": last[0].get(key), "elastic": last[1].get(key)}
            for key in ("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "tpot_ms_p99")
        }  # fmt: skip
        add(f"throughput_ratio_{count}", medians[1] / medians[0], "x", 0.995,
            repeats=len(rates[0]),
            requests_per_s=dict(zip(("stock", "elastic", "stock again"), rates, strict=True)),
            latency=latency,
            peers={"stock requests/s": medians[0], "elastic requests/s": medians[1],
                   "stock again over stock": statistics.median(rates[2]) /
                   statistics.median(rates[0])})  # fmt: skip
    end = ours["phases"][-1]
    report = end["tenants"][0]["report"]
    add("idle_over_floor", report["backed_bytes"] / max(1, report["split_floor_bytes"] +
                                                        report["cached_bytes"]), "x", 1.02,
        report=report, peers={"GiB of the device after start, stock": stock["used_gib_after_start"],
                              "elastic": ours["used_gib_after_start"],
                              "idle after the load, stock": stock["phases"][-1]["used_gib_idle"],
                              "elastic, prefixes kept": end["used_gib_idle"]})  # fmt: skip


START = {"shape": os.environ.get("SHAPE", "llama-3.2-3b"), "settle": 0, "output": 8,
         "engine": SMALL}  # fmt: skip


def starts() -> None:
    """How long an engine takes to start, stock and elastic side by side.

    In the first round vLLM and we compile what is then kept; it is recorded, and not counted.
    """
    rounds = int(os.environ.get("STARTS", "4"))
    pairs = []
    for index in range(rounds):
        names = {mode: f"start_{mode}_{index}" for mode in ("stock", "elastic")}
        found = in_turns({name: {"elastic": mode == "elastic"} for mode, name in names.items()},
                         200, "1", **START)  # fmt: skip
        pairs.append({mode: require(found[name])["start_s"] for mode, name in names.items()})
    medians = {mode: statistics.median(pair[mode] for pair in pairs[1:]) for mode in pairs[0]}
    add("start_ratio", statistics.median(p["elastic"] / p["stock"] for p in pairs[1:]), "x", 1.0,
        repeats=rounds - 1, pairs_s=pairs[1:], first_s=pairs[0],
        peers={f"{mode} s": seconds for mode, seconds in medians.items()})  # fmt: skip


def cache() -> None:
    """What the elastic cache itself takes of a start: of one in this process, where it is timed."""
    alone = engine("start_cache", elastic=True, env={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
                   phases="1", **START)  # fmt: skip
    add("cache_start_ms", sum(alone["cache_ms"].values()), "ms", 50, parts=alone["cache_ms"])


def peer() -> None:
    """Upstream (``kvcached`` of the package index) on this vLLM, beside stock and ours.

    ``PEER`` names the folder that ``bench/peers/upstream_kvcached.py build`` made.
    """
    place = Path(os.environ["PEER"])
    built = json.loads((place / "peer.json").read_text(encoding="utf-8"))
    (place / "start").mkdir(exist_ok=True)
    (place / "start" / "sitecustomize.py").write_text(  # its .pth works in a site folder only
        f"import site\nsite.addsitedir({built['source']!r})\n", encoding="utf-8"
    )
    paths = [str(place / "start"), built["source"], built["site"], os.environ["PYTHONPATH"]]
    # Without a variable of ours, and without the plug-ins: ours has the same module name.
    theirs = {"PYTHONPATH": os.pathsep.join(paths), "VLLM_PLUGINS": "", "ENABLE_KVCACHED": "true"}
    modes: dict[str, dict[str, Any]] = {
        "stock": {"elastic": False}, "ours": {"elastic": True},
        **{f"V{1 + int(runner)}": {"elastic": False,
                                   "env": theirs | {"VLLM_USE_V2_MODEL_RUNNER": runner}}
           for runner in ("0", "1")},
    }  # fmt: skip
    found = in_turns(
        {f"peer_{name}": mode for name, mode in modes.items()},
        float(os.environ.get("PEER_SECONDS", "150")), "8,128,128", patience=25,
        shape="llama-3.2-1b",
        engine={"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 128,
                "gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 6 * GIB},
    )  # fmt: skip
    runs = {name: found[f"peer_{name}"] for name in modes}
    require(runs["stock"])
    last = {name: run if isinstance(run, str) else run["phases"][-1] for name, run in runs.items()}
    rates = {name: phase["requests_per_s"] for name, phase in last.items()
             if not isinstance(phase, str)}  # fmt: skip
    add("peer_upstream", max((r for n, r in rates.items() if n[0] == "V"), default=0.0),
        "requests/s", None, peer=place.name, peers=rates, start_s={
            name: run["start_s"] for name, run in runs.items() if not isinstance(run, str)},
        gib={name: {"after start": run["used_gib_after_start"],
                    "idle": last[name]["used_gib_idle"]}
             for name, run in runs.items() if not isinstance(run, str)},
        errors={name: text for name, text in last.items() if isinstance(text, str)})  # fmt: skip


PARTS = {
    "tokens": tokens,
    "starts": starts,
    "cache": cache,
    "attention": attention,
    "backends": backends,
    "sleep": sleep,
    "layouts": layouts,
    "order": order,
    "throughput": throughput,
    "bursts": bursts,
    "light": light,
    "core_speed": core_speed,
    "peer": peer,
}


def report(failed: list[str], device: str) -> None:
    """Write the file; the table comes last."""
    document = {
        "schema_version": 1, "commit": os.environ.get("COMMIT") or commit(),
        "device": device, "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "failed": failed, "rows": ROWS,
    }  # fmt: skip
    (OUT / "vllm.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for row in ROWS:
        more = {k: v for k, v in row.items() if k not in {"id", "value", "unit", "target"}}
        print(f"{row['id']:<22} {row['value']:>9} {row['unit']:<6} target {row['target']} {more}")


def _device() -> str:
    import torch

    return str(torch.cuda.get_device_name(0))


def main() -> int:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--recorded", help="raw figures of an earlier run, to make the rows of")
    parser.add_argument("--device", help="with --recorded: what the run was on")
    options = parser.parse_args()
    Recorded.folder = Path(options.recorded) if options.recorded else None
    failed = []
    for name in options.parts or PARTS:
        try:
            PARTS[name]()
        except Exception:  # noqa: BLE001 - one part must not hide the others' figures
            failed.append(name)
            print(f"{name} FAILED:")
            traceback.print_exc()
    report(failed, options.device or _device())
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main())
