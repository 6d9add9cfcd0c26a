"""The kernels on a GPU beside the limits of the card and other people's, in one run.

``python bench/kernels.py [ID ...] [--peers DIR] [--seconds N] [--dry]`` writes ``kernels.json``. An
id is a row (D0, W1_b256) or the start of several (D, P, D3). Kernels are compiled first, in several
``--processes``; then the limits are measured: a sum over 8 GiB, a copy, an 8192^3 bfloat16 product.
Each row stands alone: one that fails, or whose API is not there, says so. ``--seconds`` is shared
out among the rows: repeats and peers become fewer, and no row starts after them. ``--dry`` runs
tiny shapes, on the CPU too, to find mistakes before a GPU is paid for. ``--merge A.json B.json``
puts the rows of runs on several GPUs into one ``kernels.json``, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# This file must not be found as the package "kernels" that some libraries ask for.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != HERE]
sys.path[:0] = [str(HERE / "peers"), str(HERE)]

import torch  # noqa: E402
from attention_peers import available, use  # noqa: E402
from common import RESULTS, SCHEMA_VERSION, commit  # noqa: E402
from kernel_rows import IDS, Missing, Row, measure, met  # noqa: E402
from kernel_timing import Limits, measure_limits, pace  # noqa: E402
from kernel_warm import compile_rows  # noqa: E402

sys.path.remove(str(HERE))


def chosen(words: list[str]) -> list[str]:
    """Rows by their ids, or by the start of them; all without words."""
    if not words:
        return list(IDS)
    found = []
    for word in words:
        rows = [word] if word in IDS else [ident for ident in IDS if ident.startswith(word)]
        if word in IDS:  # D3 is a row, and a family
            rows += [ident for ident in IDS if ident.startswith(word + "_")]
        if not rows:
            raise SystemExit(f"no row is or starts with {word!r}: {', '.join(IDS)}")
        found += [ident for ident in rows if ident not in found]
    return found


def run(ident: str, limits: Limits, *, dry: bool) -> Row:
    """A row, whatever happens."""
    start = time.perf_counter()
    try:
        row = {"id": ident} | measure(ident, limits, dry=dry)
        row["met"] = met(row)
    except Missing as missing:
        row = {"id": ident, "missing": str(missing)}
    except Exception as error:  # noqa: BLE001 - one row must not hide the others
        traceback.print_exc()
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        row = {"id": ident, "failed": text}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    row["seconds"] = round(time.perf_counter() - start, 1)
    print(line(row), flush=True)
    return row


def line(row: Row) -> str:
    """A row for the log."""
    for word in ("missing", "failed"):
        if word in row:
            return f"{row['id']:<14} {word}: {row[word]}"
    verdict = {True: "ok", False: "BELOW", None: ""}[row["met"]]
    extra = {k: row[k] for k in ("tflops", "speedup", "gb_per_s", "host_us", "bound_us", "plan_us")
             if k in row}  # fmt: skip
    peers = {name: round(us / row["us"], 2) for name, us in row.get("peers", {}).items()}
    failed = row.get("peers_failed") or ""
    return (
        f"{row['id']:<14} {row['us']:>10.2f} us  p99 {row['p99']:>10.2f}  "
        f"R {row['ratio_to_limit']:.3f}  target {row['target']} {row['target_of']} {verdict:<5} "
        f"error {row.get('error', 0):.1e} (peer {row.get('peer_error') or 0:.1e}) "
        f"rms {row.get('error_rms', 0):.2e} (peer {row.get('peer_error_rms') or 0:.2e})  {extra}  "
        f"peers/ours {peers} {failed}"
    )


def write(rows: list[Row], limits: Limits, left: list[str], *, dry: bool) -> Path:
    """``kernels.json`` in ``$OUT``, or among the results; of a dry run only in ``$OUT``."""
    cuda = torch.cuda.is_available()
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION, "bench": "kernels",
        "commit": os.environ.get("COMMIT") or commit(),
        "device": torch.cuda.get_device_name(0) if cuda else "CPU", "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "dry": dry,
        "memory": "elastic (a KVCache of one layer); records of G1_blocks and O1: torch",
        "limits": {"read_tb_per_s": round(limits.read / 1e12, 3),
                   "copy_tb_per_s": round(limits.copy / 1e12, 3),
                   "matrix_tflops": round(limits.matrix / 1e12, 1)},
        "peers": sorted(available()), "left": left, "rows": rows,
        "failed": [row["id"] for row in rows if "failed" in row],
    }  # fmt: skip
    try:
        import triton

        document["triton"] = triton.__version__
    except ImportError:
        pass
    if dry and "OUT" not in os.environ:
        return RESULTS
    return put(document)


def put(document: dict[str, Any]) -> Path:
    """Write ``kernels.json``."""
    folder = Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "kernels.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return path


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of several, of one commit and one kind of device; a row that ran wins."""
    first = documents[0]
    for other in documents[1:]:
        for name in ("schema_version", "bench", "commit", "device", "torch", "triton", "dry"):
            if other.get(name) != first.get(name):
                raise SystemExit(f"{name} differs: {first.get(name)} and {other.get(name)}")
    rows: dict[str, Row] = {}
    for document in documents:
        for row in document["rows"]:
            if "us" not in rows.get(row["id"], {}):
                rows[row["id"]] = row
    ran = [ident for ident in IDS if ident in rows]
    return first | {
        "rows": [rows[ident] for ident in ran],
        "peers": sorted({peer for document in documents for peer in document["peers"]}),
        "left": [ident for ident in IDS if ident not in rows and any(
            ident in document["left"] for document in documents)],
        "failed": [ident for ident in ran if "failed" in rows[ident]],
        "runs": [{"limits": document["limits"], "date": document["date"],
                  "rows": [row["id"] for row in document["rows"]]} for document in documents],
    }  # fmt: skip


def measured(
    wanted: list[str], limits: Limits, end: float, *, dry: bool
) -> tuple[list[Row], list[str]]:
    """The rows, and those for which no time was left; each has its share of what there is."""
    rows: list[Row] = []
    left: list[str] = []
    for index, ident in enumerate(wanted):
        now = time.monotonic()
        if now > end:
            left.append(ident)
            continue
        pace.row((end - now) / (len(wanted) - index))
        rows.append(run(ident, limits, dry=dry))
        write(rows, limits, left, dry=dry)
    return rows, left


def main() -> int:
    """Measure what was asked for; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ID", help=f"of {', '.join(IDS)}; default: all")
    parser.add_argument("--peers", type=Path, action="append", default=[],
                        help="a folder that fetch_kernels.py filled, or of packages")  # fmt: skip
    parser.add_argument("--without", action="append", default=[], metavar="NAME",
                        help="peers that are not asked: the start of their names")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--processes", type=int, help="that compile (8; dry: 0)")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, figures mean nothing")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="JSON")
    options = parser.parse_args()
    if options.merge:
        print(put(merged([json.loads(path.read_text("utf-8")) for path in options.merge])))
        return 0
    use(options.peers, options.without)
    if options.processes is None:
        options.processes = 0 if options.dry else 8
    end = time.monotonic() + options.seconds
    wanted = chosen(options.rows)
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; --dry runs on the CPU")
    if options.processes:
        start = time.monotonic()
        compile_rows(
            wanted, options.processes, dry=options.dry, limit_s=min(120, options.seconds / 3)
        )
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
    limits = Limits(1e10, 1e10, 1e11) if options.dry else measure_limits()
    print(f"limits {limits}; peers {sorted(available())}", flush=True)
    rows, left = measured(wanted, limits, end, dry=options.dry)
    path = write(rows, limits, left, dry=options.dry)
    print(f"\n{path}; left out: {', '.join(left) or 'nothing'}; limits {limits}")
    for row in rows:
        print(line(row))
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
